"""What do the cells say about the targets, the neighbours and two published claims?"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from lorapro_hf.commands.compare.findings import method_of
from lorapro_hf.commands.compare.significance import ERRORS, paired
from lorapro_hf.commands.compare.summary import MethodSummary, Summary, TaskSummary
from lorapro_hf.commands.compare.tables import spread
from results_parts.summaries import Cell

LORA, FULL = "lora", "full"
PEERS = (LORA, "rslora", "loraplus", "dora", "pissa", "loraga", "lorafa", "riemannian", "lorarite")
NEIGHBOURS = ("lora_one", "lora_sb", "gelora", "flat_lora", "ggpo", "mgpo", "beamlora", "xgblora")
STARTS = ("lora_one", "loraga", "pissa")
_EARLY, _SOONER, _RANK, _STEPS, _RATE = 1.1, 0.75, 4, 200, 3.0  # the targets
_RULE = 2.0  # of thumb, of docs/choosing.md: the best rate of the default over plain LoRA's
_FIRST = 0.8

Judge = Callable[[Cell], tuple[bool, float] | None]  # whether the target is met, and the figure


def final(cell: TaskSummary, name: str | None) -> MethodSummary | None:
    """A method with a final loss."""
    found = None if name is None else method_of(cell, name)
    return found if found is not None and found.test else None


def word(cell: TaskSummary, name: str, other: str) -> str | None:
    """Whether a method ends better or worse than another by more than two standard errors, or level."""
    own, base = final(cell, name), final(cell, other)
    test = paired(own.test["loss"].by_seed, base.test["loss"].by_seed) if own and base else None
    if test is None or test.error is None:
        return None
    if abs(test.difference) <= ERRORS * test.error:
        return "level"
    return "better" if test.difference < 0 else "worse"


def targets(cells: Sequence[Cell], ours: Sequence[str]) -> list[str]:
    """A line for each target: whether it is met, and the figures of each task."""
    if all(cell.default is None for cell in cells):
        return ["No comparison holds today's default of LoRA-Pro, so its targets are open.", _first(cells, ours)]
    return [
        _line(f"Early loss of the default at most {_EARLY} times full fine-tuning's (r ≥ {_RANK})", cells, _early),
        _line(f"Steps to tuned LoRA's loss at half of its steps, at most {_SOONER:.0%} of them", cells, _sooner, ".0%"),
        _line(f"Final loss over tuned LoRA's, not worse by two standard errors from {_STEPS} steps", cells, _final),
        _first(cells, ours),
        _line(f"Best rate over {_RULE:g} times plain LoRA's best, within a factor of {_RATE:g}", cells, _rate),
    ]


def _line(target: str, cells: Sequence[Cell], judge: Judge, form: str = ".2f") -> str:
    found = {cell.name: (cell.found.task, judged) for cell in cells if (judged := judge(cell)) is not None}
    if not found:
        return f"{target}: open, no cell says it."
    figures = defaultdict(list)
    for task, (_, figure) in found.values():
        figures[task].append(figure)
    shown = ", ".join(f"{task} {_range(values, form)}" for task, values in figures.items())
    missed = [name for name, (_, (met, _)) in found.items() if not met]
    named = _named(missed) if len(missed) < len(found) else ""
    return f"{target}: {_met(len(found) - len(missed), len(found))} ({shown}).{named}"


def _met(met: int, count: int) -> str:
    return f"**{'met' if met == count else 'missed'}**, {met} of {count} cells"


def _named(missed: Sequence[str]) -> str:
    return f" Missed in: {'; '.join(missed)}." if missed else ""


def _range(values: Sequence[float], form: str) -> str:
    ends = [format(value, form) if math.isfinite(value) else "never" for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _early(cell: Cell) -> tuple[bool, float] | None:
    own, goal = final(cell.found, cell.default), final(cell.found, FULL)
    if own is None or goal is None or own.early is None or goal.early is None or cell.found.rank < _RANK:
        return None
    value = own.early.mean / goal.early.mean
    return value <= _EARLY, value


def _sooner(cell: Cell) -> tuple[bool, float] | None:
    own = final(cell.found, cell.default)
    if own is None or (steps := own.steps_to_baseline.get("half")) is None:
        return None
    value = math.inf if steps.mean is None else steps.mean
    return value <= _SOONER, value


def _final(cell: Cell) -> tuple[bool, float] | None:
    own, base = final(cell.found, cell.default), final(cell.found, LORA)
    if own is None or base is None or cell.found.steps < _STEPS:
        return None
    return word(cell.found, own.method, LORA) != "worse", own.test["loss"].mean / base.test["loss"].mean


def _rate(cell: Cell) -> tuple[bool, float] | None:
    own, base = final(cell.found, cell.default), final(cell.found, LORA)
    if own is None or base is None or not own.learning_rate or not base.learning_rate:
        return None
    value = own.learning_rate / (_RULE * base.learning_rate)
    return 1 / _RATE <= value <= _RATE, value


def _first(cells: Sequence[Cell], ours: Sequence[str]) -> str:
    """The best of our methods against the best of the peers."""
    words = {}
    for cell in cells:
        own, peer = _best(cell.found, ours), _best(cell.found, PEERS)
        if own is not None and peer is not None:
            words[cell.name] = word(cell.found, own, peer)
    words = {name: found for name, found in words.items() if found is not None}
    target = f"The best of LoRA-Pro's modes against the best of the peers, first or tied in {_FIRST:.0%} of the cells"
    if not words:
        return f"{target}: open, no cell says it."
    counts = {each: list(words.values()).count(each) for each in ("better", "level", "worse")}
    met = len(words) - counts["worse"]
    verdict = "met" if met >= _FIRST * len(words) else "missed"
    shown = f"first {counts['better']}, tied {counts['level']}, behind {counts['worse']}"
    missed = _named([name for name, each in words.items() if each == "worse"]).replace("Missed", "Behind")
    return f"{target}: **{verdict}**, {met} of {len(words)} ({shown}).{missed}"


def _best(cell: TaskSummary, names: Iterable[str]) -> str | None:
    found = [method for name in names if (method := final(cell, name)) is not None]
    return min(found, key=lambda method: method.test["loss"].mean).method if found else None


def neighbours(summary: Summary) -> list[str]:
    """A verdict for each method beside an optimizer, with AdamW and with LoRA-Pro."""
    lines = []
    titles = {method.method: method.title for cell in summary.comparisons for method in cell.methods}
    ours = alone(summary)
    for name in NEIGHBOURS:
        parts, words = [], []
        for own, base, label in ((name, LORA, "LoRA with AdamW"), (f"pro_{name}", ours, "LoRA-Pro alone")):
            if own in titles and base in titles:
                text, found = _beside(summary.comparisons, own, base, label)
                parts.append(text)
                words += found
        if parts:
            lines.append(f"**{titles[name]}** {' and '.join(parts)}: {_verdict(words)}.")
    return lines


def alone(summary: Summary) -> str:
    """The name of LoRA-Pro with the settings that it has beside the neighbours; empty if it is not compared."""
    methods = {method["name"]: method for method in summary.settings["methods"]}
    beside = next((methods[f"pro_{name}"] for name in NEIGHBOURS if f"pro_{name}" in methods), None)
    plain = [m for m in methods.values() if m["optimizer"] == "lorapro" and not (m["callbacks"] or m["gelora"])]
    same = [m["name"] for m in plain if beside is not None and m["settings"] == beside["settings"]]
    return next(iter(same), "")


def _beside(cells: Sequence[TaskSummary], name: str, base: str, label: str) -> tuple[str, list[str]]:
    words = [found for cell in cells if (found := word(cell, name, base)) is not None]
    ratios, early = [], []
    for cell in cells:
        own, other = final(cell, name), final(cell, base)
        if own is not None and other is not None:
            ratios.append(own.test["loss"].mean / other.test["loss"].mean)
            if own.early is not None and other.early is not None:
                early.append(own.early.mean / other.early.mean)
    if not ratios:
        return f"has no finished rate beside {label}", []
    means = " ".join(f"×{statistics.geometric_mean(each):.2f}" for each in (ratios, early) if each)
    kinds = {"better": "better than", "level": "level with", "worse": "worse than"}
    counts = [f"{kinds[kind]} {label}" for kind in kinds if kind in words] or [f"unjudged beside {label}"]
    return f"is {' or '.join(counts)} (loss, early: {means.replace(' ', ', ')})", words


def _verdict(words: Sequence[str]) -> str:
    kinds = set(words)
    if not kinds:
        return "one seed says nothing"
    if kinds == {"level"}:
        return "no difference shows"
    if "worse" not in kinds:
        return "it helps"
    return "it harms" if "better" not in kinds else "it helps the one and harms the other"


def starts(cells: Sequence[Cell], plain: Mapping[str, str]) -> list[str]:
    """Gradient starts in AdamW and in LoRA-Pro: a line for each cell that has both."""
    lines = []
    for cell in cells:
        pairs = [(name, f"pro_{name}") for name in STARTS if word(cell.found, f"pro_{name}", name) is not None]
        for name, other in [(LORA, plain.get(cell.comparison, "")), *pairs] if pairs else ():
            found, own, base = word(cell.found, other, name), final(cell.found, other), final(cell.found, name)
            if found is not None and own is not None and base is not None:
                title = "no such start" if name == LORA else base.title
                losses = f"{spread(own.test['loss'])} against {spread(base.test['loss'])}"
                lines.append(f"{title}, {cell.name}: {own.title} is {found} ({losses}).")
    return lines


def variants(cells: Sequence[Cell]) -> str | None:
    """How many cells show a variant of LoRA that differs from tuned LoRA."""
    words, ratios = [], []
    for cell in cells:
        for name in PEERS[1:]:
            found, own, base = word(cell.found, name, LORA), final(cell.found, name), final(cell.found, LORA)
            if found is not None and own is not None and base is not None:
                words.append(found)
                ratios.append((own.test["loss"].mean / base.test["loss"].mean, own.title, cell.name))
    if not words:
        return None
    best, title, name = min(ratios)
    counts = ", ".join(f"{words.count(kind)} {kind}" for kind in ("better", "level", "worse"))
    mean = statistics.geometric_mean(ratio for ratio, _, _ in ratios)
    return (
        f"Of {len(words)} pairs of a variant ({len(PEERS) - 1} at most) and a cell, {counts}; the loss is ×{mean:.2f} "
        f"LoRA's in the mean, and ×{best:.2f} at best ({title}, {name})."
    )


def all_runs(summaries: Mapping[str, Summary]) -> str:
    """The number of runs and how they ended, in a sentence's part; a run in several comparisons counts once."""
    found: dict[str, tuple[str, bool]] = {}
    for summary in summaries.values():
        for rate in (rate for cell in summary.comparisons for method in cell.methods for rate in method.rates):
            for seed, key in rate.keys.items():
                found[key] = (rate.status[seed], int(seed) in rate.no_better)
    statuses = [status for status, _ in found.values()]
    bad = ", ".join(f"{statuses.count(kind)} {kind}" for kind in ("diverged", "failed", "missing"))
    return (
        f"{len(found):,} runs: {bad}, and {sum(worse for _, worse in found.values())} ended no better than they began"
    )
