"""Which runs does a comparison consist of, and what tells two of them apart?"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from typing import Any

import lorapro_hf
from lorapro_hf.commands.compare.methods import ComparedMethod
from lorapro_hf.commands.compare.settings import CompareSettings, TaskSettings


@dataclass(frozen=True)
class PlannedRun:
    """One training."""

    task: TaskSettings
    rank: int | None  # full fine-tuning has none, GeLoRA chooses its own: one run serves every rank
    method: ComparedMethod
    learning_rate: float  # the highest of its schedule
    seed: int  # decides order, initial values and dropout
    key: str  # a hash of the settings and versions that decide how it ends

    @property
    def title(self) -> str:
        """Task, rank, method, learning rate and seed in one line."""
        rank = "" if self.rank is None else f" r={self.rank}"
        return f"{self.task.name}{rank}: {self.method.title}, lr {self.learning_rate:g}, seed {self.seed}"

    def entry(self) -> dict[str, Any]:
        """The values that identify it in `sweep.json` and in its own line."""
        names = {"key": self.key, "task": self.task.name, "rank": self.rank, "method": self.method.name}
        return {**names, "learning_rate": self.learning_rate, "seed": self.seed}


def plan(settings: CompareSettings) -> list[PlannedRun]:
    """All runs, in the order in which they are trained.

    Within a task the seeds are outermost, so that the methods take turns: other work on the machine is less likely
    to meet one of them alone, and a comparison that is stopped has whole seeds. Methods that differ in name alone have
    runs of the same key, which are trained once.
    """
    decisive = {
        method.name: {"method": method.decides(), "versions": code_versions(method), **settings.decides()}
        for method in settings.methods
    }
    runs = []
    for task in settings.tasks:
        for seed in settings.seeds:
            for method in settings.methods:
                for rank in task.ranks if method.has_rank else (None,):
                    for rate in task.learning_rates.get(method.name, method.learning_rates):
                        own = {"task": task.decides(), "rank": rank, "learning_rate": rate, "seed": seed}
                        key = digest({**decisive[method.name], **own})
                        runs.append(PlannedRun(task, rank, method, rate, seed, key))
    return runs


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
