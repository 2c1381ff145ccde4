"""Which wrappers around parts of a model keep PEFT from saving its adapters?

A wrapper adds its own name to the names of the modules within. PEFT finds adapters by the names of modules: it saves
them under names that the model without the wrapper does not have, or not at all.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

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


def require_plain_modules(model: nn.Module) -> None:
    """Raise if a part of a model is wrapped, because PEFT would save an adapter that cannot be loaded.

    Raises:
        ValueError: the message names the part and the wrapper.
    """
    found = find_wrapper(model)
    if found is not None and found[1] == "torch.compile":
        raise ValueError(
            "the model or a part of it is wrapped by torch.compile, of which transformers saves an adapter that nobody "
            "can load. Give the trainer the model itself, and torch_compile=True to its arguments, or compile parts in "
            "place: layer.compile()."
        )
    if found is not None:
        raise ValueError(
            f"{found[0] or 'the model'} is wrapped by {found[1]}, under whose names PEFT saves an adapter that nobody "
            f"can load. Take the wrapper off; for activation checkpointing use {_INSTEAD}."
        )


def require_plain_name(name: str) -> None:
    """Raise a `ValueError` if the name of a layer shows that it is inside torch's `checkpoint_wrapper`."""
    if _CHECKPOINT_WRAPPER in name.split("."):
        raise ValueError(
            f"{plain_name(name)} is inside torch's checkpoint_wrapper, under whose names PEFT does not find the "
            f"adapter, so that every saved file would lack it. Take the wrapper off and use {_INSTEAD}."
        )


def require_no_checkpoint_wrapper(plugin: Any) -> None:
    """Raise if accelerate's FSDP plugin wraps the layers for activation checkpointing.

    Args:
        plugin: the `FullyShardedDataParallelPlugin`; `None` without FSDP.

    Raises:
        RuntimeError: `activation_checkpointing` is on.
    """
    if getattr(plugin, "activation_checkpointing", False):
        raise RuntimeError(
            "FSDP's activation checkpointing (fsdp_activation_checkpointing: true, or activation_checkpointing in "
            "fsdp_config) wraps the layers in modules under whose names PEFT does not find the adapter, so that every "
            f"saved file would lack it. Set it to false and use {_INSTEAD}."
        )


def fsdp_plugin_in_use() -> Any:
    """The FSDP plugin of the `Accelerator` in this process, `None` without one."""
    accelerate = sys.modules.get("accelerate.state")  # an Accelerator has imported it
    if accelerate is None or not accelerate.is_initialized():
        return None
    return getattr(accelerate.AcceleratorState(), "fsdp_plugin", None)
