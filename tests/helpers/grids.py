"""Grids of which a few cases run by default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from random import Random
from typing import Any

import pytest


def rest_slow(cases: Iterable[Any], fast: int = 1) -> list[Any]:
    """The cases of a grid, of which all but the first `fast` are marked slow."""
    cases = list(cases)
    return [*cases[:fast], *(_slow(case) for case in cases[fast:])]


def few_of(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """All combinations, of which as few run by default as have each value of each axis; the rest is slow."""
    values = list(axes.values())
    count = max(map(len, values))
    columns = [[number % len(axis) for number in range(count)] for axis in values]
    for seed, column in enumerate(columns):
        Random(seed).shuffle(column)  # or values of two axes would always meet
    fast = set(zip(*columns, strict=True))
    cases = [
        pytest.param(
            *(axis[number] for axis, number in zip(values, numbers, strict=True)),
            marks=() if numbers in fast else pytest.mark.slow,
        )
        for numbers in product(*(range(len(axis)) for axis in values))
    ]
    return pytest.mark.parametrize(tuple(axes), cases)


def _slow(case: Any) -> Any:
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
