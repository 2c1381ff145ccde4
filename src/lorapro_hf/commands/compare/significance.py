"""Do two methods differ by more than chance, seed by seed?"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

_ROUNDING = 1e-9  # of the mean difference: spread below it is none


@dataclass
class PairedTest:
    """One method against another on the same seeds. P-values are two-sided, and `None` without spread or scipy."""

    seeds: int  # the number of pairs
    difference: float  # the mean of the one's losses less the other's
    better: int  # the number of seeds on which the one has the lower loss
    t_test: float | None = None  # paired; it takes the differences for normal, which few seeds cannot show
    wilcoxon: float | None = None  # Wilcoxon's signed-rank test, exact
    t_test_holm: float | None = None  # the t-test's, corrected for the number of methods


def paired(own: Mapping[str, float], others: Mapping[str, float]) -> PairedTest | None:
    """Compare losses by seed; `None` if there are no common seeds."""
    differences = [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]
    if not differences:
        return None
    mean = statistics.fmean(differences)
    result = PairedTest(len(differences), mean, sum(difference < 0 for difference in differences))
    if has_scipy():
        from scipy import stats

        if len(differences) > 1 and statistics.pstdev(differences) > _ROUNDING * abs(mean):
            result.t_test = float(stats.ttest_1samp(differences, 0.0).pvalue)
        if unequal := [difference for difference in differences if difference != 0]:
            result.wilcoxon = float(stats.wilcoxon(unequal).pvalue)
    return result


def smallest_p(seeds: int) -> float:
    """The smallest p-value that Wilcoxon's test can give with so many seeds."""
    return min(1.0, 2.0 ** (1 - seeds))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected for being the smallest among several, by Holm's method."""
    ranked = sorted(p_values, key=lambda each: p_values[each])
    corrected = (min(1.0, (len(ranked) - place) * p_values[name]) for place, name in enumerate(ranked))
    return dict(zip(ranked, itertools.accumulate(corrected, max), strict=True))


def has_scipy() -> bool:
    """Whether the tests can be computed."""
    return importlib.util.find_spec("scipy") is not None
