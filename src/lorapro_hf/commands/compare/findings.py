"""What do all cells of a comparison say together? A cell is a task at one rank and number of steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorapro_hf.commands.compare.summary import MethodSummary, Summary, TaskSummary

_NAMED = 4  # methods in a list of a sentence
CELL = "a task at one rank and number of steps"


@dataclass(frozen=True)
class Standing:
    """A method over all cells. The ratios are geometric means over the cells that have both figures."""

    method: str
    title: str
    cells: int  # those in which it has a best rate
    better: int  # cells whose final test loss is below the baseline's by more than two standard errors
    level: int
    worse: int
    final: float | None  # final test loss over the baseline's
    early: float | None  # loss of the first quarter over the baseline's
    final_of_reference: float | None
    early_of_reference: float | None
    time: float | None  # of a step, over the baseline's, in the cells whose times compare
    state: float | None  # of the optimizer, over the baseline's


def standings(cells: Sequence[TaskSummary], baseline: str, reference: str) -> list[Standing]:
    """A line for each method: the lowest final loss first, and methods without one last."""
    titles = {method.method: method.title for cell in cells for method in cell.methods}
    found = [_standing(name, title, cells, baseline, reference) for name, title in titles.items()]
    return sorted(found, key=lambda each: float("inf") if each.final is None else each.final)


def _standing(name: str, title: str, cells: Sequence[TaskSummary], baseline: str, reference: str) -> Standing:
    verdicts = [cell.verdicts["loss"] for cell in cells]
    final = lambda method: method.test["loss"].mean if method.test else None  # noqa: E731
    early = lambda method: None if method.early is None else method.early.mean  # noqa: E731
    time = lambda method: method.cost.get("step_ms")  # noqa: E731
    state = lambda method: method.cost.get("state_bytes")  # noqa: E731
    return Standing(
        name,
        title,
        sum(bool((own := method_of(cell, name)) and own.test) for cell in cells),
        sum(name in verdict.better for verdict in verdicts),
        sum(name in verdict.level for verdict in verdicts),
        sum(name in verdict.worse for verdict in verdicts),
        ratio(cells, name, baseline, final),
        ratio(cells, name, baseline, early),
        ratio(cells, name, reference, final),
        ratio(cells, name, reference, early),
        ratio([cell for cell in cells if cell.times_compare], name, baseline, time),
        ratio(cells, name, baseline, state),
    )


def ratio(
    cells: Sequence[TaskSummary], name: str, other: str, figure: Callable[[MethodSummary], float | None]
) -> float | None:
    """A figure of one method over that of another: the geometric mean over the cells that have both."""
    ratios = []
    for cell in cells:
        pair = [method_of(cell, each) for each in (name, other)]
        own, base = (None if method is None else figure(method) for method in pair)
        if own is not None and base is not None and own > 0 and base > 0:
            ratios.append(own / base)
    return statistics.geometric_mean(ratios) if ratios else None


def method_of(cell: TaskSummary, name: str) -> MethodSummary | None:
    """A method of a cell, if the cell has it."""
    return next((method for method in cell.methods if method.method == name), None)


def best_of(found: Sequence[Standing], names: Sequence[str]) -> Standing | None:
    """The method with the lowest final loss among some."""
    return next((each for each in found if each.method in names and each.final is not None), None)


def ours_of(summary: Summary) -> list[str]:
    """The names of the methods that are LoRA-Pro."""
    return [method["name"] for method in summary.settings["methods"] if method["optimizer"] == "lorapro"]


def sentences(summary: Summary) -> list[str]:
    """Who beats the baseline, how the best LoRA-Pro (or, without any, the best) stands to the reference, its cost."""
    cells, settings, ours = summary.comparisons, summary.settings, ours_of(summary)
    baseline, reference = settings["baseline"], settings["reference"]
    found = standings(cells, baseline, reference)
    titles = {each.method: each.title for each in found}
    base, goal = titles.get(baseline, baseline), titles.get(reference, reference)
    others = [each for each in found if each.method not in (baseline, reference)]
    result = [_judgement(others, base, len(cells))]
    of_ours = best_of(others, ours)
    leader = of_ours or best_of(others, [each.method for each in others])
    if leader is None:
        return result
    kind = "LoRA-Pro's methods" if of_ours else "the other methods"
    own = [cell for cell in cells if (method := method_of(cell, leader.method)) is not None and method.test]
    lora = next(each for each in standings(own, baseline, reference) if each.method == baseline)
    if leader.final_of_reference is not None and leader.early_of_reference is not None:
        result.append(
            f"Of {kind}, {leader.title} has the lowest final loss: {_times(leader.final_of_reference)} that of {goal}, "
            f"and {_times(leader.early_of_reference)} in the first quarter of the steps "
            f"({base}: {_times(lora.final_of_reference)} and {_times(lora.early_of_reference)})."
        )
    if leader.state is not None:
        state = f"keeps {_times(leader.state)} the state"
        timed = f"A step of {leader.title} takes {_times(leader.time)} the time of {base}, and its optimizer {state}."
        untimed = f"The optimizer of {leader.title} {state} of {base}."
        result.append(untimed if leader.time is None else timed)
    return result


def _judgement(others: Sequence[Standing], base: str, cells: int) -> str:
    """Which methods beat the baseline, lose to it, or do neither."""
    judged = [each for each in others if each.better + each.level + each.worse]
    if not judged:
        return f"No method is judged against {base}: that takes finished runs of both under several seeds."
    better = sorted((each for each in judged if each.better), key=lambda each: -each.better)
    worse = sorted((each for each in judged if each.worse), key=lambda each: -each.worse)
    level = [each.title for each in judged if not each.better + each.worse]
    parts = [f"{base} is beaten by {listed([_counted(each, each.better, cells) for each in better])}"]
    parts.append(f"it beats {listed([_counted(each, each.worse, cells) for each in worse])}")
    parts += [f"it is level with {listed(level)}{' everywhere' if cells > 1 else ''}"] if level else []
    over = f" over {cells} cells (a cell is {CELL})" if cells > 1 else ""
    return f"By more than two standard errors of the final test loss{over}, {'; '.join(parts)}."


def _counted(standing: Standing, count: int, cells: int) -> str:
    return standing.title + (f" ({count} of {standing.cells} cells)" if cells > 1 else "")


def listed(names: Sequence[str]) -> str:
    """The first few names, without commas of their own, and the number of the others; "no method" of none."""
    names = [name.replace(", ", " ") for name in names]
    shown = [*names] if len(names) <= _NAMED else [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown) or "no method"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} times"


def within_noise(cell: TaskSummary, settings: dict[str, Any]) -> bool:
    """Whether the reference is not better than the baseline by more than two standard errors."""
    return settings["reference"] not in cell.verdicts["loss"].better
