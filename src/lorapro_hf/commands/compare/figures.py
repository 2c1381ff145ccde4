"""How do the figures of a comparison look?"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorapro_hf.commands.common.plots import smooth
from lorapro_hf.commands.compare.store import FINISHED
from lorapro_hf.commands.compare.summary import MISSING, Comparison, Row

_OURS = ("#D55E00", "#E69F00", "#CC79A7", "#882255", "#009E73", "#44AA99", "#6A3D9A", "#56B4E9")
_THEIRS = ("#4d4d4d", "#7f7f7f", "#a6a6a6", "#8c6d4f", "#8c9fb3", "#b59f7f", "#5f6f5f", "#9a7f9a")
_MARKERS = "os^vDPX*<>hp"
_ENDS = {"baseline": ("black", "-"), "reference": ("#0072B2", "--")}

Style = dict[str, Any]


def draw(comparison: Comparison, ours: Sequence[str]) -> dict[str, tuple[str, bytes]]:
    """All figures of a comparison: PNGs with their captions by name; one that would be empty is left out.

    Args:
        comparison: What is drawn.
        ours: Names of the methods that are LoRA-Pro.
    """
    style = styles(comparison, ours)
    drawn = {"loss": ("Training loss against step", loss_curves(comparison, style))}
    for metric in comparison.metrics:
        caption = f"Test {_of(metric)} against learning rate"
        drawn[f"rate-{metric}"] = (caption, metric_against_rate(comparison, style, metric))
    for cost, label, unit in (("train_s", "training time, s", 1.0), ("state_bytes", "optimizer state, MB", 1e6)):
        caption = f"Test loss against {label.split(',')[0]}"
        drawn[cost] = (caption, metric_against_cost(comparison, style, "loss", cost, label, unit))
    return {name: (caption, picture) for name, (caption, picture) in drawn.items() if picture is not None}


def styles(comparison: Comparison, ours: Sequence[str]) -> dict[str, Style]:
    """Color, marker and line of each method: strong colors for LoRA-Pro, black for the baseline, blue for the goal."""
    found: dict[str, Style] = {}
    counts = {True: 0, False: 0}
    for place, row in enumerate(comparison.rows):
        is_ours = row.method in ours
        palette = _OURS if is_ours else _THEIRS
        color, line = palette[counts[is_ours] % len(palette)], "-"
        if row.method == comparison.baseline:
            color, line = _ENDS["baseline"]
        elif row.method == comparison.reference:
            color, line = _ENDS["reference"]
        else:
            counts[is_ours] += 1
            line = "-" if is_ours else ":"
        found[row.method] = {"color": color, "linestyle": line, "marker": _MARKERS[place % len(_MARKERS)]}
    return found


def loss_curves(comparison: Comparison, style: dict[str, Style]) -> bytes | None:
    """Training loss against step at each method's best rate, the mean over the seeds; `None` if there is nothing."""
    figure, axes = _axes(f"{_title(comparison)}: training loss, mean over the seeds, smoothed")
    for row in comparison.rows:
        if row.best is None:
            continue
        curves = [record["losses"] for record in row.best.records.values()]
        curve = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        look = {**style[row.method], "marker": None}
        reach = max(2, len(curve) // 30)
        axes.plot(range(1, len(curve) + 1), smooth(curve, reach), label=_label(row), linewidth=1.6, **look)
    axes.set(xlabel="step", ylabel="training loss (log scale)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_numbers(axes.yaxis)
    return _png(figure, axes)


def metric_against_rate(comparison: Comparison, style: dict[str, Style], metric: str) -> bytes | None:
    """A test metric against the learning rate: mean and range over the seeds; crosses where a seed did not finish."""
    figure, axes = _axes(f"{_title(comparison)}: {_of(metric)} on the test set, by learning rate")
    axes.set_xscale("log")
    for row in comparison.rows:
        whole = [rate for rate in row.rates if rate.whole and rate.values(metric)]
        rates = [rate.learning_rate for rate in whole]
        values = [list(rate.values(metric).values()) for rate in whole]
        means = [statistics.fmean(each) for each in values]
        spread = [
            [mean - min(each) for mean, each in zip(means, values, strict=True)],
            [max(each) - mean for mean, each in zip(means, values, strict=True)],
        ]
        look = style[row.method]
        if rates:
            axes.errorbar(rates, means, yerr=spread, label=_label(row), markersize=5, capsize=2, linewidth=1.3, **look)
        if row.best is not None and row.best in whole:
            place = whole.index(row.best)
            ring = {"markersize": 11, "markerfacecolor": "none", "linestyle": "none", "marker": "o"}
            axes.plot(rates[place], means[place], markeredgecolor=look["color"], **ring)
    _mark_unfinished(comparison, style, axes)
    logarithmic = metric == "loss" and any(rate.whole for row in comparison.rows for rate in row.rates)
    axes.set(xlabel="learning rate (log scale)", ylabel=_of(metric) + (" (log scale)" * logarithmic))
    if logarithmic:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    return _png(figure, axes)


def _mark_unfinished(comparison: Comparison, style: dict[str, Style], axes: Any) -> None:
    """A cross at the upper edge for each rate at which a seed diverged or failed, side by side where several did."""
    places: dict[float, int] = {}
    for row in comparison.rows:
        for rate in row.rates:
            bad = [status for status in rate.statuses.values() if status not in (FINISHED, MISSING)]
            if not bad:
                continue
            height = 0.98 - 0.035 * places.get(rate.learning_rate, 0)
            places[rate.learning_rate] = places.get(rate.learning_rate, 0) + 1
            axes.plot(
                rate.learning_rate,
                height,
                marker="x",
                markersize=8,
                markeredgewidth=2,
                zorder=5,
                color=style[row.method]["color"],
                linestyle="none",
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                label=f"{row.title}: {len(bad)} of {len(rate.statuses)} diverged or failed at {rate.learning_rate:g}",
            )


def metric_against_cost(
    comparison: Comparison, style: dict[str, Style], metric: str, cost: str, label: str, unit: float
) -> bytes | None:
    """A test metric at the best rate against what it cost, a point with the range over the seeds for each method.

    Args:
        comparison: What is drawn.
        style: From `styles`.
        metric: On the vertical axis.
        cost: Name of a measurement in the records, such as `train_s`.
        label: What it is called.
        unit: What the measurement is divided by.
    """
    figure, axes = _axes(f"{_title(comparison)}: {_of(metric)} on the test set, by {label.split(',')[0]}")
    for row in comparison.rows:
        amount = row.median(cost)
        values = [] if row.best is None else list(row.best.values(metric).values())
        if amount is None or not values or not amount > 0:
            continue
        mean = statistics.fmean(values)
        look = {**style[row.method], "linestyle": "none"}
        spread = [[mean - min(values)], [max(values) - mean]]
        axes.errorbar([amount / unit], [mean], yerr=spread, markersize=8, capsize=3, label=_label(row), **look)
    axes.set(xscale="log", xlabel=f"{label} (log scale)", ylabel=_of(metric))
    _plain_numbers(axes.xaxis)
    return _png(figure, axes)


def _axes(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.grid(which="both", alpha=0.2)
    return figure, axes


def _png(figure: Figure, axes: Any) -> bytes | None:
    if not axes.has_data():
        return None
    legend = axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a title is a title, with dollars too
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _plain_numbers(axis: Any) -> None:
    plain: Callable[[float, int], str] = lambda value, place: f"{value:.3g}"  # noqa: E731
    axis.set_major_formatter(plain)
    low, high = axis.get_view_interval()
    # within one decade the ticks between the powers of ten are all there is
    axis.set_minor_formatter(plain if low > 0 and math.log10(high / low) < 1.2 else (lambda value, place: ""))
    axis.axes.tick_params(which="minor", labelsize="x-small")


def _title(comparison: Comparison) -> str:
    return f"{comparison.task}, rank {comparison.rank}"


def _of(metric: str) -> str:
    return metric.replace("_", " ")


def _label(row: Row) -> str:
    return row.title if row.best is None else f"{row.title}, lr {row.best.learning_rate:g}"
