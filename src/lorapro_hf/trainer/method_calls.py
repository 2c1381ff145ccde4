"""When does a `Trainer` with LoRA-Pro call its methods, and how do they get into checkpoints and saved adapters?"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from lorapro_hf.checkpoints.agreement import check_together
from lorapro_hf.checkpoints.engines import ANEW, written_by
from lorapro_hf.checkpoints.method_states import (
    factors_of,
    load_method_file,
    require_same_methods,
    saved_methods,
    write_method_state,
)
from lorapro_hf.methods.base import LoRAMethod, require_compatible, settings_of, start
from lorapro_hf.methods.boosters import boosters_of
from lorapro_hf.methods.boosting import BoostingCallback
from lorapro_hf.methods.gradient_starts import GradientStart
from lorapro_hf.trainer.parts import TrainerPart
from lorapro_hf.utils.private_names import private

_LOGGED_BY_TRL = ("_metrics", "_stored_metrics", "_total_train_tokens")  # compute_loss adds to these

logger = logging.getLogger(__name__)


class MethodsMixin(TrainerPart):
    """Calls each `LoRAMethod` among the callbacks, also while LoRA-Pro is off.

    The methods themselves hook into the optimizer's steps, see `LoRAMethod.on_train_begin`.
    """

    _forward_contexts: contextlib.ExitStack | None = None
    _methods_begun = False
    _methods_resume = False
    _methods_load = False

    @property
    def _exports(self) -> bool:
        return any(type(method).export is not LoRAMethod.export for method in self.lora_methods)

    def _lead_methods(self) -> None:
        """Take over the calls that methods would otherwise make as callbacks; refuse what cannot be combined."""
        methods, self._methods_begun = self.lora_methods, False
        self._methods_resume = self._methods_load = False
        is_boosted = any(boosters_of(layer) is not None for layer in self._bare_model.modules())
        if is_boosted and BoostingCallback.name not in (method.name for method in methods):
            raise ValueError(
                "the model has boosters from an earlier training by XGBLoRA, with which a checkpoint of this one could "
                "not be loaded. Set booster_steps (or give BoostingCallback) again; or save the model, and train the "
                "adapter that PeftModel.from_pretrained(base, folder, is_trainable=True) loads."
            )
        config = {} if self.lora_pro_config is None else self.lora_pro_config.to_dict()
        require_compatible(methods, settings_of(self.args, self._bare_model, **config))
        for method in methods:
            method._is_led = True

    def _examine_methods(self, folder: Path) -> None:
        """Refuse a checkpoint of a training with other methods; else prepare this training's, without data."""
        is_whole = bool(written_by(folder))
        names = {method.name for method in self.lora_methods if method.has_state}

        def check() -> None:
            if not self.args.should_save:  # as when it was written: other ranks may not see all files
                return
            require_same_methods(folder, names, is_whole)
            if self._exports and not saved_methods(folder):
                raise ValueError(
                    f"cannot resume from {folder}: it holds the exported adapter without the factors that were trained "
                    f"(save_only_model=True). Instead {ANEW}."
                )

        check_together(check)
        self._methods_resume, self._methods_load = is_whole, True
        if is_whole:
            self._begin_methods()

    def _begin_methods(self, model: nn.Module | None = None) -> None:
        """Call `before_training` of each method, with data unless a checkpoint is loaded next."""
        is_replaced = model is None and self.model_init is not None  # by a new one, once the parent trains
        model = self._bare_model if model is None else model
        for method in self.lora_methods:
            # a checkpoint of weights alone replaces the weights, but starts the methods with a state anew
            is_loaded = self._methods_resume or (self._methods_load and not method.has_state)
            if isinstance(method, GradientStart) and not is_loaded:
                if not is_replaced:
                    self._begin_start(method, model)
            else:
                start([method], model, None if is_loaded else self.get_train_dataloader)
        self._methods_begun = True

    def _begin_start(self, method: GradientStart, model: nn.Module) -> None:
        """Call `before_training` with this trainer's own loss, on a model in training, and log nothing of it."""
        if private(type(self), "_prepare_inputs") is not private(Trainer, "_prepare_inputs"):
            raise ValueError(
                f"{type(self).__name__} makes its inputs while it trains, so that there is no gradient before. Leave "
                "out lora_pro_init, or call init_from_gradients(model, batches) with batches of your own."
            )
        model.train()
        if getattr(self.args, "gradient_checkpointing", False):  # the parent does so later
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(self.args.gradient_checkpointing_kwargs)
        given, method.loss_fn = method.loss_fn, method.loss_fn or self._loss_before_training
        logged = {name: copy.deepcopy(self.__dict__[name]) for name in _LOGGED_BY_TRL if name in self.__dict__}
        try:
            start([method], model, self.get_train_dataloader)
        finally:
            method.loss_fn = given
            self.__dict__.update(logged)

    def _loss_before_training(self, model: nn.Module, batch: Any) -> Tensor:
        # in fp16 small gradients would need a scaler
        with self.accelerator.autocast() if self.args.bf16 else contextlib.nullcontext():
            loss: Tensor = self.compute_loss(model, private(self, "_prepare_inputs")(batch))
        return loss

    def _release_methods(self) -> None:
        for method in self.lora_methods:
            method.release()
            method._is_led = False

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent; the methods prepare a model that is made for a training."""
        model = super().call_model_init(*args, **kwargs)
        if self._methods_begun and self.is_in_train and self.lora_methods:
            self._begin_methods(model.to(self.args.device))
        return model

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent, in the `forward_context` of each method from the forward to the end of the backward pass."""
        with contextlib.ExitStack() as contexts:
            contexts.callback(setattr, self, "_forward_contexts", None)
            self._forward_contexts = contexts
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent; in a training step the contexts begin here, after a parent has generated its samples."""
        contexts, self._forward_contexts = self._forward_contexts, None  # a subclass may compute several losses
        if contexts is not None:
            for method in self.lora_methods:
                contexts.enter_context(method.forward_context())
        return super().compute_loss(*args, **kwargs)

    @contextlib.contextmanager
    def _exported(self) -> Iterator[None]:
        with contextlib.ExitStack() as exports:
            for method in self.lora_methods if self._methods_begun else ():
                exports.enter_context(method.export(self._bare_model))
            yield

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Like the parent, with the adapter that the methods export."""
        with self._exported():
            super()._save(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> Any:
        """Like the parent, of the adapter that the methods export."""
        with self._exported():
            return super().create_model_card(*args, **kwargs)

    def _save_rng_state(self, output_dir: str, *args: Any, **kwargs: Any) -> None:
        """Like the parent, with the state of each method."""
        super()._save_rng_state(output_dir, *args, **kwargs)
        states = {method.name: method.state_dict() for method in self.lora_methods if method.has_state}
        factors = factors_of(self._bare_model) if self._exports else None

        def write() -> None:
            for name, state in states.items() if self.args.should_save else ():
                write_method_state(Path(output_dir), name, state, factors)

        if states:
            check_together(write)

    def _load_methods(self, folder: Path) -> None:
        """Give each method its state of a checkpoint; a checkpoint without a state leaves the methods as they are."""
        held = saved_methods(folder)
        for method in self.lora_methods:
            if method.has_state and method.name in held:
                method.load_state_dict(load_method_file(folder, method.name, self._bare_model))

    def _load_best_model(self) -> None:
        """Like the parent, with the state of each method."""
        folder = Path(self.state.best_model_checkpoint)
        if self._exports and not saved_methods(folder):
            logger.warning(
                "%s holds the exported adapter without the factors that were trained (save_only_model=True), so that "
                "the model keeps the weights of its last step.",
                folder,
            )
            return
        super()._load_best_model()
        if self.loaded_best_checkpoint is not None:
            self._load_methods(folder)
