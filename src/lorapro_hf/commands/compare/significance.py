"""Do two methods differ by more than chance, seed by seed?"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ROUNDING = 1e-9  # of the mean difference: spread below it is none


@dataclass(frozen=True)
class Paired:
    """One method against another on the same seeds.

    Args:
        seeds: How many pairs.
        difference: The mean of the one's values less the other's.
        better: On how many seeds the one is better.
        t_test: The p-value of the paired t-test, two-sided. It takes the differences for normal, which few seeds can
            not show. `None` without spread, with one seed, or without scipy.
        wilcoxon: The exact p-value of Wilcoxon's signed-rank test, two-sided; `None` as above.
        sign_test: The p-value of the sign test, two-sided, on the seeds that differ.
    """

    seeds: int
    difference: float
    better: int
    t_test: float | None
    wilcoxon: float | None
    sign_test: float | None


def paired(own: Sequence[float], others: Sequence[float], more_is_better: bool) -> Paired | None:
    """Compare values of the same seeds, given in the same order; `None` if there are none."""
    if not own:
        return None
    differences = [one - other for one, other in zip(own, others, strict=True)]
    unequal = [difference for difference in differences if difference != 0]
    better = sum((difference > 0) == more_is_better for difference in unequal)
    t_test = wilcoxon = sign_test = None
    if has_scipy():
        from scipy import stats

        mean = abs(statistics.fmean(differences))
        if len(differences) > 1 and statistics.pstdev(differences) > _ROUNDING * mean:
            t_test = float(stats.ttest_rel(own, others).pvalue)
        if unequal:
            wilcoxon = float(stats.wilcoxon(unequal).pvalue)
            sign_test = float(stats.binomtest(better, len(unequal)).pvalue)
    return Paired(len(differences), statistics.fmean(differences), better, t_test, wilcoxon, sign_test)


def smallest_p(seeds: int) -> float:
    """The smallest p-value that Wilcoxon's and the sign test can give with so many seeds."""
    return min(1.0, 2.0 ** (1 - seeds))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected for being the smallest among several, by Holm's method."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda each: p_values[each])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        corrected[name] = highest
    return corrected


def has_scipy() -> bool:
    """Whether the tests can be computed."""
    return importlib.util.find_spec("scipy") is not None
