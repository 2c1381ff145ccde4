"""How do the figures of a comparison look?"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from lorapro_hf.commands.common.plots import as_png, new_figure, smooth
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
    figure = new_figure(10, 4.2 * count)
    for axes, comparison in zip(figure.subplots(count, squeeze=False)[:, 0], summary.comparisons, strict=True):
        axes.set_title(
            f"{comparison.task}, rank {comparison.rank}, {comparison.steps} steps: {title}",
            fontsize="medium",
            parse_math=False,
        )
        axes.grid(which="both", alpha=0.2)
        panel(axes, comparison, _styles(comparison, summary.settings, ours))
        if axes.has_data():
            legend = axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
            for text in legend.get_texts():
                text.set_parse_math(False)  # a title may have dollars
    return as_png(figure, dpi=80) if any(axes.has_data() for axes in figure.axes) else None


def _styles(comparison: TaskSummary, settings: dict[str, Any], ours: Sequence[str]) -> dict[str, Style]:
    """Color, marker and line of each method: strong colors for LoRA-Pro, black for the baseline, blue for the goal."""
    looks = {True: [(color, "-") for color in _OURS], False: [(color, ":") for color in _THEIRS]}
    ends = {settings["baseline"]: ("black", "-"), settings["reference"]: ("#0072B2", "--")}
    used = Counter[bool]()
    styles: dict[str, Style] = {}
    for place, method in enumerate(comparison.methods):
        name, is_ours = method.method, method.method in ours
        color, line = ends.get(name, looks[is_ours][used[is_ours] % len(_OURS)])
        used[is_ours] += name not in ends
        rate = "" if method.learning_rate is None else f", lr {method.learning_rate:g}"
        styles[name] = {"color": color, "linestyle": line, "label": method.title + rate}
        styles[name]["marker"] = _MARKERS[place % len(_MARKERS)]
    return styles


def _curves(axes: Any, comparison: TaskSummary, styles: dict[str, Style]) -> None:
    for method in comparison.methods:
        curve = method.loss_curve
        if curve:
            style = {**styles[method.method], "marker": None, "linewidth": 1.6}
            axes.plot(method.curve_steps, smooth(curve, max(2, len(curve) // 30)), **style)
    axes.set(xlabel="step", ylabel="training loss (log scale)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_numbers(axes.yaxis)


def _by_rate(axes: Any, comparison: TaskSummary, styles: dict[str, Style]) -> None:
    axes.set(xlabel="learning rate (log scale)", ylabel="test loss (log scale)", xscale="log", yscale="log")
    crosses: Counter[float] = Counter()
    for method in comparison.methods:
        style = styles[method.method]
        whole = {rate.learning_rate: rate.test["loss"] for rate in method.rates if rate.validation_loss is not None}
        means = _errorbar(axes, {rate: list(losses.values()) for rate, losses in whole.items()}, style, markersize=5)
        if method.learning_rate is not None:
            ring = {"markersize": 11, "markerfacecolor": "none", "linestyle": "none", "marker": "o"}
            axes.plot(method.learning_rate, means[method.learning_rate], markeredgecolor=style["color"], **ring)
        for rate in method.rates:
            value, bad = rate.learning_rate, sum(status not in (FINISHED, MISSING) for status in rate.status.values())
            if bad:
                # a cross at the upper edge, side by side where several methods have one
                label = f"{method.title}: {bad} of {len(rate.status)} diverged or failed at {value:g}"
                cross = {"marker": "x", "markersize": 8, "linestyle": "none", "color": style["color"], "label": label}
                height = 0.98 - 0.035 * crosses[value]
                axes.plot(value, height, transform=axes.get_xaxis_transform(), clip_on=False, **cross)
                crosses[value] += 1
    if any(rate.validation_loss is not None for method in comparison.methods for rate in method.rates):
        _plain_numbers(axes.yaxis)


def _by_time(axes: Any, comparison: TaskSummary, styles: dict[str, Style]) -> None:
    axes.set(xlabel="training time, s", ylabel="test loss")
    for method in comparison.methods:
        seconds, best = method.cost.get("train_s"), method.best
        if seconds and best is not None:
            _errorbar(axes, {seconds: list(best.test["loss"].values())}, styles[method.method], linestyle="none")


def _errorbar(axes: Any, losses: dict[float, list[float]], style: Style, **more: Any) -> dict[float, float]:
    """Draw the mean and the range of losses by place, and return the means."""
    means = {place: statistics.fmean(values) for place, values in losses.items()}
    if means:
        low = [means[place] - min(values) for place, values in losses.items()]
        high = [max(values) - means[place] for place, values in losses.items()]
        axes.errorbar(list(means), list(means.values()), yerr=[low, high], capsize=2, **{**style, **more})
    return means


def _plain_numbers(axis: Any) -> None:
    plain: Callable[[float, int], str] = lambda value, place: f"{value:.3g}"  # noqa: E731
    axis.set_major_formatter(plain)
    low, high = axis.get_view_interval()
    # within one decade the ticks between the powers of ten are all there is
    axis.set_minor_formatter(plain if low > 0 and math.log10(high / low) < 1.2 else (lambda value, place: ""))
    axis.axes.tick_params(which="minor", labelsize="x-small")
