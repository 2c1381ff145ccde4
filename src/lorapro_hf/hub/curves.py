"""What does the training look like, as a picture?"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapro_hf.hub.describe import logged_numbers
from lorapro_hf.utils.text_files import replace_file

PICTURE = "training_curves.png"
_RAW, _SMOOTH, _HELD_OUT = "#b8c4d6", "#2f5d9b", ("#d1495b", "#edae49", "#66a182", "#8d6a9f")

Points = list[tuple[int, float]]


def loss_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Losses by name, `loss` and `eval_loss` (or `eval_<name>_loss`, one for each set), as finite (step, value)."""
    logged = dict.fromkeys(name for entry in log_history for name in entry)
    losses = [name for name in logged if name == "loss" or (name.startswith("eval_") and name.endswith("_loss"))]
    points = {name: sorted(logged_numbers(log_history, name).items()) for name in losses}
    finite = {name: [(step, value) for step, value in each if math.isfinite(value)] for name, each in points.items()}
    return {name: each for name, each in finite.items() if each}


def draw_curves(log_history: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Draw training and held-out loss against step into a PNG file, as far as they have been logged.

    Returns:
        Whether the picture has been written; not with fewer than two points, which are no curve.

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
    axes = figure.add_subplot()
    training = curves.pop("loss", [])
    if training:
        _draw_training(axes, training)
    for index, (name, points) in enumerate(sorted(curves.items())):
        label = name.removeprefix("eval_").removesuffix("loss").replace("_", " ").strip()
        steps, values = zip(*points, strict=True)
        color = _HELD_OUT[index % len(_HELD_OUT)]
        axes.plot(steps, values, "o-", color=color, markersize=4, label=f"held-out loss {label}".strip())
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    replace_file(file, picture.getvalue())
    return True


def _draw_training(axes: Any, points: Points) -> None:
    """The loss as logged, and over it, where there are many values, their running mean."""
    steps, values = zip(*points, strict=True)
    window = max(1, len(values) // 20)
    if window == 1:
        axes.plot(steps, values, color=_SMOOTH, linewidth=1.6, label="training loss")
        return
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
    axes.plot(steps, values, color=_RAW, linewidth=1, label="training loss")
    axes.plot(steps, means, color=_SMOOTH, linewidth=1.8, label=f"its mean over {window} logs")
