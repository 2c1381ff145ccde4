"""LoRA-Pro for the Hugging Face stack: LoRA fine-tuning whose steps follow those of full fine-tuning.

The public names are loaded on first use: `import lorapro_hf.optim.lora_pro` needs neither transformers nor PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorapro_hf.config import LoRAProConfig
    from lorapro_hf.deepspeed.engine import attach_deepspeed
    from lorapro_hf.diagnostics import GradientGapCallback
    from lorapro_hf.factors.pair import LoRAPair
    from lorapro_hf.factors.pairs import find_lora_pairs
    from lorapro_hf.factors.weight_gradients import weight_gradients
    from lorapro_hf.functional.projection import equivalent_gradient, project_lora_gradients
    from lorapro_hf.hub import create_model_card, load_lora_pro_config, push_adapter, save_adapter
    from lorapro_hf.methods import LoRAMethod
    from lorapro_hf.optim.factory import LoRAProOptimizerFactory, create_lorapro_optimizer
    from lorapro_hf.optim.lora_pro import LoRAProAdamW
    from lorapro_hf.optim.memory import StateTooLargeError
    from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
    from lorapro_hf.trainer.callback import LoRAProCallback
    from lorapro_hf.trainer.trainer import LoRAProTrainer, LoRAProTrainerMixin
    from lorapro_hf.trainer.trl import (
        LoRAProDPOConfig,
        LoRAProDPOTrainer,
        LoRAProGRPOConfig,
        LoRAProGRPOTrainer,
        LoRAProRewardConfig,
        LoRAProRewardTrainer,
        LoRAProSFTConfig,
        LoRAProSFTTrainer,
    )

__version__ = "0.1.0"

__all__ = [
    "GradientGapCallback",
    "LoRAMethod",
    "LoRAPair",
    "LoRAProAdamW",
    "LoRAProCallback",
    "LoRAProConfig",
    "LoRAProDPOConfig",
    "LoRAProDPOTrainer",
    "LoRAProGRPOConfig",
    "LoRAProGRPOTrainer",
    "LoRAProOptimizerFactory",
    "LoRAProRewardConfig",
    "LoRAProRewardTrainer",
    "LoRAProSFTConfig",
    "LoRAProSFTTrainer",
    "LoRAProTrainer",
    "LoRAProTrainerMixin",
    "LoRAProTrainingArguments",
    "StateTooLargeError",
    "attach_deepspeed",
    "create_lorapro_optimizer",
    "create_model_card",
    "equivalent_gradient",
    "find_lora_pairs",
    "load_lora_pro_config",
    "project_lora_gradients",
    "push_adapter",
    "save_adapter",
    "weight_gradients",
]

_NAMES = {
    "config": "LoRAProConfig",
    "deepspeed.engine": "attach_deepspeed",
    "diagnostics": "GradientGapCallback",
    "factors.pair": "LoRAPair",
    "factors.pairs": "find_lora_pairs",
    "factors.weight_gradients": "weight_gradients",
    "functional.projection": "equivalent_gradient project_lora_gradients",
    "hub": "create_model_card load_lora_pro_config push_adapter save_adapter",
    "methods": "LoRAMethod",
    "optim.factory": "LoRAProOptimizerFactory create_lorapro_optimizer",
    "optim.lora_pro": "LoRAProAdamW",
    "optim.memory": "StateTooLargeError",
    "trainer.arguments": "LoRAProTrainingArguments",
    "trainer.callback": "LoRAProCallback",
    "trainer.trainer": "LoRAProTrainer LoRAProTrainerMixin",
    "trainer.trl": "LoRAProDPOConfig LoRAProDPOTrainer LoRAProGRPOConfig LoRAProGRPOTrainer LoRAProRewardConfig "
    "LoRAProRewardTrainer LoRAProSFTConfig LoRAProSFTTrainer",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
