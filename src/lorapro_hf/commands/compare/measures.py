"""What do the training losses of runs, and the validation losses of rates, say about a method?"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorapro_hf.commands.compare.significance import standard_error

EARLY = 4  # the first of so many parts of a training says how it begins
POINTS = 200  # of a curve in the summary
WITHIN = 1.02  # a good rate's loss over the best rate's
_WINDOW, _SHORTEST_WINDOW = 20, 5  # of the running mean: one part of so many of the steps, and at least so many steps
_DIGITS = 5  # of the losses of a curve


@dataclass
class StepsToBaseline:
    """How long a method trains to a smoothed training loss of the baseline's run of the same seed.

    The figures are fractions of the baseline's steps to this point. The baseline's own may be below 1, since its
    smoothed loss is not monotonic.
    """

    by_seed: dict[str, float | None]  # None where the loss is never reached
    reached: int  # the number of seeds on which it is
    mean: float | None  # None unless all seeds reach it
    error: float | None  # the standard error of the mean


@dataclass
class GoodRates:
    """The rates around the best one whose validation loss is within 2 % of its loss.

    The ends are interpolated in the logarithm of the rate. At the end of the tried rates, and next to a rate at which a
    run diverged or failed, the last tried good rate is the end.
    """

    lowest: float
    highest: float
    width: float  # highest over lowest
    open: list[str]  # "lowest", "highest": the ends beyond which nothing was tried


def early(losses: Sequence[float]) -> float:
    """The mean training loss of the first quarter of the steps."""
    return statistics.fmean(losses[: max(1, len(losses) // EARLY)])


def smoothed(losses: Sequence[float]) -> list[float]:
    """Running means over 5 % of the steps, at least 5 (fewer at the start): a value for each step, of those before."""
    width = max(_SHORTEST_WINDOW, round(len(losses) / _WINDOW))
    sums = [0.0, *itertools.accumulate(losses)]
    return [(sums[end] - sums[max(0, end - width)]) / min(end, width) for end in range(1, len(sums))]


def steps_to_baseline(
    own: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]], part: float
) -> StepsToBaseline | None:
    """The steps to the baseline's smoothed loss after a part of its steps, such as 0.5; losses are by seed."""
    by_seed: dict[str, float | None] = {}
    for seed in own.keys() & baseline.keys():
        place = max(1, round(part * len(baseline[seed])))
        goal = smoothed(baseline[seed])[place - 1]
        steps = next((step for step, loss in enumerate(smoothed(own[seed]), start=1) if loss <= goal), None)
        by_seed[seed] = None if steps is None else steps / place
    if not by_seed:
        return None
    found = [value for value in by_seed.values() if value is not None]
    whole = len(found) == len(by_seed)
    mean, error = (statistics.fmean(found), standard_error(found)) if whole else (None, None)
    return StepsToBaseline(dict(sorted(by_seed.items())), len(found), mean, error)


def good_rates(losses: Mapping[float, float | None], best: float) -> GoodRates | None:
    """The good rates around the best one, from the validation losses of rates (None where a run diverged or failed)."""
    rates, lowest = sorted(losses), losses.get(best)
    if lowest is None:
        return None
    limit = lowest + (WITHIN - 1.0) * abs(lowest)
    place = rates.index(best)
    ends, still_open = [], []
    for name, outward in (("lowest", rates[place::-1]), ("highest", rates[place:])):
        end = _end(outward, losses, limit)
        ends.append(best if end is None else end)
        if all((loss := losses[rate]) is not None and loss <= limit for rate in outward):
            still_open.append(name)
    return GoodRates(ends[0], ends[1], ends[1] / ends[0], still_open)


def _end(outward: Sequence[float], losses: Mapping[float, float | None], limit: float) -> float | None:
    """Where the losses cross the limit, from the best rate outward."""
    for inner, outer in itertools.pairwise(outward):
        inside, outside = losses[inner], losses[outer]
        assert inside is not None
        if outside is None:
            return inner
        if outside > limit:
            fraction = (limit - inside) / (outside - inside)
            return math.exp(math.log(inner) + fraction * (math.log(outer) - math.log(inner)))
    return outward[-1]


def short_curve(runs: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Steps and training losses of a curve of at most 200 points: means over the runs and over steps that follow."""
    means = [statistics.fmean(losses) for losses in zip(*runs, strict=True)]
    count = min(POINTS, len(means))
    bounds = [place * len(means) // count for place in range(count + 1)] if count else []
    bins = list(itertools.pairwise(bounds))
    steps = [(start + 1 + end) / 2 for start, end in bins]
    return steps, [float(f"{statistics.fmean(means[start:end]):.{_DIGITS}g}") for start, end in bins]
