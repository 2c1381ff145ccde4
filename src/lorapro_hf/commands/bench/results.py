"""What has been measured: plain records with the figures that are derived from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorapro_hf.commands.bench.settings import METHODS

MB = 1e6


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(samples) < 2:
        return (samples[0],) * 3
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, middle, third


@dataclass
class Machine:
    """What the machine managed between the steps of the same batch, and what that means for dense moments.

    Args:
        copy_gb_per_s: Every measured rate of a large copy, bytes read and bytes written both counted.
        matmul_gflop_per_s: Every measured rate of a large fp32 matrix product.
    """

    copy_gb_per_s: list[float] = field(default_factory=list)
    matmul_gflop_per_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Roofline:
    """The least time of a step that updates dense moments, in milliseconds.

    Args:
        memory_ms: To read and write M and V once.
        compute_ms: To form g̃ and both products of u with the factors.
    """

    memory_ms: float
    compute_ms: float

    @property
    def bound_ms(self) -> float:
        """The roofline: both at the same time."""
        return max(self.memory_ms, self.compute_ms)

    @property
    def sum_ms(self) -> float:
        """One after the other."""
        return self.memory_ms + self.compute_ms


@dataclass
class Result:
    """The figures of one method on one workload.

    Args:
        method: Name out of `METHODS`.
        workload: Name of the workload.
        rank: Rank of the factors.
        dtype: `fp32` or `bf16`.
        layers: Blocks that were stepped.
        whole: Whether these are all blocks of the model.
        batch: Number of the batch: results of one batch were measured in turns.
        samples_ms: Every timed step.
        baseline_ms: Every timed step of the baseline in the same batch.
        state_bytes: What the optimizer keeps for its parameters.
        kept_bytes: What it keeps in all, buffers included.
        peak_bytes: Most memory of a step beyond what was there before it.
        largest_bytes: Largest single allocation of a step.
        largest_shape: Shape of the largest new tensor of a step.
        dense_shapes: Shapes of new tensors of a step that are as large as a weight, or m × m.
        kernels: Kernels of a step (see `KernelCount`).
        calls: Operators that Python called in a step.
        roofline: Of dense moments, measured in the same batch.
        waits: On CUDA, what makes the host wait for the device.
        graph: On CUDA, milliseconds of a step replayed from a graph, or why there are none.
        note: Why it is not the whole model, or why there is nothing.
    """

    method: str
    workload: str
    rank: int
    dtype: str
    layers: int = 0
    whole: bool = True
    batch: int = 0
    samples_ms: list[float] = field(default_factory=list)
    baseline_ms: list[float] = field(default_factory=list)
    state_bytes: int | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    largest_bytes: int | None = None
    largest_shape: tuple[int, ...] | None = None
    dense_shapes: list[tuple[int, ...]] = field(default_factory=list)
    kernels: int | None = None
    calls: int | None = None
    roofline: Roofline | None = None
    waits: str | None = None
    graph: float | str | None = None
    note: str | None = None

    @property
    def title(self) -> str:
        """The method's name in tables."""
        return METHODS[self.method].title

    @property
    def median_ms(self) -> float | None:
        """The median time of a step."""
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def ratio(self) -> float | None:
        """The median time over that of the baseline in the same batch."""
        if not self.samples_ms or not self.baseline_ms:
            return None
        return statistics.median(self.samples_ms) / statistics.median(self.baseline_ms)


@dataclass
class GrowthPoint:
    """Step time and kernels at one size.

    Args:
        method: Name out of `METHODS`.
        axis: `layers`, `m`, `n` or `r`.
        size: The value on that axis.
        samples_ms: Every timed step.
        kernels: Kernels of a step.
        calls: Operators that Python called in a step.
    """

    method: str
    axis: str
    size: int
    samples_ms: list[float] = field(default_factory=list)
    kernels: int | None = None
    calls: int | None = None


@dataclass
class Share:
    """Optimizer steps within training steps.

    Args:
        method: Name out of `METHODS`.
        workload: Name of the model that was trained.
        precision: What forward and backward were computed in.
        model_ms: Every forward and backward.
        step_ms: Every optimizer step that followed one.
        note: Why there is nothing, or why it is not bf16.
    """

    method: str
    workload: str
    precision: str
    model_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    note: str | None = None

    @property
    def share(self) -> float | None:
        """The median step over the median of the whole training step."""
        if not self.step_ms:
            return None
        whole = [model + step for model, step in zip(self.model_ms, self.step_ms, strict=True)]
        return statistics.median(self.step_ms) / statistics.median(whole)


@dataclass
class Outcome:
    """Everything that a run has measured so far."""

    results: list[Result] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)
    growth: list[GrowthPoint] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: bool = False
