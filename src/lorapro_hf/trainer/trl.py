"""How do TRL's trainers train with LoRA-Pro? Ready-made classes; needs the extra `trl`."""

from __future__ import annotations

from dataclasses import dataclass

from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
from lorapro_hf.trainer.trainer import LoRAProTrainerMixin
from lorapro_hf.utils.extras import MissingExtraError, install_command

try:
    from trl import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        RewardConfig,
        RewardTrainer,
        SFTConfig,
        SFTTrainer,
    )
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise MissingExtraError(
        f"LoRA-Pro's trainers for TRL need the package trl; install it with `{install_command('trl')}`."
    ) from error


@dataclass
class LoRAProSFTConfig(SFTConfig, LoRAProTrainingArguments):
    """`trl.SFTConfig` with the settings of `LoRAProTrainingArguments`; defaults are TRL's."""


@dataclass
class LoRAProDPOConfig(DPOConfig, LoRAProTrainingArguments):
    """`trl.DPOConfig` with the settings of `LoRAProTrainingArguments`; defaults are TRL's."""


@dataclass
class LoRAProGRPOConfig(GRPOConfig, LoRAProTrainingArguments):
    """`trl.GRPOConfig` with the settings of `LoRAProTrainingArguments`; defaults are TRL's."""


@dataclass
class LoRAProRewardConfig(RewardConfig, LoRAProTrainingArguments):
    """`trl.RewardConfig` with the settings of `LoRAProTrainingArguments`; defaults are TRL's."""


class LoRAProSFTTrainer(LoRAProTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` with LoRA-Pro, see `LoRAProTrainerMixin`."""


class LoRAProDPOTrainer(LoRAProTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` with LoRA-Pro, see `LoRAProTrainerMixin`."""


class LoRAProGRPOTrainer(LoRAProTrainerMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with LoRA-Pro, see `LoRAProTrainerMixin`."""


class LoRAProRewardTrainer(LoRAProTrainerMixin, RewardTrainer):
    """`trl.RewardTrainer` with LoRA-Pro, see `LoRAProTrainerMixin`."""
