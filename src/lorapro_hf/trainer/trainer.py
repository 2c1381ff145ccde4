"""How does a `Trainer` train with LoRA-Pro?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import optim
from transformers import Trainer, TrainingArguments

from lorapro_hf.checkpoints.adapters import require_savable
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.deepspeed.engine import attach_deepspeed
from lorapro_hf.diagnostics.callback import GradientGapCallback
from lorapro_hf.diagnostics.settings import GAP_MAX_BYTES
from lorapro_hf.distributed.engines import require_configuration, settle_clipping
from lorapro_hf.factors.pairs import find_lora_pairs
from lorapro_hf.methods.beamlora import BeamLoRACallback
from lorapro_hf.methods.boosting import BoostingCallback
from lorapro_hf.methods.flat_lora import FlatLoRACallback
from lorapro_hf.methods.fused_layers import FusedLoRA
from lorapro_hf.methods.gradient_starts import SAMPLES, GradientStart
from lorapro_hf.methods.lora_sb import FIXED, LoRASB, lora_sb_layers
from lorapro_hf.methods.mgpo import BETA, MGPOCallback
from lorapro_hf.optim.groups import require_same_pairs
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.optim.memory import readable_bytes
from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
from lorapro_hf.trainer.checkpointing import CheckpointMixin
from lorapro_hf.trainer.hub_mixin import HubMixin
from lorapro_hf.trainer.parents import handed, replaced, require_adapter
from lorapro_hf.trainer.saving import SavingMixin
from lorapro_hf.trainer.settings import TURN_OFF, build_optimizer, resolve_config

logger = logging.getLogger(__name__)


def _make_visible(package: logging.Logger, args: TrainingArguments) -> None:
    """Show the line at the start, without which the plug-in would look inactive; keep the user's level and handlers."""
    if args.log_level in ("warning", "error", "critical"):
        return
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())


class LoRAProTrainerMixin(CheckpointMixin, HubMixin, SavingMixin):
    """Makes any `Trainer` class train with LoRA-Pro; the trainer's class comes second.

    ```python
    class LoRAProSFTTrainer(LoRAProTrainerMixin, SFTTrainer):
        pass
    ```

    The optimizer is a `LoRAProAdamW` with the learning rate, betas, epsilon and weight decay of the arguments, and with
    `Trainer`'s rule for which parameters decay. Everything else is the parent's: schedulers, accumulation, mixed
    precision, checkpoints. Saved adapters are ordinary PEFT adapters, with a `lorapro_config.json` beside them, and
    `create_model_card` and `push_to_hub` write a model card. With `lora_pro=False` in `LoRAProTrainingArguments` the
    class is exactly the parent. A `LoRAMethod` goes into `callbacks`, also with `lora_pro=False`.

    `max_grad_norm` acts on the raw gradients of the factors, before the projection. In full mode Adam's normalisation
    removes most of a uniform scale, so clipping mostly limits the weight of a step in the moments. In efficient mode
    the projection keeps the scale, and Adam normalises it as for plain LoRA.

    Training logs get `lora_pro_grad_norm`, the norm of the last step's equivalent gradient of all adapted weights, and
    `lora_pro_skipped_steps`, the number of steps that the optimizer skipped because of gradients that are not finite.
    Under fp16 the gradient scaler skips such steps before they reach the optimizer.

    Args:
        *args: Passed on to the parent.
        lora_pro_config: The settings when the arguments are not `LoRAProTrainingArguments`, also as a dictionary. By
            default the settings of the given optimizer, or else `LoRAProConfig()`.
        **kwargs: Passed on to the parent.

    Raises:
        ValueError: if the model has no trainable LoRA pair, or if settings contradict each other: `lora_pro_config`
            beside `LoRAProTrainingArguments`, another `optim`, `optim_args`, another optimizer or factory, a
            `LoRAProCallback`.
        RuntimeError: under FSDP1, Megatron-LM or unsupported settings of DeepSpeed, see `attach_deepspeed`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(LoRAProTrainerMixin):
            raise TypeError(
                f"class {cls.__name__}: LoRAProTrainerMixin must come before the trainer, or its optimizer is never "
                f"used: class {cls.__name__}(LoRAProTrainerMixin, ...)."
            )

    _lora_pro_announced = False
    _lora_pro_logs_together = False
    _lora_pro_first_step: int | None = None

    def __init__(
        self, *args: Any, lora_pro_config: LoRAProConfig | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        # before the parent's __init__, in which some trainers build their optimizer
        self._given_lora_pro_config = None if lora_pro_config is None else LoRAProConfig.of(lora_pro_config)
        given = handed(type(self), LoRAProTrainerMixin, "__init__", args, kwargs)
        if getattr(given.get("args"), "lora_pro", True):
            require_adapter(type(self), LoRAProTrainerMixin, given, TURN_OFF)
        super().__init__(*args, **kwargs)
        # only now: some trainers build the PEFT model in their __init__
        self._resolve_lora_pro()
        if isinstance(self.args, LoRAProTrainingArguments) and self.args.lora_pro_log_gap:
            GradientGapCallback(
                self.args.lora_pro_log_gap,
                self.args.lora_pro_gap_layers,
                self.args.lora_pro_gap_max_bytes or GAP_MAX_BYTES,
            ).attach(self)
        self._add_methods()
        if self.lora_pro_config is not None and self.train_dataset is not None:  # evaluation needs no trainable pair
            self._settle_deepspeed()
            require_savable(self.model)
            find_lora_pairs(self.model)

    def _add_methods(self) -> None:
        """Add the methods that the arguments name, and that of a model with LoRA-SB."""
        args = self.args
        if isinstance(args, LoRAProTrainingArguments) and args.beamlora_every is not None:
            beams = BeamLoRACallback(args.beamlora_every)
            beams.setting = "beamlora_every"
            self.add_callback(beams)
        if isinstance(args, LoRAProTrainingArguments) and args.booster_steps is not None:
            self.add_callback(BoostingCallback(args.booster_steps))
        if isinstance(args, LoRAProTrainingArguments) and args.flat_lora_sigma is not None:
            self.add_callback(FlatLoRACallback(args.flat_lora_sigma, args.flat_lora_beta or 0.0))
        if isinstance(args, LoRAProTrainingArguments) and args.fuse_lora:
            self.add_callback(FusedLoRA())
        if isinstance(args, LoRAProTrainingArguments) and args.mgpo_rho is not None:
            self.add_callback(MGPOCallback(args.mgpo_rho, BETA if args.mgpo_beta is None else args.mgpo_beta))
        if isinstance(args, LoRAProTrainingArguments) and args.lora_pro_init is not None:
            samples, size = args.lora_pro_init_samples or SAMPLES, args.lora_pro_init_step_size
            is_fixed = args.lora_pro_init == FIXED
            method = LoRASB(samples, size) if is_fixed else GradientStart(args.lora_pro_init, samples, size)
            method.progress = not args.disable_tqdm
            self.callback_handler.callbacks.insert(0, method)  # other methods see the factors of the start
        if lora_sb_layers(self.model) and not any(isinstance(method, LoRASB) for method in self.lora_methods):
            self.add_callback(LoRASB())

    @property
    def deepspeed(self) -> Any:
        """The DeepSpeed engine, or `None`; the parent sets it before it loads a checkpoint or takes a step."""
        return self.__dict__.get("deepspeed")

    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        self.__dict__["deepspeed"] = engine
        optimizer = unwrap_optimizer(self.__dict__.get("optimizer"))
        if engine is not None and self.lora_pro_config is not None and isinstance(optimizer, LoRAProAdamW):
            attach_deepspeed(engine, optimizer)

    def _settle_deepspeed(self) -> None:
        """Refuse an unsupported configuration of DeepSpeed before an engine is built; set its clipping."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and self.lora_pro_config is not None:
            require_configuration(plugin.deepspeed_config, self.lora_pro_config.master_factors)
            settle_clipping(plugin, self.args.max_grad_norm)

    def _resolve_lora_pro(self) -> None:
        self.lora_pro_config = None
        self.lora_pro_config = resolve_config(self, self._given_lora_pro_config)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> optim.Optimizer:
        """The optimizer of the training: a `LoRAProAdamW`, or the parent's own while LoRA-Pro is off."""
        self._resolve_lora_pro()  # again: a hyperparameter search may have changed the arguments
        if self.lora_pro_config is None:
            if self._lora_pro_optimizer is not None:
                raise ValueError(
                    "lora_pro=False, but the trainer holds a LoRAProAdamW, from optimizers= or from an earlier "
                    "training. Set trainer.optimizer = None first, or make a new trainer."
                )
            return super().create_optimizer(*args, **kwargs)
        self._settle_deepspeed()
        if not self._is_by_engine:
            require_savable(self.model)
        if self.optimizer is None:
            model = kwargs.get("model", args[0] if args else None)
            self.optimizer = build_optimizer(self, self.model if model is None else model, self.lora_pro_config)
            self._lora_pro_announced = False
        elif not self._is_by_engine:
            optimizer = unwrap_optimizer(self.optimizer)
            require_same_pairs(optimizer.pairs, optimizer.param_groups, find_lora_pairs(self.model))
        self._announce()
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.train`, but reject an incomplete or mismatched checkpoint before anything is loaded.

        `resume_from_checkpoint=True` means the newest complete checkpoint.

        Raises:
            ValueError: the checkpoint is not complete or of another training, or a method cannot be combined with
                another one or with a setting. Nothing has been loaded then.
        """
        self.loaded_best_checkpoint, self._lora_pro_first_step = None, None
        given = handed(type(self), LoRAProTrainerMixin, "train", args, kwargs)
        try:
            if given.get("resume_from_checkpoint") or self.lora_methods:
                self._resolve_lora_pro()
            self._lead_methods()
            if self.lora_methods and self.is_world_process_zero():
                _make_visible(logging.getLogger("lorapro_hf"), self.args)
            if given.get("resume_from_checkpoint"):
                checkpoint = self._examine(given["resume_from_checkpoint"])
                args, kwargs = replaced(given, args, kwargs, "resume_from_checkpoint", checkpoint)
            if not self._methods_begun:
                self._begin_methods()
            output = super().train(*args, **kwargs)
            if self._lora_pro_optimizer is not None:
                self._lora_pro_optimizer.finish_training()
            return output
        finally:  # callbacks are not called after an exception
            self._release_methods()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, GradientGapCallback):
                    callback.stop()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent, but name an adapter that was deleted meanwhile."""
        if self._lora_pro_optimizer is not None:
            _ = self._lora_pro_optimizer.pairs[0].A  # raises if the adapter is gone
        if self._lora_pro_first_step is None:
            self._lora_pro_first_step = self.state.global_step
        return super().training_step(*args, **kwargs)

    def _announce(self) -> None:
        if self._lora_pro_announced or not self._lora_pro_announces or not self.is_world_process_zero():
            return
        self._lora_pro_announced = True
        optimizer = unwrap_optimizer(self.optimizer)
        _make_visible(logging.getLogger("lorapro_hf"), self.args)
        logger.info(
            "LoRA-Pro: %d pairs, %s, optimizer state about %s",
            len(optimizer.pairs),
            optimizer.rule.description,
            readable_bytes(optimizer.estimated_state_bytes()),
        )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Like the parent, but let `log` know that all ranks take part."""
        self._lora_pro_logs_together = True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._lora_pro_logs_together = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add LoRA-Pro's metrics to the training logs, before any reporter sees them.

        A log of the training itself also looks for NaN and Inf where steps were left out, on all ranks together.
        """
        if self.lora_pro_config is not None and "loss" in logs:
            optimizer = self._lora_pro_optimizer
            if optimizer is not None:
                if optimizer.last_grad_norm is not None:
                    logs["lora_pro_grad_norm"] = float(optimizer.last_grad_norm)
                is_together = self._lora_pro_logs_together
                skipped = optimizer.checked_skipped_steps() if is_together else optimizer.skipped_steps
                logs["lora_pro_skipped_steps"] = skipped
                optimizer.first_steps.warn_if_none(self.state.global_step, self._lora_pro_first_step or 0)
            elif self.optimizer is not None:
                other = type(unwrap_optimizer(self.optimizer)).__name__
                raise RuntimeError(
                    f"LoRA-Pro is on, but the trainer steps a {other}: a create_optimizer overrides "
                    f"the mixin's. Have it call super().create_optimizer(), or {TURN_OFF}."
                )
        super().log(logs, *args, **kwargs)


class LoRAProTrainer(LoRAProTrainerMixin, Trainer):
    """`transformers.Trainer` with LoRA-Pro; see `LoRAProTrainerMixin`."""
