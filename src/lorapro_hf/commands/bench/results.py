"""What has been measured, as records that `results.json` holds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorapro_hf.commands.bench.settings import METHODS, BenchSettings
from lorapro_hf.commands.common.records import write_json
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import parse_json


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the times in milliseconds, and their number."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread | None:
        """The spread of the samples; `None` if there are none."""
        if not samples:
            return None
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples))


@dataclass
class Machine:
    """Speed of the machine between the steps of a batch.

    Args:
        copy_gb_per_s: Rate of a large copy; bytes read and bytes written both count.
        matmul_gflop_per_s: Rate of a large fp32 matrix product.
    """

    copy_gb_per_s: float
    matmul_gflop_per_s: float


@dataclass(frozen=True)
class Roofline:
    """The least time of a step that updates dense moments, in milliseconds.

    Args:
        memory_ms: To read and write both moments once.
        compute_ms: To form the equivalent gradient and both products of the direction with the factors.
    """

    memory_ms: float
    compute_ms: float

    @property
    def bound_ms(self) -> float:
        """The roofline: memory and computation at the same time."""
        return max(self.memory_ms, self.compute_ms)

    @property
    def sum_ms(self) -> float:
        """Memory and computation one after the other."""
        return self.memory_ms + self.compute_ms


@dataclass
class Result:
    """The figures of one method on one workload.

    Args:
        method: Name in `METHODS`.
        workload: Name of the model.
        rank: Rank of the factors.
        dtype: `fp32` or `bf16`.
        layers: Number of blocks.
        whole: Whether these are all blocks of the model.
        batch: Number of the batch: results of one batch were measured in turns.
        step_ms: Time of a step.
        ratio: Median time over the baseline's in the same batch.
        state_bytes: State that the optimizer keeps for its parameters.
        kept_bytes: All memory that the optimizer keeps.
        peak_bytes: Most memory that a step allocates.
        largest_shape: Shape of the largest new tensor of a step.
        kernels: Kernels of a step, see `Allocations`.
        roofline: Of dense moments, at the speed of the machine during the same batch.
        waits: On CUDA, the operator that makes the host wait for the device.
        note: Why it is not the whole model, or why there are no figures.
    """

    method: str
    workload: str
    rank: int
    dtype: str
    layers: int = 0
    whole: bool = True
    batch: int = 0
    step_ms: Spread | None = None
    ratio: float | None = None
    state_bytes: int | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    largest_shape: tuple[int, ...] | None = None
    kernels: int | None = None
    roofline: Roofline | None = None
    waits: str | None = None
    note: str | None = None

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
    """The optimizer's share of training steps with one method.

    Args:
        method: Name in `METHODS`.
        workload: Name of the model.
        precision: Precision of forward and backward.
        model_ms: Time of forward and backward.
        step_ms: Time of the optimizer step after it.
        share: Median step over the median of the whole training step.
    """

    method: str
    workload: str
    precision: str
    model_ms: Spread
    step_ms: Spread
    share: float


@dataclass
class Outcome:
    """Everything that a run has measured so far."""

    environment: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)
    growth: list[GrowthPoint] = field(default_factory=list)
    training: list[TrainingShare] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: bool = False


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
        return Outcome(
            environment=content["environment"],
            results=[_filled(Result, row) for row in content["results"]],
            machines=[Machine(**row) for row in content["machines"]],
            growth=[_filled(GrowthPoint, row) for row in content["growth"]],
            training=[_filled(TrainingShare, row) for row in content["training"]],
            notes=content["notes"],
            stopped=content["stopped"],
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no result of lorapro bench ({error!r}). Measure without --report_only.") from error


def _filled(record: type[Any], row: Mapping[str, Any]) -> Any:
    nested = {"step_ms": Spread, "model_ms": Spread, "roofline": Roofline}
    values = {name: nested[name](**value) if name in nested and value else value for name, value in row.items()}
    return record(**values)
