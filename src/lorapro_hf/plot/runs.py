"""What has been measured of the gradient gap in a run, ready to be drawn?"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapro_hf.diagnostics.records import FILE, read
from lorapro_hf.options import UsageError

FIGURES = ("lora_scaled_gap", "lora_pro_gap", "lora_gap", "step_error", "step_length", "step_share", "residual")


@dataclass
class Run:
    """One training's measurements.

    Attributes:
        name: for titles.
        optimizer: what it stepped with.
        records: one for each layer and step.
    """

    name: str
    optimizer: str
    records: list[dict[str, Any]]

    @property
    def steps(self) -> list[int]:
        """The measured steps in order."""
        return sorted({record["step"] for record in self.records})

    @property
    def layers(self) -> list[str]:
        """The measured layers in the order of their numbers and names; with the adapter where there are several."""
        return sorted({self.layer_of(record) for record in self.records}, key=_natural)

    def layer_of(self, record: dict[str, Any]) -> str:
        """What a record's row is called."""
        several = len({record["adapter"] for record in self.records}) > 1
        return f"{record['layer']} ({record['adapter']})" if several else str(record["layer"])

    def quartiles(self, figure: str) -> dict[int, tuple[float, float, float]]:
        """First quartile, median and third quartile over the layers, by step, where the figure is known."""
        values: dict[int, list[float]] = {}
        for record in self.records:
            if record.get(figure) is not None:
                values.setdefault(record["step"], []).append(record[figure])
        return {step: quartiles(values[step]) for step in sorted(values)}

    def summary(self) -> dict[str, Any]:
        """The quartiles of all figures, ready for JSON."""
        figures = {}
        for figure in FIGURES:
            found = self.quartiles(figure)
            columns = zip(*found.values(), strict=True) if found else ([], [], [])
            q1, median, q3 = (list(column) for column in columns)
            figures[figure] = {"steps": list(found), "q1": q1, "median": median, "q3": q3}
        return {"run": self.name, "optimizer": self.optimizer, "layers": self.layers, "figures": figures}


def read_run(path: Path) -> Run:
    """The measurements of a training.

    Args:
        path: its output folder, or the file itself.

    Raises:
        UsageError: there are none.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path} has no {FILE}. Train with --lora_pro_log_gap N, or with GradientGapCallback.")
    try:
        records = read(file)
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no {FILE}: it is not text.") from error
    if not records:
        raise UsageError(f"{file} holds no measurement yet.")
    folder = file.resolve().parent
    return Run(folder.name if file.name == FILE else file.stem, records[-1]["optimizer"], records)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def short_names(layers: Sequence[str]) -> list[str]:
    """The names without the parts at the beginning that all have in common."""
    if len(layers) < 2:
        return [layer.removeprefix("base_model.model.") for layer in layers]
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return [".".join(each[shared:]) for each in parts]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
