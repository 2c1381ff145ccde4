"""Which engines of accelerate are refused?"""

from __future__ import annotations

from typing import Any

from lorapro_hf.factors.wrappers import require_no_checkpoint_wrapper


def require_supported_engine(state: Any, remedy: str) -> None:
    """Raise if accelerate runs an engine that LoRA-Pro does not support.

    Args:
        state: an `Accelerator` or an `AcceleratorState`.
        remedy: an alternative, which follows "or" in the message.

    Raises:
        RuntimeError: the engine is Megatron-LM or FSDP1, or wraps layers for activation checkpointing.
    """
    name = getattr(state.distributed_type, "value", state.distributed_type)
    if name == "MEGATRON_LM":
        raise RuntimeError(
            f"LoRA-Pro does not support accelerate's distributed type {name}, which replaces the optimizer. Use DDP, "
            f"FSDP2 or DeepSpeed, or {remedy}."
        )
    plugin = getattr(state, "fsdp_plugin", None) or getattr(getattr(state, "state", None), "fsdp_plugin", None)
    if name == "FSDP" and getattr(plugin, "fsdp_version", 1) != 2:
        raise RuntimeError(
            "LoRA-Pro does not support FSDP1, which flattens the factors and cuts them at any place. Set "
            f"fsdp_version: 2 in accelerate's configuration (FSDP2), or {remedy}."
        )
    require_no_checkpoint_wrapper(plugin)
