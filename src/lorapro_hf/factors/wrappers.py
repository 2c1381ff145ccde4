"""Which wrappers around parts of a model keep PEFT from saving its adapters?

A wrapper adds its own name to the names of the modules within. PEFT then saves the adapters in them under names that
the model without the wrapper does not have, or not at all.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lorapro_hf.utils.private_names import private

_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module"
_NAMES = {"_orig_mod": "torch.compile", _CHECKPOINT_WRAPPER: "checkpoint_wrapper", "_fsdp_wrapped_module": "FSDP1"}
_INSTEAD = (
    "gradient_checkpointing=True in the training arguments, or model.gradient_checkpointing_enable() in a loop of your "
    "own"
)


def plain_name(name: str) -> str:
    """The name of a module or parameter in the model without wrappers."""
    return ".".join(part for part in name.split(".") if part not in _NAMES)


def find_wrapper(model: nn.Module) -> tuple[str, str] | None:
    """The names of the first wrapped part of a model and of its wrapper, `None` without one."""
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last in _NAMES:
            return parent, _NAMES[last]
        if name and isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return name, type(module).__name__
    return None


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it runs as compiled code, by `torch.compile` or `module.compile()`."""
    modules = list(model.modules())
    return any("_orig_mod" in each._modules or private(each, "_compiled_call_impl") is not None for each in modules)


def require_plain_modules(model: nn.Module) -> None:
    """Raise a `ValueError` if a part of a model is wrapped, so that PEFT would save an adapter that nobody can load."""
    name, wrapper = find_wrapper(model) or ("", "")
    if wrapper == "torch.compile":
        raise ValueError(
            "the model or a part of it is wrapped by torch.compile, of which transformers saves an adapter that nobody "
            "can load. Give the trainer the model itself, and torch_compile=True to its arguments, or compile parts in "
            "place: layer.compile()."
        )
    if wrapper:
        raise ValueError(
            f"{name or 'the model'} is wrapped by {wrapper}, under whose names PEFT saves an adapter that nobody can "
            f"load. Take the wrapper off; for activation checkpointing use {_INSTEAD}."
        )


def require_plain_name(name: str) -> None:
    """Raise a `ValueError` if the name of a layer shows that it is inside torch's `checkpoint_wrapper`."""
    if _CHECKPOINT_WRAPPER in name.split("."):
        raise ValueError(
            f"{plain_name(name)} is inside torch's checkpoint_wrapper, under whose names PEFT does not find the "
            f"adapter, so that every saved file would lack it. Take the wrapper off and use {_INSTEAD}."
        )


def require_no_checkpoint_wrapper(plugin: Any) -> None:
    """Raise a `RuntimeError` if accelerate's FSDP plugin wraps the layers for activation checkpointing."""
    if getattr(plugin, "activation_checkpointing", False):
        raise RuntimeError(
            "FSDP's activation checkpointing (fsdp_activation_checkpointing: true, or activation_checkpointing in "
            "fsdp_config) wraps the layers in modules under whose names PEFT does not find the adapter, so that every "
            f"saved file would lack it. Set it to false and use {_INSTEAD}."
        )


def plugin_in_use(name: str) -> Any:
    """The `fsdp_plugin` or `deepspeed_plugin` of the `Accelerator` in this process, `None` without one."""
    state = sys.modules.get("accelerate.state")  # an Accelerator has imported it
    return getattr(state.AcceleratorState(), name, None) if state is not None and state.is_initialized() else None
