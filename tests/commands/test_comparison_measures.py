"""The measures of a comparison against values computed by hand."""

from __future__ import annotations

import math

import pytest

from lorapro_hf.commands.compare.measures import early, good_rates, short_curve, smoothed, steps_to_baseline
from lorapro_hf.commands.compare.significance import estimate


def test_an_estimate_has_the_standard_error_of_the_mean() -> None:
    found = estimate({"0": 1.0, "1": 2.0, "2": 6.0})
    assert (found.mean, found.error) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3)))
    assert estimate({"0": 1.0}).error is None


def test_early_is_the_first_quarter() -> None:
    assert early([4.0, 2.0, 0.0, *[1.0] * 9]) == 2.0
    assert early([7.0, 1.0]) == 7.0


def test_smoothing_takes_the_steps_before() -> None:
    assert smoothed([5.0, 3.0, 1.0, 1.0, 0.0, 0.0, 0.0]) == pytest.approx([5.0, 4.0, 3.0, 2.5, 2.0, 1.0, 0.4])
    assert smoothed([float(place) for place in range(200)])[199] == pytest.approx(194.5)  # the last ten


def test_steps_to_the_losses_of_the_baseline_are_fractions_of_its_steps() -> None:
    base = [10.0] * 10 + [5.0] * 10  # smoothed: 10 up to step 10, 5 from step 15 on
    fast = [10.0] * 2 + [5.0] * 18  # 5 from step 7 on
    own = {"0": fast, "1": base, "2": [11.0] * 20, "3": fast}  # the baseline has no fourth seed
    half = steps_to_baseline(own, {"0": base, "1": base, "2": base}, 0.5)
    end = steps_to_baseline(own, {"0": base, "1": base, "2": base}, 1.0)
    assert half is not None and half.by_seed == {"0": 0.1, "1": 0.1, "2": None}
    assert (half.reached, half.mean, half.error) == (2, None, None)
    assert end is not None and end.by_seed == pytest.approx({"0": 7 / 20, "1": 15 / 20, "2": None})
    two = steps_to_baseline({"0": fast, "1": base}, {"0": base, "1": base}, 1.0)
    assert two is not None and (two.reached, two.mean) == (2, pytest.approx(11 / 20))
    assert two.error == pytest.approx(0.2)
    assert steps_to_baseline({"0": fast}, {"1": base}, 1.0) is None


def test_good_rates_are_interpolated_in_the_logarithm() -> None:
    found = good_rates({1e-4: 1.06, 1e-3: 1.0, 1e-2: 1.01, 1e-1: 1.05}, 1e-3)
    assert found is not None and found.open == []
    assert found.lowest == pytest.approx(1e-3 * 10 ** (-1 / 3)) and found.highest == pytest.approx(1e-2 * 10**0.25)
    assert found.width == pytest.approx(found.highest / found.lowest)


def test_good_rates_end_where_nothing_was_tried_or_runs_diverged() -> None:
    found = good_rates({1e-3: 1.0, 1e-2: 1.01, 1e-1: None}, 1e-3)
    assert found is not None and (found.lowest, found.highest, found.open) == (1e-3, 1e-2, ["lowest"])
    apart = good_rates({1e-4: 1.0, 1e-3: 2.0, 1e-2: 1.0}, 1e-4)  # another valley does not count
    assert apart is not None and apart.highest < 1e-3
    assert good_rates({1e-3: None}, 1e-3) is None


def test_curves_are_short() -> None:
    assert short_curve([[3.0, 1.0], [5.0, 2.0]]) == ([1.0, 2.0], [4.0, 1.5])
    steps, losses = short_curve([[float(step) for step in range(1, 801)]])
    assert len(steps) == len(losses) == 200 and steps[:2] == [2.5, 6.5] and losses == steps
    assert short_curve([]) == ([], [])
