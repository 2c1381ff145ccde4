"""How far are gradients and steps of LoRA factors from those of full fine-tuning? Measured in a running training.

The names are loaded on first use: reading measurements needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorapro_hf.diagnostics.callback import GradientGapCallback
    from lorapro_hf.diagnostics.meter import GradientGapMeter
    from lorapro_hf.diagnostics.records import LayerGap

__all__ = ["GradientGapCallback", "GradientGapMeter", "LayerGap"]

_HOMES = {"GradientGapCallback": "callback", "GradientGapMeter": "meter", "LayerGap": "records"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
