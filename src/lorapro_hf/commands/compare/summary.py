"""What does a comparison show? A summary of its two files."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorapro_hf.commands.compare.measures import (
    GoodRates,
    StepsToBaseline,
    early,
    good_rates,
    short_curve,
    steps_to_baseline,
)
from lorapro_hf.commands.compare.plan import run_key, tuning_of
from lorapro_hf.commands.compare.significance import Estimate, PairedTest, Verdict, estimate, paired_with, verdict
from lorapro_hf.commands.compare.store import DIVERGED, FAILED, FINISHED, RunRecord, Store
from lorapro_hf.commands.compare.tuning import Procedure, Trial, Tuning

MISSING = "missing"
UNEVEN = 1.2  # slowest over fastest median step of a method's seeds at one rate: beyond it other work ran
_COSTS = ("step_ms", "optimizer_ms", "train_s", "setup_s", "state_bytes", "peak_bytes", "trainable")
_PARTS = {"half": 0.5, "end": 1.0}  # of the baseline's steps

Runs = Sequence[RunRecord]


@dataclass
class RateSummary:
    """One learning rate of one method. Seeds are the keys of all mappings, tuning seeds among them."""

    learning_rate: float
    validation_loss: float | None  # the mean over the seeds that decide, if all have finished
    status: dict[str, str]
    no_better: list[int]  # seeds that finished with a mean loss of the last quarter not below the first loss
    keys: dict[str, str]  # of the runs
    test: dict[str, dict[str, float]]  # metrics, of the seeds that have finished


@dataclass
class MethodSummary:
    """A method in one comparison, at its own best learning rate; figures are of the reported seeds alone.

    The best rate is the one with the lowest mean validation loss over the tuning seeds (without them: over the reported
    seeds) of those at which all seeds have finished; one at which a seed finished no better than it began only if there
    is no other.
    """

    method: str
    title: str
    rates: list[RateSummary]  # in ascending order
    learning_rate: float | None = None  # the best
    at_edge: str | None = None  # "lowest" or "highest": the end of the tried rates, beyond which may be a better one
    test: dict[str, Estimate] = field(default_factory=dict)  # each metric of the test set
    early: Estimate | None = None  # the mean training loss of the first quarter of the steps
    steps_to_baseline: dict[str, StepsToBaseline] = field(default_factory=dict)  # its loss at "half" and "end"
    good_rates: GoodRates | None = None
    cost: dict[str, float | None] = field(default_factory=dict)  # medians over the seeds
    curve_steps: list[float] = field(default_factory=list)  # of the loss curve, which has at most 200 points
    loss_curve: list[float] = field(default_factory=list)  # the mean training loss over the seeds
    gap_closed: float | None = None  # fraction of the way from the baseline's loss to the reference's
    against_baseline: PairedTest | None = None  # in test loss
    early_against_baseline: PairedTest | None = None
    early_against_reference: PairedTest | None = None
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

    @property
    def is_busy(self) -> bool:
        """Whether other work was on the machine, at more than a tenth of the ratios, so that no time compares."""
        return 10 * self.uneven > self.rates


@dataclass
class TaskSummary:
    """All methods on one task at one rank and number of steps."""

    task: str
    rank: int
    steps: int
    methods: list[MethodSummary]  # in the order of the YAML
    metrics: list[str]  # `loss` first
    levels: dict[str, Any] | None  # the reference losses, if they are known
    gap: float | None  # the baseline's test loss less the reference's; None without both
    gap_seeds: int  # the number of seeds on which the reference is the better one
    verdicts: dict[str, Verdict]  # against the baseline: of the test "loss", and of "early"
    equal_data: bool  # whether all runs have the same examples, and those of a seed saw the same batches
    step_spread: StepSpread | None  # None without step times of several seeds

    @property
    def times_compare(self) -> bool:
        """Whether the times of its steps say something about the methods."""
        return self.step_spread is None or not self.step_spread.is_busy


@dataclass
class Summary:
    """The content of `summary.json`."""

    settings: dict[str, Any]
    environment: dict[str, Any]  # the values that all runs have in common
    missing: int  # the number of runs that are known to be still to come
    comparisons: list[TaskSummary]  # one for each task, rank and number of steps
    unfinished: list[dict[str, Any]]  # runs that diverged or failed, and why


@dataclass
class _CellRuns:
    """A cell of `sweep.json`, the state of its tuning, and its runs."""

    entry: Mapping[str, Any]
    tuning: Tuning
    runs: Runs

    def at(self, rate: float | None, seeds: Sequence[int]) -> list[RunRecord]:
        """The runs of a rate that finished under some seeds."""
        return [each for each in self.runs if each.learning_rate == rate and each.seed in seeds and _finished(each)]


def summarize(store: Store) -> Summary:
    """The summary of the runs of the cells that the `sweep.json` of a folder lists; raises `UsageError` without one."""
    sweep, records = store.sweep(), store.records()
    settings = sweep["settings"]
    procedure = Procedure(tuple(settings["seeds"]), tuple(settings["tuning_seeds"]))
    scores = {key: record.score() for key, record in records.items()}
    cells = [
        _cell(entry, procedure, tuning_of(entry["key"], entry["grid"], procedure, scores), records)
        for entry in sweep["cells"]
    ]
    done = [run for cell in cells for run in cell.runs if run.status != MISSING]
    environments = [run.environment for run in done] or [sweep["environment"]]
    places = dict.fromkeys(
        (task["name"], rank, steps)
        for task in settings["tasks"]
        for rank in task["ranks"]
        for steps in ([task["steps"]] if isinstance(task["steps"], int) else task["steps"])
    )
    later = {cell.entry["key"]: cell.tuning.later for cell in cells}
    return Summary(
        settings,
        {name: value for name, value in environments[0].items() if all(e.get(name) == value for e in environments)},
        len({run.key for cell in cells for run in cell.runs if run.status == MISSING}) + sum(later.values()),
        [_of_task(sweep, cells, *place) for place in places],
        [_unfinished(run) for run in done if run.status in (DIVERGED, FAILED)],
    )


def _cell(
    entry: Mapping[str, Any], procedure: Procedure, tuning: Tuning, records: Mapping[str, RunRecord]
) -> _CellRuns:
    """The runs of a cell that are done or next; those of cells of one key differ in the names of their methods."""
    names = {name: entry[name] for name in ("task", "rank", "steps", "method")}
    runs = []
    for rate in tuning.rates:
        for seed in (*procedure.tuning_seeds, *procedure.seeds):
            trial = Trial(rate, seed)
            key = run_key(entry["key"], trial)
            own = {"key": key, **names, "learning_rate": rate, "seed": seed}
            if key in records:
                runs.append(replace(records[key], **own))
            elif trial in tuning.todo:
                runs.append(RunRecord(**own, status=MISSING))
    return _CellRuns(entry, tuning, runs)


def _unfinished(run: RunRecord) -> dict[str, Any]:
    names = ("key", "task", "rank", "steps", "method", "learning_rate", "seed", "status")
    step = run.diverged_at
    reason = run.error or (f"loss not finite at step {step}" if step else "held-out loss not finite")
    return {**{name: getattr(run, name) for name in names}, "reason": reason}


def _of_task(sweep: Mapping[str, Any], cells: Sequence[_CellRuns], task: str, rank: int, steps: int) -> TaskSummary:
    settings = sweep["settings"]
    own = [
        cell
        for cell in cells
        if cell.entry["task"] == task and cell.entry["rank"] in (rank, None) and cell.entry["steps"] == steps
    ]
    by_name = {cell.entry["method"]: cell for cell in own}
    found = [name for name in sweep["methods"] if name in by_name]
    methods = [_of_method(sweep["methods"][name]["title"], by_name[name], settings) for name in found]
    runs = [run for cell in own for run in cell.runs]
    base = by_name.get(settings["baseline"])
    _measure_steps(methods, by_name, base, settings["seeds"])
    gap, gap_seeds = _measure_gap(methods, settings["baseline"], settings["reference"])
    return TaskSummary(
        task,
        rank,
        steps,
        methods,
        list(dict.fromkeys(["loss", *(name for each in methods for rate in each.rates for name in rate.test)])),
        sweep.get("levels", {}).get(task),
        gap,
        gap_seeds,
        _relate(methods, settings["baseline"], settings["reference"]),
        _equal_data(runs),
        _step_spread(methods, runs),
    )


def _of_method(title: str, cell: _CellRuns, settings: Mapping[str, Any]) -> MethodSummary:
    tuning, deciding = cell.tuning, settings["tuning_seeds"] or settings["seeds"]
    if len(tuning.rates) == 1:
        deciding = settings["seeds"]
    rates = [_of_rate(rate, [run for run in cell.runs if run.learning_rate == rate], deciding) for rate in tuning.rates]
    method = MethodSummary(cell.entry["method"], title, rates, tuning.best, tuning.at_edge)
    statuses = [run.status for run in cell.runs]
    method.runs = {status: statuses.count(status) for status in (FINISHED, DIVERGED, FAILED, MISSING)}
    method.runs[MISSING] += tuning.later
    method.no_better = sum(len(rate.no_better) for rate in rates)
    best = cell.at(tuning.best, settings["seeds"])
    for cost in _COSTS:
        values = [getattr(run, cost) for run in best if getattr(run, cost) is not None]
        method.cost[cost] = statistics.median(values) if values else None
    if tuning.best is None:
        return method
    method.curve_steps, method.loss_curve = short_curve([run.losses for run in best])
    method.early = estimate({str(run.seed): early(run.losses) for run in best})
    method.good_rates = good_rates({rate.learning_rate: rate.validation_loss for rate in rates}, tuning.best)
    scores = {str(run.seed): run.scores["test"] for run in best if run.scores is not None}
    for metric in dict.fromkeys(name for each in scores.values() for name in each):
        method.test[metric] = estimate({seed: each[metric] for seed, each in scores.items()})
    return method


def _of_rate(value: float, runs: Runs, deciding: Sequence[int]) -> RateSummary:
    finished = [run for run in runs if _finished(run)]
    scores = {str(run.seed): run.scores for run in finished if run.scores is not None}
    validation = [scores[str(seed)]["validation"]["loss"] for seed in deciding if str(seed) in scores]
    metrics = dict.fromkeys(name for each in scores.values() for name in each["test"])
    return RateSummary(
        value,
        statistics.fmean(validation) if len(validation) == len(deciding) else None,
        {str(run.seed): run.status for run in runs},
        [run.seed for run in finished if run.no_better],
        {str(run.seed): run.key for run in runs},
        {name: {seed: each["test"][name] for seed, each in scores.items()} for name in metrics},
    )


def _finished(run: RunRecord) -> bool:
    return run.status == FINISHED and run.scores is not None


def _measure_steps(
    methods: Sequence[MethodSummary], cells: Mapping[str, _CellRuns], base: _CellRuns | None, seeds: Sequence[int]
) -> None:
    """Set the steps to the baseline's losses, where both are known."""
    if base is None or base.tuning.best is None:
        return
    baseline = {str(run.seed): run.losses for run in base.at(base.tuning.best, seeds)}
    for method in methods:
        own = {str(run.seed): run.losses for run in cells[method.method].at(method.learning_rate, seeds)}
        for name, part in _PARTS.items():
            if (found := steps_to_baseline(own, baseline, part)) is not None:
                method.steps_to_baseline[name] = found


def _measure_gap(methods: Sequence[MethodSummary], baseline: str, reference: str) -> tuple[float | None, int]:
    """Set the fractions of the gap; returns the gap from baseline to reference and the seeds that show it."""
    losses = {each.method: each.test["loss"] for each in methods if each.test}
    base, goal = losses.get(baseline), losses.get(reference)
    if base is None or goal is None:
        return None, 0
    gap = base.mean - goal.mean
    for each in methods:
        if gap > 0 and each.method in losses and each.method != baseline:
            each.gap_closed = (base.mean - losses[each.method].mean) / gap
    seeds = goal.by_seed.keys() & base.by_seed.keys()
    return gap, sum(goal.by_seed[seed] < base.by_seed[seed] for seed in seeds)


def _relate(methods: Sequence[MethodSummary], baseline: str, reference: str) -> dict[str, Verdict]:
    """Test every method against the baseline and the reference; returns the judgements of the former."""
    losses = {each.method: each.test["loss"].by_seed for each in methods if each.test}
    begins = {each.method: each.early.by_seed for each in methods if each.early is not None}
    final, first, first_of_goal = (
        paired_with(baseline, losses),
        paired_with(baseline, begins),
        paired_with(reference, begins),
    )
    for each in methods:
        each.against_baseline = final.get(each.method)
        each.early_against_baseline = first.get(each.method)
        each.early_against_reference = first_of_goal.get(each.method)
    return {"loss": verdict(final), "early": verdict(first)}


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
