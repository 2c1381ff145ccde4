"""How do the figures of a benchmark run look?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lorapro_hf.commands.bench.growth import AXES, exponents
from lorapro_hf.commands.bench.results import GrowthPoint, Outcome, Result, quartiles
from lorapro_hf.commands.bench.settings import BASELINE, METHODS, MODELS

_OURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_THEIRS = ("#4d4d4d", "#7f7f7f", "#a6a6a6", "#bf9f7f", "#8c9fb3", "#c7c7c7")
_MARKERS = "osD^vP"


def colours() -> dict[str, str]:
    """One colour a method: strong ones for the modes of LoRA-Pro, greys for the others."""
    ours = [name for name, method in METHODS.items() if method.mode is not None]
    theirs = [name for name in METHODS if name not in ours]
    found = {name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)}
    return found | {name: _THEIRS[i % len(_THEIRS)] for i, name in enumerate(theirs)}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_ratios(path: Path, outcome: Outcome) -> bool:
    """Draw each method's time over fused AdamW's, a panel for each model and dtype; False if there is nothing."""
    measured = [r for r in outcome.results if r.ratio is not None and r.method != BASELINE]
    if not measured:
        return False
    rows, columns = (list(dict.fromkeys(getattr(r, key) for r in measured)) for key in ("dtype", "workload"))
    names = [name for name in METHODS if any(r.method == name for r in measured)]
    ranks = sorted({r.rank for r in measured})
    figure = _figure(4.2 * len(columns) + 1.5, (0.25 * len(names) * len(ranks) + 1.2) * len(rows))
    panels: Any = figure.subplots(len(rows), len(columns), squeeze=False, sharey=True, sharex=True)
    for i, dtype in enumerate(rows):
        for j, workload in enumerate(columns):
            here = [r for r in measured if (r.dtype, r.workload) == (dtype, workload)]
            _bars(panels[i][j], here, names, ranks)
            panels[i][j].set_title(f"{MODELS[workload].title}, {dtype} factors")
    for panel in panels[-1]:
        panel.set_xlabel("time of a step over fused AdamW's (log scale)")
    figure.savefig(path, dpi=130)
    return True


def _bars(axes: Any, results: Sequence[Result], names: Sequence[str], ranks: Sequence[int]) -> None:
    colour, thickness = colours(), 0.8 / len(ranks)
    for result in results:
        place = names.index(result.method) + (ranks.index(result.rank) - (len(ranks) - 1) / 2) * thickness
        ratio = result.ratio or 1.0
        hatch = None if result.whole else "///"
        style = {"color": colour[result.method], "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axes.barh(place, ratio, height=0.9 * thickness, **style)
        text = f" {ratio:.2g}" if ratio < 100 else f" {ratio:.0f}"
        axes.text(
            ratio, place, f"{text} (r={result.rank}{'' if result.whole else ', one block'})", va="center", fontsize=6
        )
    axes.set(xscale="log", yticks=range(len(names)), yticklabels=[METHODS[name].title for name in names])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(right=axes.get_xlim()[1] * 4)  # room for the labels
    axes.grid(axis="x", alpha=0.2)


def plot_growth(path: Path, growth: Sequence[GrowthPoint]) -> bool:
    """Draw step time and kernels against layers, m, n and r with the fitted exponents; False if there is nothing."""
    fitted = exponents(growth)
    if not fitted:
        return False
    figure = _figure(15, 9.5)
    panels: Any = figure.subplots(2, len(AXES))
    names = [name for name in METHODS if any(point.method == name for point in growth)]
    colour = colours()
    for column, (axis, title) in enumerate(AXES.items()):
        for marker, name in enumerate(names):
            points = [p for p in growth if (p.method, p.axis) == (name, axis) and p.samples_ms and p.kernels]
            if (name, axis) not in fitted:
                continue
            style = {"color": colour[name], "marker": _MARKERS[marker % len(_MARKERS)], "markersize": 5}
            sizes = [point.size for point in points]
            low, middle, high = zip(*(quartiles(point.samples_ms) for point in points), strict=True)
            of_time, of_kernels = fitted[name, axis]
            panels[0][column].plot(sizes, middle, label=f"{METHODS[name].title}: {of_time:.2f}", **style)
            panels[0][column].fill_between(sizes, low, high, color=colour[name], alpha=0.15)
            kernels = [point.kernels for point in points]
            panels[1][column].plot(sizes, kernels, label=f"{METHODS[name].title}: {of_kernels:.2f}", **style)
        for row, label in enumerate(("ms a step", "kernels a step")):
            axes = panels[row][column]
            axes.set(xscale="log", yscale="log", xlabel=title, ylabel=label)
            ticks = sorted({point.size for point in growth if point.axis == axis})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.2)
            axes.legend(
                fontsize=7, title="fitted exponent", title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15)
            )
    figure.savefig(path, dpi=130)
    return True


def plot_roofline(path: Path, outcome: Outcome) -> bool:
    """Draw the steps with dense moments beside the roofline of their batch; False if there is nothing."""
    found = [(r, r.roofline) for r in outcome.results if r.roofline is not None and r.samples_ms]
    if not found:
        return False
    figure = _figure(9, 0.3 * len(found) + 1.6)
    axes = figure.add_subplot()
    colour, labels = colours(), []
    for place, (result, roof) in enumerate(found):
        low, middle, high = quartiles(result.samples_ms)
        axes.barh(
            place, middle, xerr=[[middle - low], [high - middle]], color=colour[result.method], height=0.7, alpha=0.6
        )
        for value, marker in ((roof.memory_ms, "|"), (roof.compute_ms, "x"), (roof.sum_ms, "D")):
            axes.plot([value], [place], marker=marker, color="black", markersize=6, linestyle="none")
        axes.text(high, place, f"  {middle / roof.bound_ms:.2f} × roofline", va="center", fontsize=7)
        scope = "" if result.whole else ", one block"
        labels.append(f"{result.title}: {MODELS[result.workload].title} r={result.rank} {result.dtype}{scope}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set(xscale="log", xlabel="ms a step (log scale)", title="Dense moments beside the roofline of the same run")
    axes.set_xlim(right=axes.get_xlim()[1] * 3)
    texts = (("|", "M and V in and out at copy bandwidth"), ("x", "8r flops an element at matmul rate"), ("D", "sum"))
    handles = [Line2D([], [], color="black", marker=marker, linestyle="none", label=text) for marker, text in texts]
    axes.legend(
        handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.5 / (0.3 * len(found) + 1)), ncols=3
    )
    figure.savefig(path, dpi=130)
    return True
