"""How does TRL's KTO train with LoRA-Pro? Versions of TRL have its trainer in different places."""

from __future__ import annotations

from dataclasses import dataclass

from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
from lorapro_hf.trainer.trainer import LoRAProTrainerMixin
from lorapro_hf.utils.extras import MissingExtraError, install_command

try:
    try:
        from trl import KTOConfig, KTOTrainer
    except ImportError:
        from trl.experimental.kto import KTOConfig, KTOTrainer
except ImportError as error:
    raise MissingExtraError(
        f"{error}: LoRA-Pro's trainer for KTO needs KTOTrainer in trl or in trl.experimental.kto; install the package "
        f"trl with `{install_command('trl')}`, or a version that has it, such as trl==0.24.0."
    ) from error


@dataclass
class LoRAProKTOConfig(KTOConfig, LoRAProTrainingArguments):
    """`trl.KTOConfig` with the settings of `LoRAProTrainingArguments`; defaults are TRL's."""


class LoRAProKTOTrainer(LoRAProTrainerMixin, KTOTrainer):
    """`trl.KTOTrainer` with LoRA-Pro, see `LoRAProTrainerMixin`."""
