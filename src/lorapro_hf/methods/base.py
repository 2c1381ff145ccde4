"""When does a method act on a LoRA training, and how does any `Trainer` or loop call it?"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer

_ENGINES = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class LoRAMethod(TrainerCallback):
    """A method that acts on a LoRA training: before it, in forward passes, around steps, or on the saved adapter.

    A subclass sets `name` and overrides the calls that it needs; each does nothing by default. A method is a callback
    of any `Trainer`:

    ```python
    trainer = LoRAProTrainer(model, args, train_dataset=data, callbacks=[Method()])
    ```

    `LoRAProTrainer` (also with `lora_pro=False`) and each class with `LoRAProTrainerMixin` save the method's state in
    checkpoints, resume from it to the bit, and save the adapter that `export` gives. A plain `Trainer` makes the other
    calls, but cannot resume a method that has a state, and leaves `forward_context` open when an exception ends its
    training: call `method.release()` then. A loop of your own makes the calls itself:

    ```python
    method.before_training(model, batches)  # before the optimizer is built
    optimizer = create_lorapro_optimizer(model, lr=2e-4)
    for step, batch in enumerate(loader, start=1):
        with method.forward_context():
            model(**batch).loss.backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer, step)
        optimizer.zero_grad()
    with method.export(model):
        model.save_pretrained("adapter")
    ```

    Under DDP each rank makes all calls, and the state must be the same on each. DeepSpeed and FSDP are refused.
    """

    name: ClassVar[str]
    """A short name in lower case: of the file in checkpoints, and for the `conflicts` of other methods."""
    conflicts: ClassVar[Mapping[str, str]] = {}
    """The methods (`"mgpo"`) and settings (`"mode=full"`, `"use_dora=True"`) that this one cannot be combined with.

    The value is a sentence with the reason and the remedy. Settings are the fields of `LoRAProConfig`, of the training
    arguments and of the adapter's `LoraConfig`."""
    has_state: ClassVar[bool] = True
    """Whether a training resumes only with `state_dict`. False for a method such as a faster forward pass: checkpoints
    with and without it resume alike."""
    without_engine: ClassVar[str] = "Train on one process or with DDP, or leave out the method."
    """What to do instead of using the method under DeepSpeed or FSDP, for the refusal."""

    _is_led = False  # a trainer calls before_training and forward_context
    _hooks: Sequence[Any] = ()
    _window: contextlib.ExitStack | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "name", None), str):
            raise TypeError(f"{cls.__name__} has no name: set `name`, a short word in lower case, in its class body.")

    def before_training(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """Prepare the model and this method, before the optimizer is built.

        A trainer restores the random state after the call. A plain `Trainer` calls it after the optimizer is built.

        Args:
            model: the model with its adapter, unwrapped.
            batches: batches of the training data on the model's device, for `model(**batch)`. `None` where the training
                goes on from a checkpoint: values follow, by the checkpoint and `load_state_dict`.
        """

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        """A context around the forward and backward pass of each micro-batch.

        A plain `Trainer` enters it once for all micro-batches of a step.
        """
        return contextlib.nullcontext()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before each step that reaches the optimizer, with gradients that are whole, unscaled and clipped.

        A step that a `GradScaler` leaves out does not reach it.
        """

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Called after each step that reached the optimizer; `found_inf` tells whether the optimizer left it out.

        `optimizer` is out of accelerate's wrapper; `step` counts the steps of the training from 1 on.
        """

    def state_dict(self) -> dict[str, Any]:
        """The state from which a training goes on to the bit: tensors and plain values, in lists and dictionaries.

        All ranks call it; that of the first rank is saved.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a state from `state_dict`; its tensors lie on the CPU."""

    def export(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """A context in which the model's adapter is a plain LoRA adapter with the same outputs, to be saved.

        The context gives the trained factors back when it ends. A trainer keeps them in checkpoints.
        """
        return contextlib.nullcontext()

    def described(self) -> dict[str, str]:
        """The method's settings for the model card: its name in words, and their values."""
        return {}

    # ---- the calls of a Trainer ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the optimizer call `before_step` and `after_step`; begin, unless the trainer has done so."""
        self.release()
        if not self._is_led:
            self._begin_alone(args, state, kwargs["model"], kwargs["train_dataloader"])

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self.before_step(optimizer)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self.after_step(optimizer, state.global_step + 1)

        optimizer = unwrap_optimizer(kwargs["optimizer"])
        self._hooks = (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Enter `forward_context`, unless the trainer does."""
        self._close_window()
        if not self._is_led:
            self._window = contextlib.ExitStack()
            self._window.enter_context(self.forward_context())

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Leave `forward_context`."""
        self._close_window()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave `forward_context` where the data ended within a step."""
        self._close_window()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the optimizer and the model alone from now on."""
        self.release()

    def release(self) -> None:
        """Take the hooks off the optimizer and leave `forward_context`; for a training that ended with an exception."""
        self._close_window()
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def _close_window(self) -> None:
        window, self._window = self._window, None
        if window is not None:
            window.close()

    def _begin_alone(self, args: TrainingArguments, state: TrainerState, model: nn.Module, loader: Any) -> None:
        # every callback is handed the same state, which is new in every training
        others: list[LoRAMethod] = vars(state).setdefault("_lora_methods", [])
        others.append(self)
        require_compatible(others, settings_of(args, model))
        if state.global_step and self.has_state:
            raise ValueError(
                f"the training goes on from step {state.global_step}, but a plain Trainer does not load the state of "
                f"the method {self.name!r}. Use LoRAProTrainer, which does so with lora_pro=False as well."
            )
        start([self], model, None if state.global_step else lambda: loader)


def found_inf(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """A tensor of one element, not 0 if the optimizer left out its last step because a gradient was not finite.

    For `after_step`. A use in `torch.where` does not wait for the device. `None` from an optimizer that takes every
    step.
    """
    optimizer = unwrap_optimizer(optimizer)
    if isinstance(optimizer, LoRAProAdamW):
        return optimizer._found_inf
    return getattr(optimizer, "found_inf", None)  # a GradScaler lets fused optimizers decide


def require_compatible(methods: Sequence[LoRAMethod], settings: Mapping[str, Any]) -> None:
    """Raise if methods cannot be combined with each other, with the settings or with the engine.

    Args:
        methods: the methods of one training.
        settings: by name, such as those of `settings_of`.

    Raises:
        ValueError: the message names both and the remedy.
        RuntimeError: DeepSpeed or FSDP runs.
    """
    names = [method.name for method in methods]
    stated = {f"{name}={value}" for name, value in settings.items()}
    for method in methods:
        if names.count(method.name) > 1:
            raise ValueError(f"the method {method.name!r} was given twice. Keep one of them.")
        for other, remedy in method.conflicts.items():
            if other in names or other in stated:
                raise ValueError(f"the method {method.name!r} cannot be combined with {other}: {remedy}")
    if methods and is_initialized() and AcceleratorState().distributed_type in _ENGINES:
        raise RuntimeError(
            f"the method {names[0]!r} cannot work under {AcceleratorState().distributed_type.value}, which keeps "
            f"parameters or gradients to itself. {methods[0].without_engine}"
        )


def require_same_settings(title: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless a method, named in words, has the settings that its checkpoint was written with."""
    for name, value in own.items():
        if saved[name] != value:
            raise ValueError(
                f"the checkpoint was written with {title}'s {name}={saved[name]!r}, but this training has {value!r}. "
                f"Resume with {name}={saved[name]!r}."
            )


def settings_of(args: TrainingArguments, model: nn.Module, **more: Any) -> dict[str, Any]:
    """The settings that `conflicts` may name: of the arguments, of the active adapter, and `more`."""
    configs = getattr(model, "peft_config", {})
    adapter = configs.get(getattr(model, "active_adapter", None)) if isinstance(configs, Mapping) else None
    settings = {**vars(args), **(vars(adapter) if adapter is not None else {}), **more}
    plugin = getattr(AcceleratorState(), "dynamo_plugin", None) if is_initialized() else None
    if plugin is not None and plugin.backend != DynamoBackend.NO:  # by accelerate launch --dynamo_backend
        settings["torch_compile"] = True
    return settings


def start(methods: Sequence[LoRAMethod], model: nn.Module, make_loader: Callable[[], Any] | None) -> None:
    """Call `before_training` and restore the random state, so that the training sees its data in its order.

    `make_loader` returns batches on the model's device; it is `None` where a checkpoint is loaded next.
    """
    devices = [device for device in {p.device for p in model.parameters()} if device.type == "cuda"]
    for method in methods:
        batches = None if make_loader is None else _iterate(make_loader)
        numbers, of_numpy = random.getstate(), numpy.random.get_state()
        try:
            with torch.random.fork_rng(devices):  # by default it forks all devices, with a warning
                method.before_training(model, batches)
        finally:
            random.setstate(numbers)
            numpy.random.set_state(of_numpy)
            if batches is not None:
                batches.close()


def _iterate(make_loader: Callable[[], Any]) -> Generator[Any, None, None]:
    loader = make_loader()
    try:
        yield from loader
    finally:  # accelerate takes the loader for the one in use until the data end
        if hasattr(loader, "end"):
            loader.end()
