"""Which settings of the gradient gap are valid?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GAP_MAX_BYTES = 2**30


def check_gap_layers(layers: Any, prefix: str = "") -> None:
    """Raise a `ValueError` unless the layers are `None` or a list of names; `prefix` begins the setting's name."""
    names = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else []
    if layers is not None and not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"{prefix}layers={layers!r} must be a list of names or patterns such as ['q_proj'], or be left out for all "
            "layers."
        )


def check_gap_max_bytes(max_bytes: Any, prefix: str = "") -> None:
    """Raise a `ValueError` unless the setting is a positive whole number; `prefix` begins the setting's name."""
    if type(max_bytes) is not int or max_bytes <= 0:
        raise ValueError(
            f"{prefix}max_bytes={max_bytes!r} must be a positive whole number of bytes; it is for the gradients of the "
            f"layers measured at a time, by default {GAP_MAX_BYTES:,}."
        )
