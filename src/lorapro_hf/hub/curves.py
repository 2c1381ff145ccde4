"""How do the losses of a training look, as a picture?"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapro_hf.hub.logs import logged_numbers
from lorapro_hf.utils.text_files import replace_file

PICTURE = "training_curves.png"


def loss_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the finite losses by name, `loss` and `eval_loss` (or `eval_<set>_loss`), as pairs of step and value."""
    logged = dict.fromkeys(name for entry in log_history for name in entry)
    losses = [name for name in logged if name == "loss" or (name.startswith("eval_") and name.endswith("_loss"))]
    points = {name: sorted(logged_numbers(log_history, name).items()) for name in losses}
    finite = {name: [(step, value) for step, value in each if math.isfinite(value)] for name, each in points.items()}
    return {name: each for name, each in finite.items() if each}


def draw_curves(log_history: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Draw the losses against step into a PNG file, and return whether there were two points for a curve.

    Raises:
        ImportError: matplotlib is not installed.
    """
    curves = loss_curves(log_history)
    if max(map(len, curves.values()), default=0) < 2:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing, install it with `pip install matplotlib`") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, points in sorted(curves.items(), reverse=True):
        set_name = name.removeprefix("eval_").removesuffix("loss").replace("_", " ").strip()
        label = "training loss" if name == "loss" else f"held-out loss {set_name}".strip()
        line = {"linewidth": 1.2, "zorder": 1} if name == "loss" else {"marker": "o", "markersize": 4}
        axes.plot(*zip(*points, strict=True), label=label, **line)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    replace_file(file, picture.getvalue())
    return True
