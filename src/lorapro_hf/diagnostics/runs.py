"""Which measurements of the gradient gap has a run, ready to be drawn?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas

from lorapro_hf.diagnostics.records import FIGURES, FILE, read
from lorapro_hf.options import UsageError

DRAWN = ("lora_scaled_gap", "lora_pro_gap")
_SUMMARISED = (*DRAWN, "lora_gap", "step_error", "step_length", "step_share", "residual")
_QUARTILES = {0.25: "q1", 0.5: "median", 0.75: "q3"}


@dataclass
class Run:
    """One training's measurements.

    `table` has a row for each layer and step, with the columns `step`, `layer` (with the adapter if there are several)
    and one for each figure, NaN where it has no value.
    """

    name: str
    optimizer: str
    table: pandas.DataFrame

    def by_layer(self, figure: str) -> pandas.DataFrame:
        """A figure by layer (rows, in the order of their numbers and names) and step (columns)."""
        table = self.table.pivot(index="layer", columns="step", values=figure)
        return table.loc[sorted(table.index, key=_natural)]

    def quartiles(self, figure: str) -> pandas.DataFrame:
        """The columns `q1`, `median` and `q3` of the layers' latest values, by step.

        Layers that take turns would otherwise give a sawtooth. The first step is the one by which every layer that has
        the figure has been measured.
        """
        measured = self.by_layer(figure).dropna(how="all").dropna(axis=1, how="all")
        latest = measured.ffill(axis=1).dropna(axis=1)
        return latest.quantile(list(_QUARTILES)).rename(_QUARTILES).T

    def summary(self) -> dict[str, Any]:
        """The quartiles of all figures, ready for JSON."""
        figures = {}
        for figure in _SUMMARISED:
            found = self.quartiles(figure)
            figures[figure] = {"steps": found.index.tolist(), **found.to_dict("list")}
        layers = self.by_layer(DRAWN[0]).index.tolist()
        return {"run": self.name, "optimizer": self.optimizer, "layers": layers, "figures": figures}


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
    """The measurements of a training, by its output folder or the file itself.

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
    table = pandas.DataFrame([{**vars(record), **record.figures} for record in records]).drop(columns="figures")
    table[list(FIGURES)] = table[list(FIGURES)].apply(pandas.to_numeric, errors="coerce")
    if table[list(DRAWN)].isna().all(axis=None):
        raise UsageError(f"{file} holds nothing that can be drawn: no measurement has {' or '.join(DRAWN)}.")
    if table["adapter"].nunique() > 1:
        table["layer"] += " (" + table["adapter"] + ")"
    table = table.drop_duplicates(["step", "layer"], keep="last")
    folder = file.resolve().parent
    return Run(folder.name if file.name == FILE else file.stem, str(records[-1].optimizer), table)


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
