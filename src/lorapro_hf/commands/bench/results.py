"""Which figures does a run measure and keep in `results.json`?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorapro_hf.commands.bench.settings import METHODS, BenchSettings
from lorapro_hf.commands.common.records import write_json
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import parse_json


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of times in milliseconds, and their number."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of the samples."""
        low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high, len(samples))


@dataclass(frozen=True)
class Machine:
    """Speed of the machine: a large copy (bytes read and bytes written both count) and a large fp32 product."""

    copy_gb_per_s: float
    matmul_gflop_per_s: float


@dataclass(frozen=True)
class Roofline:
    """The least time of a step that updates dense moments, in milliseconds."""

    memory_ms: float  # to read and write both moments once
    compute_ms: float  # to form the equivalent gradient and both products of the direction with the factors


@dataclass
class Result:
    """The figures of one method on one workload."""

    method: str  # name in `METHODS`
    workload: str  # name of the model
    rank: int
    dtype: str
    layers: int = 0
    whole: bool = True  # whether these are all blocks of the model
    batch: int = 0  # the methods of one batch took turns
    step_ms: Spread | None = None
    ratio: float | None = None  # median time over the baseline's in the same batch
    state_bytes: int | None = None  # state that the optimizer keeps for its parameters
    kept_bytes: int | None = None  # all memory that the optimizer keeps
    peak_bytes: int | None = None  # most memory that a step allocates
    largest_shape: tuple[int, ...] | None = None  # of the new tensors of a step
    kernels: int | None = None  # see `Allocations`
    roofline: Roofline | None = None  # of dense moments, at the speed of the machine in the same batch
    waits: str | None = None  # on CUDA, the operator that makes the host wait for the device
    note: str | None = None  # why it is not the whole model, or why there are no figures

    @property
    def title(self) -> str:
        """The method's name in tables."""
        return METHODS[self.method].title + ("" if self.whole else " (one block)")


@dataclass
class GrowthPoint:
    """Step time and kernels of a method at one size; `axis` is `layers`, `m`, `n` or `r`."""

    method: str
    axis: str
    size: int
    step_ms: Spread
    kernels: int


@dataclass
class TrainingShare:
    """The optimizer's share of training steps with one method."""

    method: str
    workload: str
    precision: str  # of forward and backward
    model_ms: Spread  # forward and backward
    step_ms: Spread  # the optimizer step
    share: float  # median optimizer step over the median of the whole training step


@dataclass
class LayerTime:
    """Forward and backward pass of one LoRA layer, by PEFT and fused by each criterion of `fuse_lora_layers`."""

    workload: str
    layer: str
    rank: int
    dtype: str  # of input, weight and factors
    tokens: int
    peft_ms: Spread
    fused_ms: dict[str, Spread]
    gains: dict[str, float]  # PEFT's median time over that of the fused layer
    kept_bytes: dict[str, int]  # for the backward pass beyond input and parameters, of "PEFT" and each criterion


@dataclass
class Outcome:
    """All figures that a run has measured so far."""

    environment: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)
    growth: list[GrowthPoint] = field(default_factory=list)
    training: list[TrainingShare] = field(default_factory=list)
    layers: list[LayerTime] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: bool = False


_RECORDS = {"results": Result, "machines": Machine, "growth": GrowthPoint, "training": TrainingShare}
_RECORDS |= {"layers": LayerTime}
_NESTED = {"step_ms": Spread, "model_ms": Spread, "peft_ms": Spread, "roofline": Roofline}


def write_results(path: Path, settings: BenchSettings, outcome: Outcome) -> None:
    """Write the settings and the outcome as JSON; figures that were not measured are left out."""
    measured = asdict(outcome, dict_factory=lambda items: {name: value for name, value in items if value is not None})
    write_json(path, {"settings": {**asdict(settings), "output_dir": None}, **measured})


def read_results(path: Path) -> Outcome:
    """The outcome that `write_results` wrote.

    Raises:
        UsageError: the file is missing or of another form.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        content.pop("settings", None)
        for name, record in _RECORDS.items():
            content[name] = [_filled(record, row) for row in content.get(name, [])]
        return Outcome(**content)
    except (OSError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no result of lorapro bench ({error!r}). Measure without --report_only.") from error


def _filled(record: type[Any], row: Mapping[str, Any]) -> Any:
    if "fused_ms" in row:
        row = {**row, "fused_ms": {name: Spread(**spread) for name, spread in row["fused_ms"].items()}}
    return record(**{name: _NESTED[name](**value) if name in _NESTED else value for name, value in row.items()})
