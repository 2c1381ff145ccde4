"""How do adapters of several clients become one? `LoRAFairStrategy` needs Flower, and is loaded on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorapro_hf.federated.strategy import LoRAFairStrategy

__all__ = ["LoRAFairStrategy"]


def __getattr__(name: str) -> Any:
    if name != "LoRAFairStrategy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lorapro_hf.federated.strategy import LoRAFairStrategy
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "flwr":
            raise
        from lorapro_hf.utils.extras import MissingExtraError, install_command

        raise MissingExtraError(
            "LoRAFairStrategy needs Flower, for Python 3.11 and newer, in an environment of its own (it asks for an "
            f"older rich than the other extras): {install_command('flower')}"
        ) from error
    return LoRAFairStrategy
