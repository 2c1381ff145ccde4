"""How do the figures of a comparison look?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorapro_hf.commands.common.plots import as_png, smooth
from lorapro_hf.commands.compare.store import FINISHED
from lorapro_hf.commands.compare.summary import MISSING, Summary, TaskSummary

_OURS = ("#D55E00", "#E69F00", "#CC79A7", "#882255", "#009E73", "#44AA99", "#6A3D9A", "#56B4E9")
_THEIRS = ("#4d4d4d", "#7f7f7f", "#a6a6a6", "#8c6d4f", "#8c9fb3", "#b59f7f", "#5f6f5f", "#9a7f9a")
_MARKERS = "os^vDPX*<>hp"

Style = dict[str, Any]
Panel = Callable[[Any, TaskSummary, dict[str, Style]], None]


def draw(summary: Summary, ours: Sequence[str]) -> dict[str, bytes]:
    """PNGs by name with a panel for each task and rank; `ours` are the names of the methods that are LoRA-Pro."""
    panels: dict[str, tuple[str, Panel]] = {
        "loss": ("training loss at the best rate, mean over the seeds, smoothed", _curves),
        "rates": ("test loss by learning rate, mean and range over the seeds", _by_rate),
        "cost": ("test loss at the best rate by training time", _by_time),
    }
    drawn = {name: _figure(summary, ours, title, panel) for name, (title, panel) in panels.items()}
    return {name: picture for name, picture in drawn.items() if picture is not None}


def _figure(summary: Summary, ours: Sequence[str], title: str, panel: Panel) -> bytes | None:
    """A picture with the panels one below the other; `None` if all are empty."""
    count = len(summary.comparisons)
    figure = Figure(figsize=(10, 4.2 * count), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, comparison in zip(figure.subplots(count, squeeze=False)[:, 0], summary.comparisons, strict=True):
        axes.set_title(f"{comparison.task}, rank {comparison.rank}: {title}", fontsize="medium", parse_math=False)
        axes.grid(which="both", alpha=0.2)
        panel(axes, comparison, _styles(comparison, summary.settings, ours))
        if axes.has_data():
            legend = axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
            for text in legend.get_texts():
                text.set_parse_math(False)  # a title is a title, with dollars too
    if not any(axes.has_data() for axes in figure.axes):
        return None
    return as_png(figure, dpi=80)


def _styles(comparison: TaskSummary, settings: dict[str, Any], ours: Sequence[str]) -> dict[str, Style]:
    """Color, marker and line of each method: strong colors for LoRA-Pro, black for the baseline, blue for the goal."""
    ends = {settings["baseline"]: ("black", "-"), settings["reference"]: ("#0072B2", "--")}
    looks = {True: [(color, "-") for color in _OURS], False: [(color, ":") for color in _THEIRS]}
    counts = {True: 0, False: 0}
    styles: dict[str, Style] = {}
    for place, method in enumerate(comparison.methods):
        is_ours = method.method in ours
        look = ends.get(method.method)
        if look is None:
            look = looks[is_ours][counts[is_ours] % len(_OURS)]
            counts[is_ours] += 1
        rate = "" if method.learning_rate is None else f", lr {method.learning_rate:g}"
        marker = _MARKERS[place % len(_MARKERS)]
        label = method.title + rate
        styles[method.method] = {"color": look[0], "linestyle": look[1], "marker": marker, "label": label}
    return styles


def _curves(axes: Any, comparison: TaskSummary, styles: dict[str, Style]) -> None:
    for method in comparison.methods:
        curve = method.loss_curve
        if curve:
            reach = max(2, len(curve) // 30)
            style = {**styles[method.method], "marker": None}
            axes.plot(range(1, len(curve) + 1), smooth(curve, reach), linewidth=1.6, **style)
    axes.set(xlabel="step", ylabel="training loss (log scale)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_numbers(axes.yaxis)


def _by_rate(axes: Any, comparison: TaskSummary, styles: dict[str, Style]) -> None:
    axes.set(xlabel="learning rate (log scale)", ylabel="test loss (log scale)", xscale="log", yscale="log")
    marked: dict[float, int] = {}
    for method in comparison.methods:
        style = styles[method.method]
        whole = {rate.learning_rate: list(rate.test["loss"].values()) for rate in method.rates if rate.whole}
        means = {rate: statistics.fmean(losses) for rate, losses in whole.items()}
        if whole:
            low = [means[rate] - min(losses) for rate, losses in whole.items()]
            high = [max(losses) - means[rate] for rate, losses in whole.items()]
            axes.errorbar(list(means), list(means.values()), yerr=[low, high], markersize=5, capsize=2, **style)
        if method.learning_rate is not None:
            ring = {"markersize": 11, "markerfacecolor": "none", "linestyle": "none", "marker": "o"}
            axes.plot(method.learning_rate, means[method.learning_rate], markeredgecolor=style["color"], **ring)
        for rate in method.rates:
            bad = sum(status not in (FINISHED, MISSING) for status in rate.status.values())
            if bad:
                # a cross at the upper edge, side by side where several methods have one
                height = 0.98 - 0.035 * marked.get(rate.learning_rate, 0)
                marked[rate.learning_rate] = marked.get(rate.learning_rate, 0) + 1
                label = f"{method.title}: {bad} of {len(rate.status)} diverged or failed at {rate.learning_rate:g}"
                cross = {"marker": "x", "markersize": 8, "linestyle": "none", "color": style["color"], "label": label}
                axes.plot(rate.learning_rate, height, transform=axes.get_xaxis_transform(), clip_on=False, **cross)
    if any(rate.whole for method in comparison.methods for rate in method.rates):
        _plain_numbers(axes.yaxis)


def _by_time(axes: Any, comparison: TaskSummary, styles: dict[str, Style]) -> None:
    axes.set(xlabel="training time, s", ylabel="test loss")
    for method in comparison.methods:
        seconds, best = method.cost.get("train_s"), method.best
        if seconds and best is not None:
            losses = list(best.test["loss"].values())
            mean = statistics.fmean(losses)
            style = {**styles[method.method], "linestyle": "none"}
            axes.errorbar(seconds, mean, yerr=[[mean - min(losses)], [max(losses) - mean]], capsize=2, **style)


def _plain_numbers(axis: Any) -> None:
    plain: Callable[[float, int], str] = lambda value, place: f"{value:.3g}"  # noqa: E731
    axis.set_major_formatter(plain)
    low, high = axis.get_view_interval()
    # within one decade the ticks between the powers of ten are all there is
    axis.set_minor_formatter(plain if low > 0 and math.log10(high / low) < 1.2 else (lambda value, place: ""))
    axis.axes.tick_params(which="minor", labelsize="x-small")
