"""What does the training look like, as a picture?"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURE = "training_curves.png"
_RAW, _SMOOTH, _HELD_OUT = "#b8c4d6", "#2f5d9b", ("#d1495b", "#edae49", "#66a182", "#8d6a9f")

logger = logging.getLogger(__name__)

Points = list[tuple[int, float]]


def loss_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Losses by name, `loss` and `eval_loss` (or `eval_<name>_loss`, one for each set), as finite (step, value)."""
    curves: dict[str, Points] = {}
    for entry in log_history:
        for name, value in entry.items():
            is_loss = name == "loss" or (name.startswith("eval_") and name.endswith("_loss"))
            if is_loss and "step" in entry and math.isfinite(value):
                curves.setdefault(name, []).append((int(entry["step"]), float(value)))
    return {name: sorted(dict(points).items()) for name, points in curves.items()}


def draw_curves(log_history: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Draw training and held-out loss against step into a PNG file, as far as they have been logged.

    Returns:
        Whether the picture has been written. Not with fewer than two points, which are no curve, nor without
        matplotlib, of which a warning tells.
    """
    curves = loss_curves(log_history)
    if max(map(len, curves.values()), default=0) < 2:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            "matplotlib is not installed, so that the model card has no picture of the training. Install it with "
            "pip install matplotlib and call create_model_card again."
        )
        return False
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
    draft = file.with_name(f"_{file.name}")
    figure.savefig(draft, dpi=120, format="png")
    draft.replace(file)
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
