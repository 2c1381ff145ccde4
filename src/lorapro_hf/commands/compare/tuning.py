"""Which learning rates does a method still try, and which one does it report?

Every method gets the same procedure. Its grid is tried on the tuning seeds; while the best rate is an end of the grid,
one more is added beyond it; then the two rates halfway to the neighbours of the best are tried, once. The seeds of the
tables run at the best rate alone. Without tuning seeds, all of them run at all rates of the grid.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

RATIO = math.sqrt(10.0)  # of neighbours in a grid
EXTENSIONS = 4  # rates added at the ends of a grid
_DIGITS = 3  # of a rate that is computed


class Trial(NamedTuple):
    """A learning rate under a seed."""

    learning_rate: float
    seed: int


class Score(NamedTuple):
    """How good a run is: the lower the better, compared in the order of the fields."""

    no_better: bool  # it ended no better than it began
    loss: float  # on the validation set; infinite if the run diverged or failed


@dataclass(frozen=True)
class Procedure:
    """The seeds that choose a rate, and those that run at it."""

    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """The state of a procedure."""

    rates: tuple[float, ...]  # tried, or about to be; ascending
    done: int  # the number of runs that are done
    todo: tuple[Trial, ...]  # the runs that are next
    later: int = 0  # the number of runs that follow at least
    best: float | None = None  # the rate to report; None while it is not known, or if there is none
    at_edge: str | None = None  # "lowest" or "highest", if the best rate is the end of several


def rounded(rate: float) -> float:
    """A computed rate with three digits."""
    return float(f"{rate:.{_DIGITS}g}")


def grid_around(centre: float) -> tuple[float, ...]:
    """Three rates, a factor of √10 apart."""
    return rounded(centre / RATIO), centre, rounded(centre * RATIO)


def tune(grid: Sequence[float], procedure: Procedure, score_of: Callable[[Trial], Score | None]) -> Tuning:
    """The state of a procedure, from the scores of the runs that are done (None for the others).

    A grid of one rate is not tuned. A rate at which a run diverged or failed is no candidate; if that happens under
    one of the reported seeds, the next best rate takes its place. Of equal rates the lowest is the best.
    """
    return _Stages(sorted(grid), procedure, score_of).state()


class _Stages:
    """The stages of one procedure; `rates` grow."""

    def __init__(self, rates: list[float], procedure: Procedure, score_of: Callable[[Trial], Score | None]) -> None:
        self.rates, self.score_of = rates, score_of
        self.seeds, self.tuning_seeds = procedure.seeds, procedure.tuning_seeds if len(rates) > 1 else ()

    def state(self) -> Tuning:
        if not self.tuning_seeds:
            best = self.best(self.seeds)
            return self.at(self.missing(self.rates, self.seeds), best=best)
        for added in range(EXTENSIONS + 1):
            if todo := self.missing(self.rates, self.tuning_seeds):
                return self.at(todo, later=2 * len(self.tuning_seeds) + len(self.seeds))
            best = self.best(self.tuning_seeds)
            end = "lowest" if best is None else _edge(self.rates, best)  # too high a rate fails
            if end is None or added == EXTENSIONS:
                break
            beyond = _beyond(*self.rates[:2]) if end == "lowest" else _beyond(*self.rates[:-3:-1])
            self.rates = sorted([*self.rates, beyond])
        return self.at(()) if best is None else self.refined(best)

    def refined(self, best: float) -> Tuning:
        """The state once the grid is wide enough."""
        place = self.rates.index(best)
        near = [rate for rate in self.rates[max(0, place - 1) : place + 2] if rate != best]
        between = [rounded(math.sqrt(best * rate)) for rate in near]
        self.rates = sorted({*self.rates, *between})
        if todo := self.missing(between, self.tuning_seeds):
            return self.at(todo, later=len(self.seeds))
        for rate in sorted(self.rates, key=lambda rate: self.mean(rate, self.tuning_seeds)):
            if math.isinf(self.mean(rate, self.tuning_seeds).loss):
                break
            if todo := self.missing([rate], self.seeds):
                return self.at(todo)
            if math.isfinite(self.mean(rate, self.seeds).loss):
                return self.at((), best=rate)
        return self.at(())

    def at(self, todo: tuple[Trial, ...], later: int = 0, best: float | None = None) -> Tuning:
        seeds = {*self.tuning_seeds, *self.seeds}
        done = sum(self.score_of(Trial(rate, seed)) is not None for rate in self.rates for seed in seeds)
        return Tuning(tuple(self.rates), done, todo, later, best, _edge(self.rates, best))

    def missing(self, rates: Iterable[float], seeds: Iterable[int]) -> tuple[Trial, ...]:
        trials = [Trial(rate, seed) for seed in seeds for rate in rates]
        return tuple(trial for trial in trials if self.score_of(trial) is None)

    def mean(self, rate: float, seeds: Sequence[int]) -> Score:
        """Of a rate over seeds; infinite if a run is missing."""
        found = [self.score_of(Trial(rate, seed)) or Score(True, math.inf) for seed in seeds]
        return Score(any(score.no_better for score in found), statistics.fmean(score.loss for score in found))

    def best(self, seeds: Sequence[int]) -> float | None:
        """The best rate; None if there is none at which all seeds finished."""
        rate = min(self.rates, key=lambda rate: self.mean(rate, seeds))
        return rate if math.isfinite(self.mean(rate, seeds).loss) else None


def _beyond(end: float, inner: float) -> float:
    """The rate beyond an end; in a grid such as 1e-3, 3e-3 it is ten times the end's neighbour."""
    apart = math.log10(end / inner)
    if 0.4 < abs(apart) < 0.6:
        return rounded(inner * 10.0 ** math.copysign(1.0, apart))
    return rounded(end * RATIO ** math.copysign(1.0, apart))


def _edge(rates: Sequence[float], best: float | None) -> str | None:
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    return "lowest" if best == rates[0] else "highest"
