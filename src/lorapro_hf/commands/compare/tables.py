"""What stands in the main tables of a comparison, in the report and in the terminal?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lorapro_hf.commands.compare.findings import standings, within_noise
from lorapro_hf.commands.compare.significance import Estimate
from lorapro_hf.commands.compare.summary import MethodSummary, Summary, TaskSummary

NONE = "–"
_EDGES = {"lowest": " ↓", "highest": " ↑", None: ""}
_MARKDOWN = {"better": "**", "worse": "*"}
_RICH = {"better": "bold green", "worse": "dim"}
_AT_ONCE = 2  # cells that the terminal shows in full


@dataclass(frozen=True)
class Grid:
    """A table: texts, and by row and column those that are "better" or "worse" than the baseline's."""

    title: str
    header: list[str]
    rows: list[list[str]]
    judged: dict[tuple[int, int], str]

    def markdown(self) -> str:
        """The table of GitHub's Markdown: bold is better, italic worse."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)]]
        for number, row in enumerate(self.rows):
            marks = [_MARKDOWN.get(self.judged.get((number, place), ""), "") for place in range(len(row))]
            lines.append([f"{mark}{plain(text)}{mark}" for mark, text in zip(marks, row, strict=True)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self) -> Table:
        """The table of a terminal: bold is better, dim worse."""
        table = Table(title=Text(self.title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
        for place, name in enumerate(self.header):
            table.add_column(Text(name.replace(" ", "\n")), justify="right" if place else "left")
        for number, row in enumerate(self.rows):
            styles = [_RICH.get(self.judged.get((number, place), ""), "") for place in range(len(row))]
            table.add_row(*(Text(text, style) for style, text in zip(styles, row, strict=True)))
        return table


def plain(text: object) -> str:
    """Text on one line, without marks of Markdown."""
    line = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_|<>[]" else letter for letter in line)


def shown(summary: Summary) -> list[Grid]:
    """The tables of the terminal: each cell of a small comparison, or the overview of a large one."""
    if len(summary.comparisons) > _AT_ONCE:
        return [overview(summary)]
    return [of_cell(cell, summary.settings) for cell in summary.comparisons]


def name_of(cell: TaskSummary) -> str:
    """The cell in one line."""
    return f"{cell.task}, rank {cell.rank}, {cell.steps} steps"


def of_cell(cell: TaskSummary, settings: dict[str, Any]) -> Grid:
    """The figures of each method at its best rate; the share of the gap only where there is one beyond the noise."""
    metrics, gap = cell.metrics, not within_noise(cell, settings)
    names = ["test loss", *(metric.replace("_", " ") for metric in metrics[1:])]
    header = ["method", "rate", *names, "early loss", *(["gap closed"] if gap else [])]
    rows, judged = [], {}
    for number, method in enumerate(cell.methods):
        row = [method.title, rate_of(method), *(spread(method.test.get(metric)) for metric in metrics)]
        row.append(spread(method.early))
        rows.append([*row, _closed(method, settings["baseline"])] if gap else row)
        for place, figure in ((2, "loss"), (2 + len(metrics), "early")):
            verdict = cell.verdicts[figure]
            for kind, named in (("better", verdict.better), ("worse", verdict.worse)):
                if method.method in named:
                    judged[number, place] = kind
    return Grid(name_of(cell), header, rows, judged)


def rate_of(method: MethodSummary) -> str:
    """The best rate, with an arrow where it is the end of the tried ones."""
    if method.learning_rate is None:
        return NONE if method.runs["missing"] else "none finished"
    return f"{method.learning_rate:.3g}{_EDGES[method.at_edge]}"


def spread(figure: Estimate | None) -> str:
    """Mean ± standard error, with two digits of the latter."""
    if figure is None:
        return NONE
    if figure.error is None:
        return f"{figure.mean:.4f}"
    digits = min(5, max(2, 1 - math.floor(math.log10(figure.error)))) if figure.error > 0 else 4
    return f"{figure.mean:.{digits}f} ± {figure.error:.{digits}f}"


def _closed(method: MethodSummary, baseline: str) -> str:
    if method.method == baseline:
        return "0%"
    return NONE if method.gap_closed is None else f"{method.gap_closed:.0%}"


def overview(summary: Summary) -> Grid:
    """The standing of each method over all cells."""
    settings = summary.settings
    found = standings(summary.comparisons, settings["baseline"], settings["reference"])
    titles = {each.method: each.title for each in found}
    base, goal = (titles.get(settings[key], settings[key]) for key in ("baseline", "reference"))
    header = ["method", "better, level, worse", "final loss", "early loss", f"early / {goal}", "step time", "state"]
    rows = []
    for each in found:
        counts = f"{each.better}, {each.level}, {each.worse}" if each.better + each.level + each.worse else NONE
        ratios = (each.final, each.early, each.early_of_reference, each.time, each.state)
        rows.append([each.title, counts, *(NONE if value is None else f"×{value:.2f}" for value in ratios)])
    return Grid(f"All cells, beside {base}", header, rows, {})
