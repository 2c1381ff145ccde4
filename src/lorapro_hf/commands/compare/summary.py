"""What does a comparison show? A summary of its two files."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorapro_hf.commands.compare.significance import PairedTest, holm, paired
from lorapro_hf.commands.compare.store import DIVERGED, FAILED, FINISHED, RunRecord, Store

MISSING = "missing"
LAST = 4  # the last of so many parts of a training says how it ended
UNEVEN = 1.2  # slowest over fastest median step of a method's seeds at one rate: beyond it other work ran
_COSTS = ("step_ms", "optimizer_ms", "train_s", "setup_s", "state_bytes", "peak_bytes", "trainable")
_DIGITS = 5  # of the losses of a curve

Runs = Sequence[RunRecord]


@dataclass
class RateSummary:
    """One learning rate of one method over all seeds, which are the keys of all mappings."""

    learning_rate: float
    validation_loss: float | None  # the mean over the seeds if all have finished: it decides
    status: dict[str, str]
    no_better: list[int]  # seeds that finished with a mean loss of the last quarter not below the first loss
    keys: dict[str, str]  # of the runs
    test: dict[str, dict[str, float]]  # metrics, of the seeds that have finished


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
    at_edge: str | None = None  # "lowest" or "highest": the end of a grid of several, beyond which may be a better one
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
    """The summary of the runs that the `sweep.json` of a folder lists; raises `UsageError` if there is none."""
    sweep, records = store.sweep(), store.records()
    # runs of one key differ in the names of their methods
    runs = [replace(records.get(run["key"], RunRecord(**run, status=MISSING)), **run) for run in sweep["runs"]]
    environments = [run.environment for run in runs if run.status != MISSING] or [sweep["environment"]]
    return Summary(
        sweep["settings"],
        {name: value for name, value in environments[0].items() if all(e.get(name) == value for e in environments)},
        len({run.key for run in runs if run.status == MISSING}),
        [_of_task(sweep, runs, task["name"], rank) for task in sweep["settings"]["tasks"] for rank in task["ranks"]],
        [
            {**entry, "status": run.status, "reason": _reason(run)}
            for entry, run in zip(sweep["runs"], runs, strict=True)
            if run.status in (DIVERGED, FAILED)
        ],
    )


def _reason(run: RunRecord) -> str:
    step = run.diverged_at
    return run.error or (f"loss not finite at step {step}" if step else "held-out loss not finite")


def _of_task(sweep: Mapping[str, Any], runs: Runs, task: str, rank: int) -> TaskSummary:
    runs = [run for run in runs if run.task == task and run.rank in (rank, None)]
    methods = [
        _of_method(name, method["title"], [run for run in runs if run.method == name])
        for name, method in sweep["methods"].items()
    ]
    gap, gap_seeds = _relate(methods, sweep["settings"]["baseline"], sweep["settings"]["reference"])
    return TaskSummary(
        task,
        rank,
        methods,
        list(dict.fromkeys(["loss", *(name for each in methods for rate in each.rates for name in rate.test)])),
        sweep.get("levels", {}).get(task),
        gap,
        gap_seeds,
        _equal_data(runs),
        _step_spread(methods, runs),
    )


def _of_method(name: str, title: str, runs: Runs) -> MethodSummary:
    rates = sorted({run.learning_rate for run in runs})
    found = [_of_rate(rate, [run for run in runs if run.learning_rate == rate]) for rate in rates]
    method = MethodSummary(name, title, found)
    statuses = [run.status for run in runs]
    method.runs = {status: statuses.count(status) for status in (FINISHED, DIVERGED, FAILED, MISSING)}
    method.no_better = sum(len(rate.no_better) for rate in method.rates)
    _choose(method)
    best = [run for run in runs if run.learning_rate == method.learning_rate]
    for cost in _COSTS:
        values = [getattr(run, cost) for run in best if getattr(run, cost) is not None]
        method.cost[cost] = statistics.median(values) if values else None
    curves = zip(*(run.losses for run in best), strict=True)
    method.loss_curve = [float(f"{statistics.fmean(losses):.{_DIGITS}g}") for losses in curves]
    for metric, by_seed in {} if method.best is None else method.best.test.items():
        values = list(by_seed.values())
        std = statistics.stdev(values) if len(values) > 1 else None
        method.test[metric] = {"mean": statistics.fmean(values), "std": std}
    return method


def _of_rate(value: float, runs: Runs) -> RateSummary:
    finished = {str(run.seed): run for run in runs if run.status == FINISHED}
    scores = {seed: run.scores for seed, run in finished.items() if run.scores is not None}
    validation = [each["validation"]["loss"] for each in scores.values()]
    metrics = dict.fromkeys(name for each in scores.values() for name in each["test"])
    return RateSummary(
        value,
        statistics.fmean(validation) if len(validation) == len(runs) else None,
        {str(run.seed): run.status for run in runs},
        [int(seed) for seed in scores if _blew_up(finished[seed].losses)],
        {str(run.seed): run.key for run in runs},
        {name: {seed: each["test"][name] for seed, each in scores.items()} for name in metrics},
    )


def _blew_up(losses: Sequence[float]) -> bool:
    return len(losses) > 1 and statistics.fmean(losses[-max(1, len(losses) // LAST) :]) >= losses[0]


def _choose(method: MethodSummary) -> None:
    """Find the best rate of a method, and whether it is an end of its grid."""
    whole = [rate for rate in method.rates if rate.validation_loss is not None]
    candidates = [rate for rate in whole if not rate.no_better] or whole
    if not candidates:
        return
    best = min(candidates, key=lambda rate: rate.validation_loss or 0.0)
    method.learning_rate = best.learning_rate
    if len(method.rates) > 1 and best in (method.rates[0], method.rates[-1]):
        method.at_edge = "lowest" if best is method.rates[0] else "highest"


def _relate(methods: Sequence[MethodSummary], baseline: str, reference: str) -> tuple[float | None, int]:
    """Compare every method with the baseline; returns the gap to the reference and the seeds that show it."""
    losses = {each.method: each.best.test["loss"] for each in methods if each.best is not None}
    base, goal = losses.get(baseline), losses.get(reference)
    if base is None:
        return None, 0
    start = statistics.fmean(base.values())
    gap = None if goal is None else start - statistics.fmean(goal.values())
    tests: dict[str, PairedTest] = {}
    for each in methods:
        own = losses.get(each.method)
        if own is None or each.method == baseline:
            continue
        each.against_baseline = paired(own, base)
        if each.against_baseline is not None and each.against_baseline.t_test is not None:
            tests[each.method] = each.against_baseline
        if gap is not None and gap > 0:
            each.gap_closed = (start - statistics.fmean(own.values())) / gap
    for name, value in holm({name: test.t_test or 0.0 for name, test in tests.items()}).items():
        tests[name].t_test_holm = value
    return gap, 0 if goal is None else sum(goal[seed] < base[seed] for seed in goal.keys() & base.keys())


def _equal_data(runs: Runs) -> bool:
    hashes: dict[int | str, set[str | None]] = defaultdict(set)
    for run in runs:
        hashes[run.seed].add(run.data)
        hashes["all seeds"].add(run.examples)
    return all(len(each - {None}) <= 1 for each in hashes.values())


def _step_spread(methods: Sequence[MethodSummary], runs: Runs) -> StepSpread | None:
    times: dict[tuple[str, float | None], list[float]] = defaultdict(list)
    for run in runs:
        if run.step_ms:
            times[run.method, run.learning_rate].append(run.step_ms)
    ratios = {place: max(each) / min(each) for place, each in times.items() if len(each) > 1}
    if not ratios:
        return None
    best = [ratios[m.method, m.learning_rate] for m in methods if (m.method, m.learning_rate) in ratios]
    uneven = sum(ratio > UNEVEN for ratio in ratios.values())
    return StepSpread(len(ratios), uneven, max(ratios.values()), max(best, default=None))
