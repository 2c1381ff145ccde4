"""Which engines of accelerate can LoRA-Pro not work with?"""

from __future__ import annotations

from typing import Any

from lorapro_hf.factors.wrappers import require_no_checkpoint_wrapper


def require_supported_engine(state: Any, remedy: str) -> None:
    """Raise a `RuntimeError` if accelerate runs an engine that LoRA-Pro cannot work with.

    Args:
        state: an `Accelerator` or an `AcceleratorState`.
        remedy: what to do instead, after "or".
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
