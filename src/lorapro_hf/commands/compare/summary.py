"""What does a comparison show? A summary of its two files."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorapro_hf.commands.compare.significance import PairedTest, holm, paired
from lorapro_hf.commands.compare.store import DIVERGED, FAILED, FINISHED, RunRecord, Store

MISSING = "missing"
NEAR_BEST = 0.02  # rates whose loss is within this fraction of the best count as good
LAST = 4  # the last of so many parts of a training says how it ended
UNEVEN = 1.2  # slowest over fastest median step of a method's seeds at one rate: beyond it other work ran
_COSTS = ("step_ms", "optimizer_ms", "train_s", "setup_s", "state_bytes", "peak_bytes", "trainable")
_DIGITS = 5  # of the losses of a curve


@dataclass
class RateSummary:
    """One learning rate of one method over all seeds, which are the keys of all mappings."""

    learning_rate: float
    validation_loss: float | None  # the mean over the seeds if all have finished: it decides
    status: dict[str, str]
    no_better: list[
        int
    ]  # seeds whose training loss in the last quarter is in the mean not below that of the first step
    keys: dict[str, str]  # of the runs
    test: dict[str, dict[str, float]]  # metrics, of the seeds that have finished

    @property
    def whole(self) -> bool:
        """Whether all seeds have finished."""
        return set(self.status.values()) == {FINISHED}


@dataclass
class MethodSummary:
    """A method in one comparison, at its own best learning rate.

    That is the rate with the lowest mean validation loss of those at which all seeds have finished; one at which a seed
    finished no better than it began only if there is no other.
    """

    method: str
    title: str
    rates: list[RateSummary]  # in ascending order
    learning_rate: float | None = None  # the best
    at_edge: str | None = (
        None  # "lowest" or "highest" if that is an end of a grid of several: a better one may lie beyond
    )
    ties: list[float] = field(default_factory=list)  # rates that are worse by no more than the best's standard error
    good_range: tuple[float, float] | None = None  # around the best, with a validation loss within 2 % of its own
    good_at_edge: list[str] = field(default_factory=list)  # ends of that range that are ends of the grid
    test: dict[str, dict[str, float | None]] = field(default_factory=dict)  # mean and std of each metric
    cost: dict[str, float | None] = field(default_factory=dict)  # medians over the seeds
    loss_curve: list[float] = field(default_factory=list)  # the mean training loss of each step
    gap_closed: float | None = None  # fraction of the way from the baseline's loss to the reference's
    against_baseline: PairedTest | None = None
    runs: dict[str, int] = field(default_factory=dict)  # the number of runs by status, over all rates
    no_better: int = 0  # the number of runs that ended no better than they began, over all rates

    @property
    def best(self) -> RateSummary | None:
        """The best rate."""
        return next((rate for rate in self.rates if rate.learning_rate == self.learning_rate), None)


@dataclass
class StepSpread:
    """How evenly the steps of equal runs went: ratios of the slowest to the fastest seed of a method and rate."""

    rates: int  # the number of ratios
    uneven: int  # the number of those beyond 1.2
    largest: float
    best: float | None  # the largest at the methods' best rates


@dataclass
class TaskSummary:
    """All methods on one task at one rank."""

    task: str
    rank: int
    methods: list[MethodSummary]  # in the order of the YAML
    metrics: list[str]  # `loss` first
    levels: dict[str, Any] | None  # the reference losses, if they are known
    gap: float | None  # the baseline's test loss less the reference's; None without both
    gap_seeds: int  # the number of seeds on which the reference is the better one
    equal_data: bool  # whether all runs have the same examples, and those of a seed saw the same batches
    step_spread: StepSpread | None  # None without step times of several seeds


@dataclass
class Summary:
    """The content of `summary.json`."""

    settings: dict[str, Any]
    environment: dict[str, Any]  # the values that all runs have in common
    missing: int  # the number of runs that are still to come
    comparisons: list[TaskSummary]  # one for each task and rank
    unfinished: list[dict[str, Any]]  # runs that diverged or failed, and why


def summarize(store: Store) -> Summary:
    """The summary of a folder, of the runs that its `sweep.json` lists and no others.

    Raises:
        UsageError: there is no comparison in the folder.
    """
    sweep, records = store.sweep(), store.records()
    keys = list(dict.fromkeys(run["key"] for run in sweep["runs"]))
    used = [records[key].environment for key in keys if key in records] or [sweep["environment"]]
    return Summary(
        sweep["settings"],
        {name: value for name, value in used[0].items() if all(each.get(name) == value for each in used)},
        sum(key not in records for key in keys),
        [_of_task(sweep, records, task, rank) for task in sweep["settings"]["tasks"] for rank in task["ranks"]],
        [
            {**run, "status": records[run["key"]].status, "reason": _reason(records[run["key"]])}
            for run in sweep["runs"]
            if run["key"] in records and records[run["key"]].status in (DIVERGED, FAILED)
        ],
    )


def _reason(record: RunRecord) -> str:
    step = record.diverged_at
    return record.error or (f"loss not finite at step {step}" if step else "held-out loss not finite")


def _of_task(
    sweep: Mapping[str, Any], records: Mapping[str, RunRecord], task: Mapping[str, Any], rank: int
) -> TaskSummary:
    runs = [run for run in sweep["runs"] if run["task"] == task["name"] and run["rank"] in (rank, None)]
    done = [records[run["key"]] for run in runs if run["key"] in records]
    methods = [
        _of_method(name, method["title"], [run for run in runs if run["method"] == name], records)
        for name, method in sweep["methods"].items()
    ]
    metrics = dict.fromkeys(["loss", *(name for each in methods for rate in each.rates for name in rate.test)])
    gap, gap_seeds = _relate(methods, sweep["settings"]["baseline"], sweep["settings"]["reference"])
    return TaskSummary(
        task["name"],
        rank,
        methods,
        list(metrics),
        sweep.get("levels", {}).get(task["name"]),
        gap,
        gap_seeds,
        _equal_data(done),
        _step_spread(methods, records),
    )


def _of_method(
    name: str, title: str, runs: Sequence[Mapping[str, Any]], records: Mapping[str, RunRecord]
) -> MethodSummary:
    rates = sorted({run["learning_rate"] for run in runs})
    found = [_of_rate(rate, [run for run in runs if run["learning_rate"] == rate], records) for rate in rates]
    summary = MethodSummary(name, title, found)
    statuses = [status for rate in found for status in rate.status.values()]
    summary.runs = {status: statuses.count(status) for status in (FINISHED, DIVERGED, FAILED, MISSING)}
    summary.no_better = sum(len(rate.no_better) for rate in found)
    _choose(summary, records)
    best = [] if summary.best is None else [records[key] for key in summary.best.keys.values() if key in records]
    for cost in _COSTS:
        values = [getattr(record, cost) for record in best if getattr(record, cost) is not None]
        summary.cost[cost] = statistics.median(values) if values else None
    curves = zip(*(record.losses for record in best), strict=True)
    summary.loss_curve = [float(f"{statistics.fmean(losses):.{_DIGITS}g}") for losses in curves]
    for metric, by_seed in {} if summary.best is None else summary.best.test.items():
        values = list(by_seed.values())
        summary.test[metric] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
    return summary


def _of_rate(value: float, runs: Sequence[Mapping[str, Any]], records: Mapping[str, RunRecord]) -> RateSummary:
    done = {str(run["seed"]): records[run["key"]] for run in runs if run["key"] in records}
    status = {str(run["seed"]): MISSING for run in runs} | {seed: record.status for seed, record in done.items()}
    scores = {seed: record.scores for seed, record in done.items() if record.status == FINISHED and record.scores}
    metrics = dict.fromkeys(name for each in scores.values() for name in each["test"])
    validation = [each["validation"]["loss"] for each in scores.values()]
    return RateSummary(
        value,
        statistics.fmean(validation) if len(validation) == len(status) else None,
        status,
        [int(seed) for seed in scores if _blew_up(done[seed].losses)],
        {str(run["seed"]): run["key"] for run in runs},
        {name: {seed: each["test"][name] for seed, each in scores.items()} for name in metrics},
    )


def _blew_up(losses: Sequence[float]) -> bool:
    return len(losses) > 1 and statistics.fmean(losses[-max(1, len(losses) // LAST) :]) >= losses[0]


def _choose(method: MethodSummary, records: Mapping[str, RunRecord]) -> None:
    """Find the best rate of a method and say how sure that is."""
    every = {rate.learning_rate: rate.validation_loss for rate in method.rates if rate.validation_loss is not None}
    if not every:
        return
    blew_up = {rate.learning_rate for rate in method.rates if rate.no_better}
    losses = {rate: loss for rate, loss in every.items() if rate not in blew_up}
    candidates = losses or every
    best = method.learning_rate = min(candidates, key=lambda rate: candidates[rate])
    grid = [rate.learning_rate for rate in method.rates]
    place = grid.index(best)
    if len(grid) > 1 and place in (0, len(grid) - 1):
        method.at_edge = "lowest" if place == 0 else "highest"
    scores = [records[key].scores or {} for key in method.rates[place].keys.values()]
    values = [each["validation"]["loss"] for each in scores]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    method.ties = [rate for rate, loss in candidates.items() if rate != best and loss - candidates[best] <= error]
    if losses:
        _find_good_range(method, losses, grid, place)


def _find_good_range(method: MethodSummary, losses: Mapping[float, float], grid: Sequence[float], place: int) -> None:
    """Walk from the best rate to both sides as long as the loss stays near its own."""
    limit = losses[grid[place]] + NEAR_BEST * abs(losses[grid[place]])
    low = high = place
    while low > 0 and losses.get(grid[low - 1], limit + 1) <= limit:
        low -= 1
    while high < len(grid) - 1 and losses.get(grid[high + 1], limit + 1) <= limit:
        high += 1
    method.good_range = (grid[low], grid[high])
    ends = {"lowest": low == 0, "highest": high == len(grid) - 1}
    method.good_at_edge = [name for name, reached in ends.items() if reached and len(grid) > 1]


def _relate(methods: Sequence[MethodSummary], baseline: str, reference: str) -> tuple[float | None, int]:
    """Compare every method with the baseline; returns the gap to the reference and the seeds that show it."""
    losses = {each.method: each.best.test["loss"] for each in methods if each.best is not None}
    base, goal = losses.get(baseline), losses.get(reference)
    if base is None:
        return None, 0
    gap = None if goal is None else statistics.fmean(base.values()) - statistics.fmean(goal.values())
    for each in methods:
        if each.method in losses and each.method != baseline:
            own = losses[each.method]
            each.against_baseline = paired(own, base)
            if gap is not None and gap > 0:
                each.gap_closed = (statistics.fmean(base.values()) - statistics.fmean(own.values())) / gap
    tests = {each.method: each.against_baseline for each in methods if each.against_baseline is not None}
    for name, value in holm({name: t.t_test for name, t in tests.items() if t.t_test is not None}).items():
        tests[name].t_test_holm = value
    return gap, 0 if goal is None else sum(goal[seed] < base[seed] for seed in goal.keys() & base.keys())


def _equal_data(records: Iterable[RunRecord]) -> bool:
    seen: dict[int | None, set[str | None]] = {}
    for record in records:
        seen.setdefault(record.seed, set()).add(record.data)
        seen.setdefault(None, set()).add(record.examples)  # of the task, whatever the seed
    return all(len(hashes - {None}) <= 1 for hashes in seen.values())


def _step_spread(methods: Sequence[MethodSummary], records: Mapping[str, RunRecord]) -> StepSpread | None:
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for method in methods:
        for rate in method.rates:
            done = [records[key].step_ms for key in rate.keys.values() if key in records]
            times = [time for time in done if time]
            if len(times) > 1:
                ratios[rate.learning_rate == method.learning_rate].append(max(times) / min(times))
    every = ratios[True] + ratios[False]
    if not every:
        return None
    return StepSpread(len(every), sum(x > UNEVEN for x in every), max(every), max(ratios[True], default=None))
