"""What does a comparison show? From its two files alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorapro_hf.commands.compare.significance import Paired, holm, paired
from lorapro_hf.commands.compare.store import DIVERGED, FAILED, FINISHED

MISSING = "missing"
NEAR_BEST = 0.02  # rates whose loss is within this share of the best count as good
LAST = 4  # the last of so many parts of a training says how it ended
Record = Mapping[str, Any]


@dataclass
class Rate:
    """One learning rate of one method over all seeds.

    Args:
        learning_rate: The rate.
        records: The runs that are done, by seed.
        statuses: How each seed ended, or `"missing"`.
        validation: The mean loss on the validation set if all seeds have finished: what decides.
    """

    learning_rate: float
    records: dict[int, Record]
    statuses: dict[int, str]
    validation: float | None = None

    def values(self, metric: str, which: str = "test") -> dict[int, float]:
        """A metric by seed, of the runs that have finished."""
        done = {seed: record for seed, record in self.records.items() if self.statuses[seed] == FINISHED}
        return {seed: record["scores"][which][metric] for seed, record in done.items()}

    @property
    def no_better(self) -> list[int]:
        """The seeds whose run finished no better than it began: it blew up and did not come back."""
        return [seed for seed, status in self.statuses.items() if status == FINISHED and blew_up(self.records[seed])]

    @property
    def whole(self) -> bool:
        """Whether all seeds have finished."""
        return all(status == FINISHED for status in self.statuses.values())


def blew_up(record: Record) -> bool:
    """Whether the mean training loss of the last quarter of the steps is not below the loss of the first step."""
    losses = record["losses"]
    return len(losses) > 1 and statistics.fmean(losses[-max(1, len(losses) // LAST) :]) >= losses[0]


@dataclass
class Row:
    """A method in one comparison, at its own best learning rate.

    Args:
        method: Its name.
        title: Its name for people.
        rates: All its rates in ascending order.
        best: The rate with the lowest mean validation loss of those at which all seeds have finished; one at which a
            seed finished no better than it began only if there is no other.
        at_edge: `"lowest"` or `"highest"` if that is an end of a grid of several: a better one may lie beyond.
        ties: Other rates that are worse by no more than the standard error of the best.
        good_range: Lowest and highest rate around the best with a validation loss within 2 % of the best's; `None`
            if at the best itself a seed finished no better than it began.
        good_at_edge: Which ends of that range are ends of the grid: it may reach beyond.
        against: The paired comparison with the baseline on the deciding metric.
        t_test_holm: The t-test's p-value, corrected for the number of methods.
        gap_closed: Share of the way from the baseline's loss to the reference's.
    """

    method: str
    title: str
    rates: list[Rate]
    best: Rate | None = None
    at_edge: str | None = None
    ties: list[float] = field(default_factory=list)
    good_range: tuple[float, float] | None = None
    good_at_edge: list[str] = field(default_factory=list)
    against: Paired | None = None
    t_test_holm: float | None = None
    gap_closed: float | None = None

    def median(self, name: str) -> float | None:
        """The median of a measurement over the seeds at the best rate."""
        records = [] if self.best is None else self.best.records.values()
        values = [record[name] for record in records if record.get(name) is not None]
        return statistics.median(values) if values else None

    def counts(self) -> dict[str, int]:
        """How many runs ended in which way, over all rates."""
        statuses = [status for rate in self.rates for status in rate.statuses.values()]
        return {name: statuses.count(name) for name in (FINISHED, DIVERGED, FAILED, MISSING)}

    def no_better(self) -> int:
        """How many finished runs ended no better than they began, over all rates."""
        return sum(len(rate.no_better) for rate in self.rates)


@dataclass
class Comparison:
    """All methods on one task at one rank.

    Args:
        task: Name of the task.
        rank: Of the adapters.
        rows: The methods in the order of the YAML.
        metrics: The metrics there are, `loss` first.
        baseline: Name of the method that the others are compared with.
        reference: Name of the method at the other end of the gap.
        gap: The baseline's test loss less the reference's; `None` without both.
        gap_seeds: On how many seeds the reference is the better one.
        equal_data: Whether all runs have the same examples, and those of a seed saw the same batches.
    """

    task: str
    rank: int
    rows: list[Row]
    metrics: list[str]
    baseline: str
    reference: str
    gap: float | None = None
    gap_seeds: int = 0
    equal_data: bool = True

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.task}-r{self.rank}"

    def row(self, method: str) -> Row | None:
        """The row of a method, if there is one."""
        return next((row for row in self.rows if row.method == method), None)


def summarize(sweep: Mapping[str, Any], records: Mapping[str, Record]) -> list[Comparison]:
    """The comparisons of a sweep, one for each task and rank.

    Args:
        sweep: What `sweep.json` holds: the runs that there should be.
        records: The lines of `runs.jsonl` by key; others than those of the sweep are not looked at.
    """
    settings = sweep["settings"]
    found = []
    for task in settings["tasks"]:
        for rank in task["ranks"]:
            runs = [run for run in sweep["runs"] if run["task"] == task["name"] and run["rank"] in (rank, None)]
            rows = [_row(name, method["title"], runs, records) for name, method in sweep["methods"].items()]
            comparison = Comparison(
                task["name"], rank, rows, _metrics(rows), settings["baseline"], settings["reference"]
            )
            _relate(comparison)
            comparison.equal_data = _equal_data(rows)
            found.append(comparison)
    return found


def _row(name: str, title: str, runs: Sequence[Mapping[str, Any]], records: Mapping[str, Record]) -> Row:
    own = [run for run in runs if run["method"] == name]
    rates = []
    for value in sorted({run["learning_rate"] for run in own}):
        here = [run for run in own if run["learning_rate"] == value]
        done = {run["seed"]: records[run["key"]] for run in here if run["key"] in records}
        statuses = {run["seed"]: done[run["seed"]]["status"] if run["seed"] in done else MISSING for run in here}
        rate = Rate(value, done, statuses)
        if rate.whole:
            rate.validation = statistics.fmean(rate.values("loss", "validation").values())
        rates.append(rate)
    row = Row(name, title, rates)
    _choose(row)
    return row


def _choose(row: Row) -> None:
    """Find the best rate of a method and say how sure that is."""
    every = {rate.learning_rate: rate.validation for rate in row.rates if rate.validation is not None}
    if not every:
        return
    losses = {rate.learning_rate: every[rate.learning_rate] for rate in row.rates if rate.whole and not rate.no_better}
    candidates = losses or every
    best = min(candidates, key=lambda value: candidates[value])
    grid = [rate.learning_rate for rate in row.rates]
    place = grid.index(best)
    row.best = row.rates[place]
    if len(grid) > 1 and place in (0, len(grid) - 1):
        row.at_edge = "lowest" if place == 0 else "highest"
    values = list(row.best.values("loss", "validation").values())
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    row.ties = [v for v, loss in candidates.items() if v != best and loss - candidates[best] <= error]
    if losses:
        _find_good_range(row, losses, grid, place)


def _find_good_range(row: Row, losses: Mapping[float, float], grid: Sequence[float], place: int) -> None:
    """Walk from the best rate to both sides as long as the loss stays near its own."""
    limit = losses[grid[place]] + NEAR_BEST * abs(losses[grid[place]])
    low = high = place
    while low > 0 and losses.get(grid[low - 1], limit + 1) <= limit:
        low -= 1
    while high < len(grid) - 1 and losses.get(grid[high + 1], limit + 1) <= limit:
        high += 1
    row.good_range = (grid[low], grid[high])
    ends = {"lowest": low == 0, "highest": high == len(grid) - 1}
    row.good_at_edge = [name for name, reached in ends.items() if reached and len(grid) > 1]


def _relate(comparison: Comparison) -> None:
    """Compare every method with the baseline and place it between baseline and reference."""
    base, reference = comparison.row(comparison.baseline), comparison.row(comparison.reference)
    if base is None or base.best is None:
        return
    of_base = base.best.values("loss")
    if reference is not None and reference.best is not None:
        of_reference = reference.best.values("loss")
        comparison.gap = statistics.fmean(of_base.values()) - statistics.fmean(of_reference.values())
        comparison.gap_seeds = sum(of_reference[seed] < of_base[seed] for seed in of_base.keys() & of_reference.keys())
    for row in comparison.rows:
        if row.best is None or row is base:
            continue
        own = row.best.values("loss")
        seeds = sorted(own.keys() & of_base.keys())
        row.against = paired([own[seed] for seed in seeds], [of_base[seed] for seed in seeds], more_is_better=False)
        if comparison.gap is not None and comparison.gap > 0:
            own_gap = statistics.fmean(of_base.values()) - statistics.fmean(own.values())
            row.gap_closed = own_gap / comparison.gap
    tested = {r.method: r.against.t_test for r in comparison.rows if r.against and r.against.t_test is not None}
    corrected = holm(tested)
    for row in comparison.rows:
        row.t_test_holm = corrected.get(row.method)


def _metrics(rows: Sequence[Row]) -> list[str]:
    names = ["loss"]
    for row in rows:
        for rate in row.rates:
            for record in rate.records.values():
                names += [name for name in (record.get("scores") or {}).get("test", {}) if name not in names]
    return names


def _equal_data(rows: Sequence[Row]) -> bool:
    """Like is compared with like: records from before `examples` was noted have only the hash of their batches."""
    seen: dict[tuple[str, int], set[str]] = {}
    for row in rows:
        for rate in row.rates:
            for seed, record in rate.records.items():
                if record.get("data") is not None:
                    seen.setdefault(("data", seed), set()).add(record["data"])
                if record.get("examples") is not None:
                    seen.setdefault(("examples", 0), set()).add(record["examples"])  # of the task, whatever the seed
    return all(len(each) == 1 for each in seen.values())
