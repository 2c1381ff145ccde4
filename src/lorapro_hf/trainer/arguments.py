"""How does a user say on the command line, or in a YAML file, which LoRA-Pro is meant?"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainingArguments

from lorapro_hf.config import BACKENDS, MODES, MOMENTS_DTYPES, UPDATES, X_MODES, LoRAProConfig, check_choice
from lorapro_hf.diagnostics.settings import check_gap_layers, check_gap_max_bytes
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.trainer.callback import LoRAProCallback

_GAP = "lora_pro_gap_"
_DEFAULTS = LoRAProConfig()

logger = logging.getLogger(__name__)


def _choice(default: str, valid: tuple[str, ...], help: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": list(valid)})


@dataclass
class LoRAProTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of LoRA-Pro, for `HfArgumentParser`, JSON and YAML files.

    Only `LoRAProTrainer` and classes with `LoRAProTrainerMixin` read the settings. A plain `Trainer` ignores them; a
    warning says so when it starts to train, unless a `LoRAProAdamW`, its factory or a `LoRAProCallback` is at work.
    The other arguments keep their meaning: `learning_rate`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and
    `weight_decay` are those of the LoRA-Pro optimizer, and `optim` has to stay at its default.

    To add the settings to the arguments of another trainer, name its class first, so that its defaults win:

    ```python
    @dataclass
    class LoRAProSFTConfig(SFTConfig, LoRAProTrainingArguments):
        pass
    ```

    Args:
        lora_pro: Train with LoRA-Pro. `False` (`--no_lora_pro`) makes `LoRAProTrainer` a plain `Trainer`.
        lora_pro_mode: See `LoRAProConfig.mode`.
        lora_pro_x_mode: See `LoRAProConfig.x_mode`.
        lora_pro_update: See `LoRAProConfig.update`.
        lora_pro_rtol: See `LoRAProConfig.rtol`.
        lora_pro_trust_region: See `LoRAProConfig.trust_region`.
        lora_pro_moments_dtype: See `LoRAProConfig.moments_dtype`.
        lora_pro_backend: See `LoRAProConfig.backend`.
        lora_pro_shard_states: See `LoRAProConfig.shard_states`; by default the ranks share.
        lora_pro_master_factors: See `LoRAProConfig.master_factors`.
        lora_pro_check_memory: Refuse a mode whose optimizer state cannot fit into the memory that is left.
        lora_pro_log_gap: Measure every so many steps how far the gradients of LoRA and of LoRA-Pro are from those of
            full fine-tuning, see `GradientGapCallback`; 0 for never. Also with `lora_pro=False`.
        lora_pro_gap_layers: Layers to measure; by default all.
        lora_pro_gap_max_bytes: See `GradientGapCallback`; by default 1 GiB.

    Raises:
        ValueError: for an unknown choice, a combination that has no meaning, or an rtol or a trust region outside
            `[0, 1)`.
    """

    lora_pro: bool = field(
        default=True,
        metadata={"help": "Train with LoRA-Pro; --no_lora_pro trains exactly as transformers.Trainer does."},
    )
    lora_pro_mode: str = _choice(
        _DEFAULTS.mode,
        MODES,
        "What Adam's moments are kept of: 'full' and 'full_8bit' need memory of the size of the adapted weights, "
        "'factored' of the size of the factors; learning rates are those of full fine-tuning, and upwards. 'efficient' "
        "keeps moments of the factors and uses learning rates of LoRA.",
    )
    lora_pro_x_mode: str = _choice(
        _DEFAULTS.x_mode,
        X_MODES,
        "Which of the equivalent factor gradients to take; 'sylvester' is the paper's. Without effect on a sequential "
        "update, but in mode 'efficient'.",
    )
    lora_pro_update: str = _choice(
        _DEFAULTS.update,
        UPDATES,
        "How a step is spent on the two factors: 'linear' (the paper) moves both at once, 'sequential' B first and A "
        "against the new B.",
    )
    lora_pro_rtol: float | None = field(
        default=_DEFAULTS.rtol,
        metadata={
            "help": "Directions of a factor whose squared singular value is at most this fraction of the largest one "
            "count as absent. By default chosen from the dtype."
        },
    )
    lora_pro_trust_region: float | None = field(
        default=_DEFAULTS.trust_region,
        metadata={
            "help": "How large the product of the changes of both factors may be, as a share below 1 of the change to "
            "first order: longer steps are shortened. 0 for no limit, as in the paper. By default 0.03, and none in "
            "mode 'efficient'."
        },
    )
    lora_pro_moments_dtype: str = _choice(
        _DEFAULTS.moments_dtype, MOMENTS_DTYPES, "'bfloat16' halves the optimizer state of mode 'full'."
    )
    lora_pro_backend: str = _choice(
        _DEFAULTS.backend,
        BACKENDS,
        "What updates moments of the size of the weights; 'auto' is Triton on CUDA where it is installed, else torch; "
        "'compiled' is torch.compile.",
    )
    lora_pro_shard_states: bool | None = field(
        default=_DEFAULTS.shard_states,
        metadata={
            "help": "Whether the ranks of a distributed run share moments and steps out among themselves (the default) "
            "or each repeats all of them (false)."
        },
    )
    lora_pro_master_factors: bool = field(
        default=_DEFAULTS.master_factors,
        metadata={
            "help": "Step factors in bfloat16 or float16 in float32 copies, so that small steps are not rounded away; "
            "4 bytes for each element of a factor."
        },
    )
    lora_pro_check_memory: bool = field(
        default=True,
        metadata={"help": "Refuse a mode whose optimizer state cannot fit into the memory that is left."},
    )
    lora_pro_log_gap: int = field(
        default=0,
        metadata={
            "help": "Every how many steps to measure the gap between the gradients of LoRA, of LoRA-Pro and of full "
            "fine-tuning; 0 for never. `lorapro plot` draws it."
        },
    )
    lora_pro_gap_layers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers whose gap is measured: names, last parts of names, or patterns with *. By default all."
        },
    )
    lora_pro_gap_max_bytes: int | None = field(
        default=None,
        metadata={
            "help": "How many bytes the gradients of the layers measured at a time may take; layers that do not fit "
            "together take turns. By default 1 GiB."
        },
    )

    def __post_init__(self) -> None:
        for name in ("lora_pro", "lora_pro_master_factors", "lora_pro_check_memory"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false (in YAML without quotes).")
        check_choice("lora_pro_mode", self.lora_pro_mode, MODES)
        check_choice("lora_pro_x_mode", self.lora_pro_x_mode, X_MODES)
        check_choice("lora_pro_update", self.lora_pro_update, UPDATES)
        check_choice("lora_pro_moments_dtype", self.lora_pro_moments_dtype, MOMENTS_DTYPES)
        check_choice("lora_pro_backend", self.lora_pro_backend, BACKENDS)
        if type(self.lora_pro_log_gap) is not int or self.lora_pro_log_gap < 0:
            raise ValueError(
                f"lora_pro_log_gap={self.lora_pro_log_gap!r} must be a whole number of steps, or 0 for no measurement."
            )
        for name in ("lora_pro_gap_layers", "lora_pro_gap_max_bytes"):
            if getattr(self, name) is not None and not self.lora_pro_log_gap:
                raise ValueError(f"{name} would be ignored: set lora_pro_log_gap to a number of steps, too.")
        check_gap_layers(self.lora_pro_gap_layers, _GAP)
        if self.lora_pro_gap_max_bytes is not None:
            check_gap_max_bytes(self.lora_pro_gap_max_bytes, _GAP)
        if self.lora_pro_rtol is not None:
            self.lora_pro_rtol = self._number("rtol", self.lora_pro_rtol)
        if self.lora_pro_trust_region is not None:
            self.lora_pro_trust_region = self._number("trust_region", self.lora_pro_trust_region)
        rule_of(self.lora_pro_config)  # validates the rest
        super().__post_init__()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As the parent; warns if a trainer asks that trains without LoRA-Pro, although `lora_pro` is on."""
        # arguments are not told of a training, but every Trainer asks this once it has its optimizer
        trainer = sys._getframe(1).f_locals.get("self")
        if self.lora_pro and isinstance(trainer, Trainer) and _trains_without(trainer):
            logger.warning(
                "LoRAProTrainingArguments(lora_pro=True), but this %s trains without LoRA-Pro, since it does not read "
                "them. Use LoRAProTrainer, for other trainers LoRAProTrainerMixin, LoRAProOptimizerFactory or "
                "LoRAProCallback; or set lora_pro=False (--no_lora_pro).",
                type(trainer).__name__,
            )
        return super().get_warmup_steps(num_training_steps)

    @staticmethod
    def _number(name: str, value: Any) -> float:
        try:
            return float(value)  # YAML reads 1e-6, without a dot, as text
        except (TypeError, ValueError) as error:
            raise ValueError(f"lora_pro_{name}={value!r} must be a number, or be left out.") from error

    @property
    def lora_pro_config(self) -> LoRAProConfig:
        """The settings as a `LoRAProConfig`, whether or not `lora_pro` is on."""
        return LoRAProConfig(
            mode=self.lora_pro_mode,
            x_mode=self.lora_pro_x_mode,
            update=self.lora_pro_update,
            rtol=self.lora_pro_rtol,
            trust_region=self.lora_pro_trust_region,
            moments_dtype=self.lora_pro_moments_dtype,
            backend=self.lora_pro_backend,
            master_factors=self.lora_pro_master_factors,
            shard_states=self.lora_pro_shard_states,
        )


def _trains_without(trainer: Trainer) -> bool:
    """Whether a trainer that has its optimizer takes plain steps; one with the mixin refuses that by itself."""
    optimizer = unwrap_optimizer(trainer.optimizer)
    return not (
        optimizer is None  # a configuration of DeepSpeed asks too early
        or isinstance(optimizer, LoRAProAdamW)
        or any(isinstance(callback, LoRAProCallback) for callback in trainer.callback_handler.callbacks)
        or getattr(trainer, "lora_pro_config", None) is not None
        or not trainer.is_world_process_zero()
    )
