"""Which comparisons are there, and which cells do their tables hold?"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorapro_hf.commands.compare.methods import ComparedMethod
from lorapro_hf.commands.compare.summary import Summary, TaskSummary

# Settings of a task that leave it the same task.
_SAME_TASK = {"name", "ranks", "steps", "learning_rates", "methods", "train_size"}


@dataclasses.dataclass
class Cell:
    """A cell of one of the comparisons."""

    comparison: str
    found: TaskSummary
    default: str | None  # the name of the method that is LoRAProConfig's default

    @property
    def name(self) -> str:
        """Task, rank and steps in one line."""
        return f"{self.found.task}, r = {self.found.rank}, {self.found.steps:,} steps"


def read(folder: Path) -> Summary | None:
    """The summary of a comparison; None without one of today's form."""
    path = folder / "summary.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"comparisons": []}
    if not content["comparisons"] or "steps" not in content["comparisons"][0]:
        return None
    found: Summary = _built(Summary, content)
    return found


def _built(kind: Any, value: Any) -> Any:
    """A value of JSON as the dataclasses that it was."""
    if value is None:
        return None
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _built(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _built(next(each for each in inner if each is not type(None)), value)
    if origin is list:
        return [_built(inner[0], each) for each in value]
    if origin is dict:
        return {key: _built(inner[1], each) for key, each in value.items()}
    return value


def cells_of(summaries: Mapping[str, Summary]) -> list[Cell]:
    """The cells of comparisons by steps; tasks that differ in ranks, steps and methods alone have one name."""
    names = _names(summaries)
    cells = []
    for comparison, summary in summaries.items():
        for found in summary.comparisons:
            label = names[comparison, found.task].replace("_", " ")
            default = default_of(summary)
            cells.append(Cell(comparison, dataclasses.replace(found, task=label), default))
    order = list(dict.fromkeys(cell.found.task for cell in cells))
    return sorted(cells, key=lambda cell: (cell.found.steps, order.index(cell.found.task), cell.found.rank))


def _names(summaries: Mapping[str, Summary]) -> dict[tuple[str, str], str]:
    shortest: dict[str, str] = {}
    keys = {}
    for comparison, summary in summaries.items():
        for task in summary.settings["tasks"]:
            key = json.dumps({name: value for name, value in task.items() if name not in _SAME_TASK}, sort_keys=True)
            keys[comparison, task["name"]] = key
            shortest[key] = min(shortest.get(key, task["name"]), task["name"], key=len)
    return {place: shortest[key] for place, key in keys.items()}


def default_of(summary: Summary) -> str | None:
    """The method whose settings are those of `LoRAProConfig()`."""
    wanted = ComparedMethod("", "", "lorapro", ()).decides()["settings"]
    for entry in summary.settings["methods"]:
        method = ComparedMethod(**entry)
        plain = not (method.adapter or method.callbacks or method.gelora)
        if method.is_lora_pro and plain and method.decides()["settings"] == wanted:
            return method.name
    return None
