"""How does a user set LoRA-Pro on the command line or in a YAML file?"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Trainer, TrainingArguments

from lorapro_hf.config import LoRAProConfig, check_choice
from lorapro_hf.diagnostics.settings import check_gap_layers, check_gap_max_bytes
from lorapro_hf.methods.beamlora import check_every
from lorapro_hf.methods.boosting import check_steps_per_booster
from lorapro_hf.methods.flat_lora import check_sizes
from lorapro_hf.methods.gradient_starts import SAMPLES, SPECTRAL_NORM, STARTS, check_samples, check_step_size
from lorapro_hf.methods.lora_sb import FIXED, PLAIN_ADAMW
from lorapro_hf.methods.mgpo import BETA, check_beta, check_rho
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.trainer.callback import LoRAProCallback

_GAP = "lora_pro_gap_"
_SETTINGS = {setting.name: setting for setting in fields(LoRAProConfig)}

logger = logging.getLogger(__name__)


def _setting(name: str) -> Any:
    """A field with the default, help and choices that `LoRAProConfig` states."""
    stated = _SETTINGS[name]
    told = {key: value for key, value in stated.metadata.items() if key in ("help", "choices")}  # argparse knows these
    return field(default=stated.default, metadata=told)


@dataclass
class LoRAProTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of LoRA-Pro, for `HfArgumentParser`, JSON and YAML files.

    `LoRAProTrainer` and classes with `LoRAProTrainerMixin` read the settings. A plain `Trainer` ignores them and warns
    when it starts to train, unless it has a `LoRAProAdamW`, its factory or a `LoRAProCallback`. The other arguments
    keep their meaning: `learning_rate`, `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay` are those of the
    LoRA-Pro optimizer, and `optim` must stay at its default.

    To add the settings to the arguments of another trainer, name that trainer's class first, so that its defaults win:

    ```python
    @dataclass
    class LoRAProSFTConfig(SFTConfig, LoRAProTrainingArguments):
        pass
    ```

    `lora_pro_mode`, `lora_pro_rtol` and the like are the settings of `LoRAProConfig`; the help of each field describes
    the others.

    Raises:
        ValueError: for an unknown choice, a combination that has no meaning, or an rtol or a trust region outside
            `[0, 1)`.
    """

    lora_pro: bool = field(
        default=True,
        metadata={"help": "Train with LoRA-Pro; --no_lora_pro trains exactly as transformers.Trainer does."},
    )
    lora_pro_mode: str = _setting("mode")
    lora_pro_x_mode: str = _setting("x_mode")
    lora_pro_update: str | None = _setting("update")
    lora_pro_rtol: float | None = _setting("rtol")
    lora_pro_trust_region: float | None = _setting("trust_region")
    lora_pro_moments_dtype: str = _setting("moments_dtype")
    lora_pro_backend: str = _setting("backend")
    lora_pro_shard_states: bool | None = _setting("shard_states")
    lora_pro_master_factors: bool = _setting("master_factors")
    lora_pro_spectral_iterations: int = _setting("spectral_iterations")
    lora_pro_efficient_projected: bool | None = _setting("efficient_projected")
    lora_pro_rite_clip: float = _setting("rite_clip")
    lora_pro_rite_skip: float = _setting("rite_skip")
    lora_pro_rite_escape: bool = _setting("rite_escape")
    lora_pro_check_memory: bool = field(
        default=True,
        metadata={"help": "Refuse a mode whose optimizer state does not fit into the free memory."},
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

    lora_pro_init: str | None = field(
        default=None,
        metadata={
            "help": "Write the factors of a new training from the gradients of its first samples: by LoRA-One, or by "
            "the signs that LoRA-SB takes. Also while LoRA-Pro is off. lora_sb_fixed is LoRA-SB itself, which then "
            "trains a matrix between the fixed factors, and needs --no_lora_pro.",
            "choices": [*STARTS, FIXED],
        },
    )
    lora_pro_init_samples: int | None = field(
        default=None,
        metadata={"help": f"How many samples, of all processes together. By default {SAMPLES}."},
    )
    lora_pro_init_step_size: float | None = field(
        default=None,
        metadata={
            "help": "Spectral norm of the first change of each weight (lora_one), or change of each element (others). "
            f"By default the spectral norm is {SPECTRAL_NORM}."
        },
    )
    beamlora_every: int | None = field(
        default=None,
        metadata={
            "help": "After how many steps, an even number, the least important slots of the adapter become copies of "
            "more important ones (BeamLoRA). By default never. Also while LoRA-Pro is off."
        },
    )
    booster_steps: int | None = field(
        default=None,
        metadata={
            "help": "XGBLoRA: after how many optimizer steps the factors become a frozen booster and fresh ones begin. "
            "Needs an adapter of rank 1. By default never. Also while LoRA-Pro is off."
        },
    )

    flat_lora_sigma: float | None = field(
        default=None,
        metadata={
            "help": "Train under noise on the adapted weights, of this size relative to their rows (Flat-LoRA). Also "
            "while LoRA-Pro is off. By default without noise."
        },
    )
    flat_lora_beta: float | None = field(
        default=None,
        metadata={
            "help": "How much the gradients of the step before add to the squared size of flat_lora_sigma (GGPO). By "
            "default 0."
        },
    )
    mgpo_rho: float | None = field(
        default=None,
        metadata={
            "help": "Take gradients at weights that lie off by this length along the momentum (LoRA-MGPO). Also while "
            "LoRA-Pro is off. By default at the weights themselves."
        },
    )
    mgpo_beta: float | None = field(
        default=None,
        metadata={
            "help": f"Decay of the average norm of the gradients that mgpo_rho is divided by. By default {BETA}."
        },
    )

    fuse_lora: bool = field(
        default=False,
        metadata={
            "help": "Compute each linear LoRA layer and its weight as one, in the cheapest order of products and with "
            "less memory (RunLoRA). Also while LoRA-Pro is off."
        },
    )

    def __post_init__(self) -> None:
        switches = ("", "_master_factors", "_rite_escape", "_check_memory")
        for name in (*(f"lora_pro{switch}" for switch in switches), "fuse_lora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false (in YAML without quotes).")
        for name, setting in _SETTINGS.items():
            value = getattr(self, f"lora_pro_{name}")
            if "choices" in setting.metadata and value is not setting.default:
                check_choice(f"lora_pro_{name}", value, setting.metadata["choices"])
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
        numbers = ("rtol", "trust_region", "rite_clip", "rite_skip", "init_step_size")
        of_methods = ("flat_lora_sigma", "flat_lora_beta", "mgpo_rho", "mgpo_beta")
        for name in (*(f"lora_pro_{number}" for number in numbers), *of_methods):
            if (value := getattr(self, name)) is not None:
                try:
                    if isinstance(value, bool):
                        raise TypeError
                    setattr(self, name, float(value))  # YAML reads 1e-6, without a dot, as text
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name}={value!r} must be a number, or be left out.") from error
        self._check_start()
        self._check_flat_lora()
        self._check_mgpo()
        if self.beamlora_every is not None:
            check_every(self.beamlora_every, "beamlora_every")
        if self.booster_steps is not None:
            check_steps_per_booster(self.booster_steps, "booster_steps")
        config = self.lora_pro_config
        rule_of(config)  # validates the rest
        if self.lora_pro:  # before DeepSpeed's configuration takes the limit over
            settle_max_grad_norm(self, config)
        try:
            super().__post_init__()
        except ValueError as error:
            if "support bf16" not in str(error):
                raise
            raise ValueError(
                "bf16=True needs a GPU that computes in bfloat16, and this machine has none. Set use_cpu=True "
                "(--use_cpu) to train on the CPU, or bf16=False (--bf16 false)."
            ) from error

    def _check_start(self) -> None:
        if self.lora_pro_init is not None:
            check_choice("lora_pro_init", self.lora_pro_init, (*STARTS, FIXED))
        if self.lora_pro_init == FIXED and self.lora_pro:
            raise ValueError(f"lora_pro_init={FIXED!r}: {PLAIN_ADAMW}")
        for name, check in (("lora_pro_init_samples", check_samples), ("lora_pro_init_step_size", check_step_size)):
            if (value := getattr(self, name)) is not None:
                if self.lora_pro_init is None:
                    raise ValueError(
                        f"{name} would be ignored: set lora_pro_init to {', '.join(STARTS)} or {FIXED}, too."
                    )
                check(value, name)

    def _check_flat_lora(self) -> None:
        if self.flat_lora_sigma is None and self.flat_lora_beta is not None:
            raise ValueError("flat_lora_beta would be ignored: set flat_lora_sigma, too.")
        check_sizes(self.flat_lora_sigma or 0.0, self.flat_lora_beta or 0.0, "flat_lora_")

    def _check_mgpo(self) -> None:
        if self.mgpo_rho is not None:
            check_rho(self.mgpo_rho, "mgpo_rho")
        elif self.mgpo_beta is not None:
            raise ValueError("mgpo_beta would be ignored: set mgpo_rho, too.")
        if self.mgpo_beta is not None:
            check_beta(self.mgpo_beta, "mgpo_beta")

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Like the parent, but tell of settings that the trainer which calls it does not read.

        Raises:
            ValueError: a method is set, and the trainer would not use it.
        """
        # no hook tells arguments of a training, but every Trainer calls this once it has its optimizer
        trainer = sys._getframe(1).f_locals.get("self")
        remedies = {
            "lora_pro_init": "call init_from_gradients or add_lora_sb before the trainer",
            "flat_lora_sigma": "give callbacks=[FlatLoRACallback(...)]",
            "mgpo_rho": f"give callbacks=[MGPOCallback({self.mgpo_rho})]",
            "beamlora_every": f"give callbacks=[BeamLoRACallback({self.beamlora_every})]",
            "booster_steps": f"give callbacks=[BoostingCallback({self.booster_steps})]",
            "fuse_lora": "call fuse_lora_layers(model) before the trainer",
        }
        if isinstance(trainer, Trainer) and not hasattr(trainer, "lora_pro_config"):
            for name, remedy in remedies.items():
                if (value := getattr(self, name)) not in (None, False):
                    raise ValueError(
                        f"{type(trainer).__name__} does not read {name}={value!r}. Use LoRAProTrainer or "
                        f"LoRAProTrainerMixin, or leave it out and {remedy}."
                    )
        if self.lora_pro and isinstance(trainer, Trainer) and _trains_without(trainer):
            logger.warning(
                "LoRAProTrainingArguments(lora_pro=True), but this %s trains without LoRA-Pro, since it does not read "
                "them. Use LoRAProTrainer, for other trainers LoRAProTrainerMixin, LoRAProOptimizerFactory or "
                "LoRAProCallback; or set lora_pro=False (--no_lora_pro).",
                type(trainer).__name__,
            )
        return super().get_warmup_steps(num_training_steps)

    @property
    def lora_pro_config(self) -> LoRAProConfig:
        """The settings as a `LoRAProConfig`, whether or not `lora_pro` is on."""
        return LoRAProConfig(**{name: getattr(self, f"lora_pro_{name}") for name in _SETTINGS})


def settle_max_grad_norm(args: TrainingArguments, config: LoRAProConfig) -> None:
    """Set the default of `max_grad_norm` to 0 in a mode that raw gradients must reach unclipped.

    Raises:
        ValueError: `max_grad_norm` was set to another limit.
    """
    if rule_of(config).takes_clipped_gradients or not args.max_grad_norm:
        return
    if args.max_grad_norm != type(args).max_grad_norm:  # not the default of its class
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm:g} clips the raw gradients of the factors, after which a step of mode "
            f"{config.mode!r} depends on how B A is split. Set max_grad_norm=0: the mode has limits of its own."
        )
    if os.environ.get("RANK", "0") == "0":  # one of several processes tells
        logger.warning(
            "max_grad_norm is 0 instead of its default %g, since mode %r has limits of its own.",
            args.max_grad_norm,
            config.mode,
        )
    args.max_grad_norm = 0.0


def _trains_without(trainer: Trainer) -> bool:
    """Whether a trainer with an optimizer takes plain steps; a trainer with the mixin refuses that by itself."""
    optimizer = unwrap_optimizer(trainer.optimizer)
    return not (
        optimizer is None  # a configuration of DeepSpeed asks too early
        or isinstance(optimizer, LoRAProAdamW)
        or any(isinstance(callback, LoRAProCallback) for callback in trainer.callback_handler.callbacks)
        or getattr(trainer, "lora_pro_config", None) is not None
        or not trainer.is_world_process_zero()
    )
