"""What may be said of the measurement of the gradient gap?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GAP_MAX_BYTES = 2**30


def check_gap_layers(layers: Any, prefix: str = "") -> None:
    """Refuse what is neither `None` nor a list of names, with a `ValueError`.

    Args:
        layers: as the user gave them.
        prefix: what the user's setting has before `layers`.
    """
    if layers is None:
        return
    names = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{prefix}layers={layers!r} must be a list of names or patterns such as ['q_proj'], or be left out for all "
            "layers."
        )


def check_gap_max_bytes(max_bytes: Any, prefix: str = "") -> None:
    """Refuse what is no positive number of bytes, with a `ValueError`; as `check_gap_layers`."""
    if type(max_bytes) is not int or max_bytes <= 0:
        raise ValueError(
            f"{prefix}max_bytes={max_bytes!r} must be a positive whole number of bytes; it is for the gradients of the "
            f"layers measured at a time, by default {GAP_MAX_BYTES:,}."
        )
