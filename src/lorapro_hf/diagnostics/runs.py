"""Which measurements of the gradient gap has a run, ready to be drawn?"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorapro_hf.diagnostics.records import FILE, GapRecord, read
from lorapro_hf.options import UsageError

DRAWN = ("lora_scaled_gap", "lora_pro_gap")
_SUMMARISED = (*DRAWN, "lora_gap", "step_error", "step_length", "step_share", "residual")


@dataclass
class Run:
    """One training's measurements.

    Attributes:
        name: for titles.
        optimizer: its title.
        records: one for each layer and step.
    """

    name: str
    optimizer: str
    records: list[GapRecord]

    @property
    def steps(self) -> list[int]:
        """The measured steps in order."""
        return sorted({record.step for record in self.records})

    @property
    def layers(self) -> list[str]:
        """The measured layers in the order of their numbers and names, with the adapter where there are several."""
        return sorted({self.layer_of(record) for record in self.records}, key=_natural)

    @cached_property
    def _has_adapters(self) -> bool:
        return len({record.adapter for record in self.records}) > 1

    def layer_of(self, record: GapRecord) -> str:
        """The name of a record's row."""
        return f"{record.layer} ({record.adapter})" if self._has_adapters else record.layer

    def quartiles(self, figure: str) -> dict[int, tuple[float, float, float]]:
        """First quartile, median and third quartile over the layers' latest values, by step.

        Layers that take turns would otherwise give a sawtooth. The first step is the one by which every layer that has
        the figure has been measured.
        """
        values: dict[int, dict[str, float]] = {}
        for record in self.records:
            if (value := record.figures[figure]) is not None:
                values.setdefault(record.step, {})[self.layer_of(record)] = value
        layers = {layer for of_step in values.values() for layer in of_step}
        latest: dict[str, float] = {}
        found = {}
        for step in sorted(values):
            latest |= values[step]
            if len(latest) == len(layers):
                found[step] = quartiles(list(latest.values()))
        return found

    def summary(self) -> dict[str, Any]:
        """The quartiles of all figures, ready for JSON."""
        figures = {}
        for figure in _SUMMARISED:
            found = self.quartiles(figure)
            q1, median, q3 = (list(column) for column in zip(*found.values(), strict=True)) if found else ([], [], [])
            figures[figure] = {"steps": list(found), "q1": q1, "median": median, "q3": q3}
        return {"run": self.name, "optimizer": self.optimizer, "layers": self.layers, "figures": figures}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The measurements of several trainings; folders of the same name are named with those above them.

    Raises:
        UsageError: a training has none.
    """
    runs = [read_run(path) for path in paths]
    if len({run.name for run in runs}) == len(runs):
        return runs
    whole = ["/".join(path.resolve().parts[1:]) for path in paths]
    return [replace(run, name=name) for run, name in zip(runs, short_names(whole, "/"), strict=True)]


def read_run(path: Path) -> Run:
    """The measurements of a training.

    Args:
        path: its output folder, or the file itself.

    Raises:
        UsageError: there are none.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        parent = file.resolve().parent.parent
        meant = f" Did you mean its parent, {parent}?" if (parent / FILE).is_file() else ""
        raise UsageError(f"{path} has no {FILE}. Train with --lora_pro_log_gap N, or with GradientGapCallback.{meant}")
    try:
        records = read(file)
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no {FILE}: it is not text.") from error
    if not records:
        raise UsageError(f"{file} holds no measurement yet.")
    for key in ("optimizer", "adapter"):
        if any(getattr(record, key) is None for record in records):
            raise UsageError(f"{file} is no {FILE}: it has measurements without {key!r}.")
    if not any(isinstance(record.figures[figure], int | float) for record in records for figure in DRAWN):
        raise UsageError(f"{file} holds nothing that can be drawn: no measurement has {' or '.join(DRAWN)}.")
    folder = file.resolve().parent
    return Run(folder.name if file.name == FILE else file.stem, str(records[-1].optimizer), records)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def short_names(names: Sequence[str], separator: str = ".") -> list[str]:
    """The names without the parts at the beginning that all have in common."""
    if len(names) < 2:
        return [name.removeprefix("base_model.model.") for name in names]
    parts = [name.split(separator) for name in names]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return [separator.join(each[shared:]) for each in parts]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
