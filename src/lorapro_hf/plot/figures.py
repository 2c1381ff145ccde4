"""How does the gradient gap of runs look, over steps and layer by layer?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lorapro_hf.plot.runs import Run, short_names

_LINES = (
    ("lora_scaled_gap", "LoRA's own gradients, best scale", "#c8553d"),
    ("lora_pro_gap", "LoRA-Pro's gradients", "#2a6f97"),
)
_STEP = ("step_error", "step taken against step meant", "#6b705c")
_GAP = "distance from g, relative"
_ROUNDING = 1e-7  # errors of steps below it are not told apart
_LABELS = 40  # rows of a heat map that can be named


def plot_gap(path: Path, runs: Sequence[Run]) -> None:
    """Draw runs side by side: the gap over steps, the error of steps, and the gap layer by layer, LoRA and LoRA-Pro.

    The colors of all heat maps mean the same. A cell without a color has not been measured.
    """
    rows = max(len(run.layers) for run in runs)
    map_height = min(max(1.2, 0.16 * rows), 9.0)
    heights = [2.6, 1.7, map_height, map_height]
    figure = Figure(figsize=(5.4 * len(runs) + 1.2, sum(heights) + 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(4, len(runs), squeeze=False, height_ratios=heights)
    values = [r[name] for run in runs for r in run.records for name, *_ in _LINES if r.get(name) is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    image: Any = None
    for column, run in enumerate(runs):
        gap, error, *maps = (panel[column] for panel in panels)
        _gap_over_steps(gap, run)
        _step_errors(error, run)
        for axes, (name, label, _) in zip(maps, _LINES, strict=True):
            image = _heat_map(axes, run, name, low, high)
            axes.set_title(f"gap of {label}, by layer", fontsize=9)
        maps[-1].set_xlabel("step")
    for row in panels[:2]:
        _share_limits(row)
    figure.colorbar(image, ax=list(panels[2]) + list(panels[3]), label=_GAP, shrink=0.8)
    figure.savefig(path, dpi=130)


def _gap_over_steps(axes: Any, run: Run) -> None:
    for name, label, color in _LINES:
        _band(axes, run, name, label, color)
    axes.set(title=f"{run.name}\ntrained with {run.optimizer}", ylabel=_GAP, xlabel="step")
    axes.legend(fontsize=8, title="median over layers, quartiles", title_fontsize=8)
    axes.grid(alpha=0.2)


def _step_errors(axes: Any, run: Run) -> None:
    name, label, color = _STEP
    _band(axes, run, name, label, color)
    axes.set_yscale("log")
    axes.set(ylabel="relative error", xlabel="step")
    axes.set_title(label, fontsize=9)
    axes.grid(alpha=0.2)


def _band(axes: Any, run: Run, name: str, label: str, color: str) -> None:
    found = run.quartiles(name)
    if found:
        bounded = [[max(value, _ROUNDING) for value in each] for each in found.values()]
        q1, median, q3 = zip(*bounded, strict=True)
        axes.plot(list(found), median, color=color, label=label, marker="o", markersize=3)
        axes.fill_between(list(found), q1, q3, color=color, alpha=0.18, linewidth=0)


def _heat_map(axes: Any, run: Run, name: str, low: float, high: float) -> Any:
    steps, layers = run.steps, run.layers
    table = [[math.nan] * len(steps) for _ in layers]
    place = {layer: row for row, layer in enumerate(layers)}, {step: column for column, step in enumerate(steps)}
    for record in run.records:
        if record.get(name) is not None:
            table[place[0][run.layer_of(record)]][place[1][record["step"]]] = record[name]
    axes.set_facecolor("#e8e8e8")
    image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high)
    every = -(-len(layers) // _LABELS)
    axes.set_yticks(range(0, len(layers), every), short_names(layers)[::every], fontsize=6)
    every = -(-len(steps) // 8)
    axes.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]], fontsize=8)
    return image


def _share_limits(row: Any) -> None:
    bottom, top = min(axes.get_ylim()[0] for axes in row), max(axes.get_ylim()[1] for axes in row)
    for axes in row:
        axes.set_ylim(bottom, top)
