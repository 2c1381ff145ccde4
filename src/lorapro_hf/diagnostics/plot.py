"""How is the gradient gap of runs drawn, over steps and layer by layer?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorapro_hf.diagnostics.runs import DRAWN, Run, short_names

_LINES = (
    (DRAWN[0], "LoRA's own gradients, best scale", "#c8553d"),
    (DRAWN[1], "LoRA-Pro's gradients", "#2a6f97"),
)
_STEP = ("step_error", "step taken against step meant", "#6b705c")
_GAP = "distance from g, relative"
_ROUNDING = 2.5e-7  # smaller errors of steps are roundings of float32 factors
_LABELS = 40  # rows of a heat map that can be named


def plot_gap(path: Path, runs: Sequence[Run]) -> None:
    """Draw runs side by side: the gap over steps, the error of steps, and the gap of LoRA and LoRA-Pro layer by layer.

    All heat maps have one scale of colors. A gray cell has not been measured.
    """
    tables = [[run.by_layer(name) for name, *_ in _LINES] for run in runs]
    map_height = min(max(1.2, 0.16 * max(len(table) for table, _ in tables)), 9.0)
    heights = [2.6, 1.7, map_height, map_height]
    figure = Figure(figsize=(5.4 * len(runs) + 1.2, sum(heights) + 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(4, len(runs), squeeze=False, height_ratios=heights)
    values = pandas.concat([run.table[list(DRAWN)] for run in runs])
    image: Any = None
    for column, run in enumerate(runs):
        gap, error, *maps = panels[:, column]
        for name, label, color in _LINES:
            _band(gap, run.quartiles(name), label, color)
        gap.set(title=f"{run.name}\ntrained with {run.optimizer}", ylabel=_GAP, xlabel="step")
        _step_errors(error, run)
        for axes, table, (_, label, _) in zip(maps, tables[column], _LINES, strict=True):
            image = _heat_map(axes, table, values.min().min(), values.max().max())
            axes.set_title(f"gap of {label}, by layer", fontsize=9)
        maps[-1].set_xlabel("step")
    _share_limits(panels[:2])
    lines = {line.get_label(): line for axes in panels[0] for line in axes.lines}
    figure.legend(  # above the panels, where it covers no line
        lines.values(),
        lines.keys(),
        loc="outside upper center",
        ncols=2,
        fontsize=8,
        title="median and quartiles over the layers' latest values",
        title_fontsize=8,
    )
    figure.colorbar(image, ax=list(panels[2]) + list(panels[3]), label=_GAP, shrink=0.8)
    figure.savefig(path, dpi=130)


def _step_errors(axes: Any, run: Run) -> None:
    name, label, color = _STEP
    found = run.quartiles(name)
    drawn = found[found["median"] >= _ROUNDING].clip(lower=_ROUNDING)
    axes.set_title(label, fontsize=9)
    axes.set(ylabel="relative error", xlabel="step")
    _band(axes, drawn, label, color)
    if len(drawn):
        axes.set_yscale("log")
    else:
        axes.set_yticks([])
        says = "nothing but roundings" if len(found) else "has no meaning with this optimizer"
        axes.text(0.5, 0.5, says, transform=axes.transAxes, ha="center", va="center", fontsize=9)


def _band(axes: Any, quartiles: pandas.DataFrame, label: str, color: str) -> None:
    axes.grid(alpha=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(quartiles):
        axes.plot(quartiles["median"], color=color, label=label, marker="o", markersize=3)
        axes.fill_between(quartiles.index, quartiles["q1"], quartiles["q3"], color=color, alpha=0.18, linewidth=0)


def _heat_map(axes: Any, table: pandas.DataFrame, low: float, high: float) -> Any:
    axes.set_facecolor("#e8e8e8")
    image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis", vmin=low, vmax=high)
    every = -(-len(table) // _LABELS)
    axes.set_yticks(range(0, len(table), every), short_names(list(table.index))[::every], fontsize=6)
    steps = list(table.columns)
    every = -(-len(steps) // 8)
    axes.set_xticks(range(0, len(steps), every), steps[::every], fontsize=8)
    return image


def _share_limits(panels: Any) -> None:
    """Give all panels the same steps, and the panels of a row that have lines the same figures."""
    first, *others = panels.flat
    for axes in others:
        axes.sharex(first)
    first.autoscale(axis="x")
    for row in panels:
        having = [axes for axes in row if axes.lines]
        for axes in having[1:]:
            axes.sharey(having[0])
        if having:
            having[0].autoscale(axis="y")
