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
    from lorapro_hf.factors.pairs import LoRAPair, find_lora_pairs
    from lorapro_hf.factors.weight_gradients import weight_gradients
    from lorapro_hf.federated.aggregate import aggregate_adapters
    from lorapro_hf.functional.intrinsic_dimension import intrinsic_dimension
    from lorapro_hf.functional.projection import equivalent_gradient, project_lora_gradients
    from lorapro_hf.hub import create_model_card, load_lora_pro_config, push_adapter, save_adapter
    from lorapro_hf.methods import LoRAMethod
    from lorapro_hf.methods.beamlora import BeamLoRACallback, fold_beamlora
    from lorapro_hf.methods.boosting import BoostingCallback
    from lorapro_hf.methods.flat_lora import FlatLoRACallback, perturbed_weights
    from lorapro_hf.methods.fused_layers import FusedLoRA, fuse_lora_layers, unfuse_lora_layers
    from lorapro_hf.methods.gelora import gelora_ranks
    from lorapro_hf.methods.gradient_starts import GradientStart, init_from_gradients
    from lorapro_hf.methods.lora_sb import LoRASB, add_lora_sb, fold_lora_sb
    from lorapro_hf.methods.mgpo import MGPOCallback
    from lorapro_hf.optim.factory import LoRAProOptimizerFactory, create_lorapro_optimizer
    from lorapro_hf.optim.lora_pro import LoRAProAdamW
    from lorapro_hf.optim.memory import StateTooLargeError
    from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
    from lorapro_hf.trainer.callback import LoRAProCallback
    from lorapro_hf.trainer.kto import LoRAProKTOConfig, LoRAProKTOTrainer
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
    "BeamLoRACallback",
    "BoostingCallback",
    "FlatLoRACallback",
    "FusedLoRA",
    "GradientGapCallback",
    "GradientStart",
    "LoRAMethod",
    "LoRAPair",
    "LoRAProAdamW",
    "LoRAProCallback",
    "LoRAProConfig",
    "LoRAProDPOConfig",
    "LoRAProDPOTrainer",
    "LoRAProGRPOConfig",
    "LoRAProGRPOTrainer",
    "LoRAProKTOConfig",
    "LoRAProKTOTrainer",
    "LoRAProOptimizerFactory",
    "LoRAProRewardConfig",
    "LoRAProRewardTrainer",
    "LoRAProSFTConfig",
    "LoRAProSFTTrainer",
    "LoRAProTrainer",
    "LoRAProTrainerMixin",
    "LoRAProTrainingArguments",
    "LoRASB",
    "MGPOCallback",
    "StateTooLargeError",
    "add_lora_sb",
    "aggregate_adapters",
    "attach_deepspeed",
    "create_lorapro_optimizer",
    "create_model_card",
    "equivalent_gradient",
    "find_lora_pairs",
    "fold_beamlora",
    "fold_lora_sb",
    "fuse_lora_layers",
    "gelora_ranks",
    "init_from_gradients",
    "intrinsic_dimension",
    "load_lora_pro_config",
    "perturbed_weights",
    "project_lora_gradients",
    "push_adapter",
    "save_adapter",
    "unfuse_lora_layers",
    "weight_gradients",
]

_HOMES = {
    "BeamLoRACallback": "methods.beamlora",
    "BoostingCallback": "methods.boosting",
    "FusedLoRA": "methods.fused_layers",
    "FlatLoRACallback": "methods.flat_lora",
    "GradientGapCallback": "diagnostics",
    "GradientStart": "methods.gradient_starts",
    "LoRAMethod": "methods",
    "LoRAPair": "factors.pairs",
    "LoRAProAdamW": "optim.lora_pro",
    "LoRAProCallback": "trainer.callback",
    "LoRAProConfig": "config",
    "LoRAProDPOConfig": "trainer.trl",
    "LoRAProDPOTrainer": "trainer.trl",
    "LoRAProGRPOConfig": "trainer.trl",
    "LoRAProGRPOTrainer": "trainer.trl",
    "LoRAProKTOConfig": "trainer.kto",
    "LoRAProKTOTrainer": "trainer.kto",
    "LoRAProOptimizerFactory": "optim.factory",
    "LoRAProRewardConfig": "trainer.trl",
    "LoRAProRewardTrainer": "trainer.trl",
    "LoRAProSFTConfig": "trainer.trl",
    "LoRAProSFTTrainer": "trainer.trl",
    "LoRAProTrainer": "trainer.trainer",
    "LoRAProTrainerMixin": "trainer.trainer",
    "LoRAProTrainingArguments": "trainer.arguments",
    "LoRASB": "methods.lora_sb",
    "MGPOCallback": "methods.mgpo",
    "StateTooLargeError": "optim.memory",
    "add_lora_sb": "methods.lora_sb",
    "aggregate_adapters": "federated.aggregate",
    "attach_deepspeed": "deepspeed.engine",
    "create_lorapro_optimizer": "optim.factory",
    "create_model_card": "hub",
    "equivalent_gradient": "functional.projection",
    "find_lora_pairs": "factors.pairs",
    "fuse_lora_layers": "methods.fused_layers",
    "fold_beamlora": "methods.beamlora",
    "gelora_ranks": "methods.gelora",
    "intrinsic_dimension": "functional.intrinsic_dimension",
    "fold_lora_sb": "methods.lora_sb",
    "init_from_gradients": "methods.gradient_starts",
    "load_lora_pro_config": "hub",
    "perturbed_weights": "methods.flat_lora",
    "project_lora_gradients": "functional.projection",
    "push_adapter": "hub",
    "save_adapter": "hub",
    "unfuse_lora_layers": "methods.fused_layers",
    "weight_gradients": "factors.weight_gradients",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
