"""Do two methods differ by more than chance, seed by seed?"""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ERRORS = 2.0  # a difference counts from so many standard errors on
_ROUNDING = 1e-9  # of the mean difference: spread below it is none


@dataclass
class Estimate:
    """A figure over the seeds."""

    mean: float
    error: float | None  # the standard error of the mean; None with one seed
    by_seed: dict[str, float]


@dataclass
class PairedTest:
    """One method against another on the same seeds, in a figure that is the better the lower it is."""

    seeds: int  # the number of pairs
    difference: float  # the mean of the one's figures less the other's
    error: float | None  # the standard error of the difference; None with one seed
    better: int  # the number of seeds on which the one has the lower figure
    t_test: float | None = None  # the paired t-test's two-sided p-value; None without spread or scipy
    t_test_holm: float | None = None  # corrected for the number of methods


@dataclass
class Verdict:
    """The methods, by name, that differ from the baseline by more than two standard errors of the difference."""

    better: list[str] = field(default_factory=list)
    level: list[str] = field(default_factory=list)  # by two standard errors at most
    worse: list[str] = field(default_factory=list)


def estimate(by_seed: Mapping[str, float]) -> Estimate:
    """Mean and standard error of at least one figure."""
    values = list(by_seed.values())
    return Estimate(statistics.fmean(values), standard_error(values), dict(by_seed))


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None of a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired(own: Mapping[str, float], others: Mapping[str, float]) -> PairedTest | None:
    """Compare figures by seed; `None` if there are no common seeds."""
    differences = [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]
    if not differences:
        return None
    mean, error = statistics.fmean(differences), standard_error(differences)
    result = PairedTest(len(differences), mean, error, sum(difference < 0 for difference in differences))
    if has_scipy() and error is not None and error > _ROUNDING * abs(mean):
        from scipy import stats

        result.t_test = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return result


def paired_with(one: str, figures: Mapping[str, Mapping[str, float]]) -> dict[str, PairedTest]:
    """Every other method against one, p-values corrected for their number; `figures` are by method and seed."""
    found = {name: paired(own, figures.get(one, {})) for name, own in figures.items() if name != one}
    tests = {name: test for name, test in found.items() if test is not None}
    p_values = {name: test.t_test for name, test in tests.items() if test.t_test is not None}
    for name, value in holm(p_values).items():
        tests[name].t_test_holm = value
    return tests


def verdict(tests: Mapping[str, PairedTest]) -> Verdict:
    """The judgement of tests against the baseline; methods with one seed are in no list."""
    result = Verdict()
    for name, test in tests.items():
        if test.error is not None:
            far = abs(test.difference) > ERRORS * test.error
            (result.level if not far else result.better if test.difference < 0 else result.worse).append(name)
    return result


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected for being the smallest among several, by Holm's method."""
    ranked = sorted(p_values, key=lambda each: p_values[each])
    corrected = (min(1.0, (len(ranked) - place) * p_values[name]) for place, name in enumerate(ranked))
    return dict(zip(ranked, itertools.accumulate(corrected, max), strict=True))


def has_scipy() -> bool:
    """Whether the tests can be computed."""
    return importlib.util.find_spec("scipy") is not None
