"""Which runs does a comparison consist of, and what tells two of them apart?"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lorapro_hf
from lorapro_hf.commands.compare.methods import ComparedMethod
from lorapro_hf.commands.compare.settings import CompareSettings, TaskSettings
from lorapro_hf.commands.compare.tuning import Procedure, Score, Trial, Tuning, tune


@dataclass(frozen=True)
class PlannedRun:
    """One training."""

    task: TaskSettings
    rank: int | None  # full fine-tuning has none, GeLoRA chooses its own: one run serves every rank
    steps: int
    method: ComparedMethod
    learning_rate: float  # the highest of its schedule
    seed: int  # decides order, initial values and dropout
    key: str  # a hash of the settings and versions that decide how it ends

    @property
    def title(self) -> str:
        """Task, rank, steps, method, learning rate and seed in one line."""
        rank = "" if self.rank is None else f" r={self.rank}"
        place = f"{self.task.name}{rank}, {self.steps} steps"
        return f"{place}: {self.method.title}, lr {self.learning_rate:g}, seed {self.seed}"

    def entry(self) -> dict[str, Any]:
        """The values that identify it in its own line."""
        names = {"key": self.key, "task": self.task.name, "rank": self.rank, "steps": self.steps}
        return {**names, "method": self.method.name, "learning_rate": self.learning_rate, "seed": self.seed}


@dataclass(frozen=True)
class Cell:
    """A method on a task at one rank and number of steps: one process tunes its rate."""

    task: TaskSettings
    rank: int | None
    steps: int
    method: ComparedMethod
    grid: tuple[float, ...]
    procedure: Procedure
    key: str  # a hash of the settings and versions that decide, but for rate and seed

    def entry(self) -> dict[str, Any]:
        """The values that identify it in `sweep.json`."""
        names = {"key": self.key, "task": self.task.name, "rank": self.rank, "steps": self.steps}
        return {**names, "method": self.method.name, "grid": list(self.grid)}

    def tuning(self, scores: Mapping[str, Score]) -> Tuning:
        """The state of its tuning, from the scores of runs by their keys."""
        return tuning_of(self.key, self.grid, self.procedure, scores)

    def run(self, trial: Trial) -> PlannedRun:
        """The run of a rate and a seed."""
        return PlannedRun(self.task, self.rank, self.steps, self.method, *trial, run_key(self.key, trial))


def next_runs(cell: Cell, scores: Mapping[str, Score]) -> list[PlannedRun]:
    """The runs that a cell needs next, from the scores of runs by their keys; none at its end."""
    return [cell.run(trial) for trial in cell.tuning(scores).todo]


def tuning_of(key: str, grid: Sequence[float], procedure: Procedure, scores: Mapping[str, Score]) -> Tuning:
    """The state of the tuning of a cell with this key."""
    return tune(grid, procedure, lambda trial: scores.get(run_key(key, trial)))


def run_key(cell: str, trial: Trial) -> str:
    """The key of a run of a cell with this key."""
    return digest([cell, *trial])


def plan(settings: CompareSettings) -> list[Cell]:
    """All cells, those with the most steps first, so that several processes end at about the same time.

    Methods that differ in name alone have cells of the same key, whose runs are trained once.
    """
    decisive = {
        method.name: {"method": method.decides(), "versions": code_versions(method), **settings.decides()}
        for method in settings.methods
    }
    cells = []
    for task in settings.tasks:
        for steps in task.horizons:
            for method in settings.methods_of(task):
                grid = task.learning_rates.get(method.name, method.learning_rates)
                for rank in task.ranks if method.has_rank else (None,):
                    key = digest({**decisive[method.name], "task": task.decides(), "rank": rank, "steps": steps})
                    cells.append(Cell(task, rank, steps, method, grid, settings.procedure, key))
    return sorted(cells, key=lambda cell: -cell.steps)


def content_of(settings: CompareSettings, cells: Sequence[Cell]) -> dict[str, Any]:
    """The plan as plain values, for `sweep.json`."""
    methods = {m.name: {"title": m.title, "is_lora_pro": m.is_lora_pro, **m.decides()} for m in settings.methods}
    return {"settings": settings.to_dict(), "methods": methods, "cells": [cell.entry() for cell in cells]}


def code_versions(method: ComparedMethod) -> dict[str, str]:
    """Versions of the code that the runs of a method depend on; another version means another run."""
    packages = ["torch", "transformers", "peft", *([] if method.package is None else [method.package])]
    return {
        "lorapro_hf": lorapro_hf.__version__,
        "python": platform.python_version(),  # the built-in texts are from its library
        **{name: importlib.metadata.version(name) for name in packages},
    }


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for plain values."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
