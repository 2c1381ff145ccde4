"""What can LoRA-Pro train in a model, what not and why, and how much memory does each mode need?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorapro_hf.commands.inspect.model import inspect_model

__all__ = ["inspect_model"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lorapro_hf.commands.inspect.model import inspect_model  # takes seconds, too long for the command line

    return inspect_model
