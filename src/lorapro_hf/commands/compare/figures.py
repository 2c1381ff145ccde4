"""How do the figures of a comparison look?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from lorapro_hf.commands.common.plots import as_png, new_figure, smooth
from lorapro_hf.commands.compare.findings import best_of, method_of, ours_of, standings
from lorapro_hf.commands.compare.significance import standard_error
from lorapro_hf.commands.compare.store import FINISHED
from lorapro_hf.commands.compare.summary import MISSING, MethodSummary, Summary, TaskSummary

_OURS = ("#D55E00", "#E69F00", "#CC79A7", "#882255", "#009E73")
_BASELINE, _REFERENCE, _PEER, _OTHER = "black", "#0072B2", "#56B4E9", "#b8b8b8"
_MARKERS = ("o", "D", "^", "v", "P")
KINDS = ("loss", "methods", "rates", "cost")
_WIDTH = 8.0  # inches
_WORST = 4.0  # losses beyond so many times the best are off the picture of rates
_RATIOS = (0.5, 2.0)  # of losses to the baseline's; those beyond are drawn at the edge

Style = dict[str, Any]


@dataclass(frozen=True)
class View:
    """The cells of a picture, and the role of each method."""

    cells: Sequence[TaskSummary]
    baseline: str
    reference: str
    ours: Sequence[str]  # names of the methods that are LoRA-Pro
    tuning_seeds: Sequence[int] = ()
    ranked: Sequence[TaskSummary] = ()  # the cells that decide which methods are highlighted, if others than `cells`
    first: Sequence[str] = ()  # of ours, highlighted in any case

    @property
    def methods(self) -> list[MethodSummary]:
        """Each method once, as in the first cell that has it."""
        return list({m.method: m for cell in reversed(self.cells) for m in reversed(cell.methods)}.values())[::-1]

    def styles(self) -> dict[str, Style]:
        """Looks of the baseline, the reference, the best five of ours and the best other one; the rest is grey."""
        found = standings(self.ranked or self.cells, self.baseline, self.reference)
        most = max((each.cells for each in found), default=0)
        # a method of few cells has other rivals
        found.sort(key=lambda each: (each.method not in self.first, 2 * each.cells < most))
        ends = {self.baseline: (_BASELINE, "-", "s"), self.reference: (_REFERENCE, "--", "X")}
        ours = [each.method for each in found if each.method in self.ours and each.method not in ends]
        others = [each.method for each in found if each.method not in {*ends, *self.ours}]
        peer = best_of(found, others)
        looks = {name: (color, "-", mark) for name, color, mark in zip(ours, _OURS, _MARKERS, strict=False)}
        looks |= ends if peer is None else {**ends, peer.method: (_PEER, "-.", "*")}
        styles: dict[str, Style] = {}
        for method in self.methods:
            color, line, marker = looks.get(method.method, (_OTHER, "-", "."))
            styles[method.method] = {"color": color, "linestyle": line, "marker": marker, "label": method.title}
            styles[method.method] |= {"zorder": 3 if method.method in looks else 2}
        return styles


def draw(summary: Summary) -> dict[str, bytes]:
    """PNGs by name: for each task the losses by step, method, rate and cost, with a panel for each cell."""
    settings, ours, pictures = summary.settings, ours_of(summary), {}
    for task in dict.fromkeys(cell.task for cell in summary.comparisons):
        cells = [cell for cell in summary.comparisons if cell.task == task]
        view = View(cells, settings["baseline"], settings["reference"], ours, settings["tuning_seeds"])
        for name, picture in pictures_of(view).items():
            pictures[f"{task}-{name}"] = picture
    return pictures


def pictures_of(view: View, names: Sequence[str] = KINDS) -> dict[str, bytes]:
    """PNGs by name, without those that would be empty."""
    longest = {}
    for cell in sorted(view.cells, key=lambda cell: cell.steps):
        longest[cell.task, cell.rank] = cell
    makers: dict[str, Callable[[], bytes | None]] = {
        "loss": partial(_panels, view, view.cells, _curves, 2, "loss by step"),
        "methods": partial(_by_method, view),
        "rates": partial(_panels, view, view.cells, _by_rate, 2, "loss by rate"),
        "cost": partial(_by_cost, view, list(longest.values())),
    }
    made = {name: makers[name]() for name in names}
    return {name: picture for name, picture in made.items() if picture is not None}


Panel = Callable[[Any, TaskSummary, View, dict[str, Style]], None]


def _panels(view: View, cells: Sequence[TaskSummary], panel: Panel, columns: int, kind: str) -> bytes | None:
    """A picture with a panel for each cell and one legend; `None` if all are empty."""
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure = new_figure(_WIDTH, 3.0 * rows + 1.0 if columns > 1 else 4.4)
    styles = view.styles()
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, cell in zip(grid, cells, strict=False):
        axes.set_title(title_of(cell), fontsize=10, parse_math=False)
        axes.grid(which="both", alpha=0.2)
        panel(axes, cell, view, styles)
    free = figure.axes[len(cells) :]
    for axes in free:
        axes.set_axis_off()
    if not any(axes.has_data() for axes in figure.axes):
        return None
    _legend(free[0] if free else figure, styles)
    return as_png(figure, dpi=130)


def title_of(cell: TaskSummary) -> str:
    """The cell in one line."""
    return f"{cell.task.replace('_', ' ')}, r = {cell.rank}, {cell.steps:,} steps"


def _legend(place: Any, styles: Mapping[str, Style]) -> None:
    """One legend, in a free panel or below all: the highlighted methods, and a word for the others."""
    shown = [Line2D([], [], **style) for style in styles.values() if style["color"] != _OTHER]
    if len(shown) < len(styles):
        shown.append(Line2D([], [], color=_OTHER, linewidth=1, label="other methods"))
    of_all = hasattr(place, "subplots")
    where = {"loc": "outside lower center", "ncols": 3} if of_all else {"loc": "center", "labelspacing": 1.0}
    for text in place.legend(handles=shown, fontsize=8.5, frameon=False, **where).get_texts():
        text.set_parse_math(False)  # a title may have dollars


def _curves(axes: Any, cell: TaskSummary, view: View, styles: dict[str, Style]) -> None:
    drawn = []
    for method in cell.methods:
        if method.loss_curve:
            style, losses = styles[method.method], smooth(method.loss_curve, max(2, len(method.loss_curve) // 30))
            strong = style["color"] != _OTHER
            axes.plot(method.curve_steps, losses, **{**style, "marker": None, "linewidth": 1.6 if strong else 0.8})
            drawn += losses if strong else []
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if drawn and min(drawn) > 0:
        axes.set_ylim(0.92 * min(drawn), 1.08 * max(drawn))  # others may blow up
    _plain_losses(axes.yaxis)


def _by_rate(axes: Any, cell: TaskSummary, view: View, styles: dict[str, Style]) -> None:
    """The test loss of the seeds that choose the rate, and a ring around the chosen one."""
    axes.set(xlabel="learning rate", ylabel="test loss", xscale="log", yscale="log")
    best, crosses = [], set()
    for method in cell.methods:
        style = styles[method.method]
        strong = style["color"] != _OTHER
        size = {"markersize": 4, "linewidth": 1.4} if strong else {"markersize": 0, "linewidth": 0.8}
        losses = {rate.learning_rate: _deciding(rate.test.get("loss", {}), view) for rate in method.rates}
        found = {rate: values for rate, values in losses.items() if values}
        if found:
            means = [statistics.fmean(values) for values in found.values()]
            errors = [standard_error(values) or 0.0 for values in found.values()]
            axes.errorbar(list(found), means, yerr=errors if strong else None, capsize=2, **{**style, **size})
            best.append(min(means))
            if method.learning_rate in found and strong:
                ring = {"markersize": 10, "markerfacecolor": "none", "linestyle": "none", "marker": "o"}
                place = list(found).index(method.learning_rate)
                axes.plot(method.learning_rate, means[place], markeredgecolor=style["color"], **ring)
        for rate in method.rates:
            if any(status not in (FINISHED, MISSING) for status in rate.status.values()):
                crosses.add((rate.learning_rate, style["color"]))
    for value, color in sorted(crosses):
        mark = {"marker": "x", "markersize": 7, "linestyle": "none", "color": color}
        axes.plot(value, 0.97, transform=axes.get_xaxis_transform(), **mark)
    if best and min(best) > 0:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.9 * min(best)), min(high, _WORST * min(best)))
    _plain_losses(axes.yaxis)
    _plain_rates(axes.xaxis)


def _deciding(by_seed: Mapping[str, float], view: View) -> list[float]:
    """The figures of the tuning seeds, or of all seeds where there are none."""
    chosen = [value for seed, value in by_seed.items() if int(seed) in view.tuning_seeds]
    return chosen or list(by_seed.values())


def _by_method(view: View) -> bytes | None:
    """Final and early loss over the baseline's: a row for each method, a column for each cell."""
    cells = [cell for cell in view.cells if (base := method_of(cell, view.baseline)) is not None and base.test]
    order = [each.method for each in standings(cells, view.baseline, view.reference)][::-1]
    if not cells:
        return None
    columns, styles = min(3, len(cells)), view.styles()
    rows = [cells[place : place + columns] for place in range(0, len(cells), columns)]
    names = [[name for name in order if any(_has(cell, name) for cell in row)] for row in rows]
    heights = [0.24 * len(each) + 1.1 for each in names]
    figure = new_figure(_WIDTH, sum(heights) + 0.4)
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row", height_ratios=heights)
    for place, axes in enumerate(grid.flat):
        if place >= len(cells):
            axes.set_axis_off()
            continue
        cell, shown = cells[place], names[place // columns]
        axes.set_title(title_of(cell).replace(", ", "\n", 1), fontsize=9, parse_math=False)
        axes.set(xscale="log", xlabel="loss over the baseline's")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.grid(axis="both", alpha=0.2)
        _ratios(axes, cell, view.baseline, shown, styles)
        axes.set_yticks(range(len(shown)), [styles[name]["label"] for name in shown], fontsize=8.5, parse_math=False)
        _plain_losses(axes.xaxis, 3)
    kinds = [("final test loss", "black"), ("early: training loss of the first quarter", "white")]
    marks = [Line2D([], [], marker="o", ls="", c="black", mfc=fill, label=label) for label, fill in kinds]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    return as_png(figure, dpi=130)


def _has(cell: TaskSummary, name: str) -> bool:
    return (method := method_of(cell, name)) is not None and bool(method.test)


def _ratios(axes: Any, cell: TaskSummary, baseline: str, names: Sequence[str], styles: dict[str, Style]) -> None:
    base = method_of(cell, baseline)
    assert base is not None
    for place, name in enumerate(names):
        method = method_of(cell, name)
        if method is None or not method.test:
            continue
        color = styles[name]["color"] if styles[name]["color"] != _OTHER else "#7a7a7a"
        pairs = [(method.test["loss"], base.test["loss"], method.against_baseline, color, 0.13)]
        if method.early is not None and base.early is not None:
            pairs.append((method.early, base.early, method.early_against_baseline, "white", -0.13))
        for own, other, test, fill, offset in pairs:
            if own.mean > 0 and other.mean > 0:
                value = min(max(own.mean / other.mean, _RATIOS[0]), _RATIOS[1])
                error = 0.0 if test is None or test.error is None else test.error / other.mean
                look = {"marker": "o", "markersize": 5, "color": color, "markerfacecolor": fill, "capsize": 2}
                axes.errorbar(value, place + offset, xerr=min(error, value / 2), **look)


def _by_cost(view: View, cells: Sequence[TaskSummary]) -> bytes | None:
    """The final loss by the optimizer's state and by the time of a step, one row for each cell.

    Times are left out where other work was on the machine.
    """
    kinds = {"state_bytes": ("optimizer state, MiB", 2.0**-20)}
    if all(cell.times_compare for cell in cells):
        kinds["step_ms"] = ("time of a step, ms", 1.0)
    figure = new_figure(_WIDTH, 3.0 * len(cells) + 1.0)
    styles = view.styles()
    for row, cell in zip(figure.subplots(len(cells), len(kinds), squeeze=False), cells, strict=True):
        for axes, (kind, (label, unit)) in zip(row, kinds.items(), strict=True):
            axes.set_title(title_of(cell), fontsize=10, parse_math=False)
            axes.set(xlabel=label, ylabel="test loss", xscale="log")
            axes.grid(alpha=0.2)
            for method in cell.methods:
                if method.test and (cost := method.cost.get(kind)):
                    own, style = method.test["loss"], {**styles[method.method], "linestyle": "none"}
                    axes.errorbar(cost * unit, own.mean, yerr=own.error or 0.0, capsize=2, **style)
            _plain_losses(axes.xaxis)
            axes.yaxis.set_major_locator(MaxNLocator(5))
    if not any(axes.has_data() for axes in figure.axes):
        return None
    _legend(figure, styles)
    return as_png(figure, dpi=130)


def _plain_losses(axis: Any, most: int = 5) -> None:
    """Few plain numbers on a logarithmic axis."""
    low, high = axis.get_view_interval()
    wide = low > 0 and high / low > 6.0
    decades = math.log10(high / low) if wide else 0.0
    parts = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=parts) if wide else MaxNLocator(most))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, place: f"{value:.3g}")
    axis.set_minor_formatter(NullFormatter())


def _plain_rates(axis: Any) -> None:
    """Rates as 1e-3 and 3e-3."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if low > 0 and high / low < 1e3 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, place: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+"))
