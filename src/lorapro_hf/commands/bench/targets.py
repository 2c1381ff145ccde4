"""What should the figures be, and are they?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lorapro_hf.commands.bench.ratios import TARGET_WORKLOAD
from lorapro_hf.commands.bench.results import MB, GrowthPoint, Outcome, Result
from lorapro_hf.commands.bench.settings import METHODS, MODELS

NOT_MEASURED = "not measured"
_PEAK_MB = 64


@dataclass(frozen=True)
class Target:
    """A target beside what was measured.

    Args:
        name: What is measured.
        wanted: The target in words.
        measured: The figure in words.
        met: `None` if it was not measured.
    """

    name: str
    wanted: str
    measured: str = NOT_MEASURED
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """`met`, `not met` or a dash."""
        return "–" if self.met is None else "met" if self.met else "not met"


class _Measured:
    """The results of one workload by method, of the whole model only."""

    def __init__(self, outcome: Outcome, key: tuple[str, int, str]) -> None:
        self.outcome = outcome
        self._results = {
            result.method: result
            for result in outcome.results
            if (result.workload, result.rank, result.dtype) == key and result.whole and result.samples_ms
        }

    def get(self, method: str) -> Result | None:
        return self._results.get(method)

    def median(self, method: str) -> float | None:
        result = self.get(method)
        return None if result is None else result.median_ms

    def modes(self) -> list[Result]:
        return [result for name, result in self._results.items() if METHODS[name].mode is not None]


def _at_most(name: str, value: float | None, limit: float, unit: str = "times") -> Target:
    wanted = f"at most {limit:g} {unit}"
    if value is None:
        return Target(name, wanted)
    return Target(name, wanted, f"{value:.2f} {unit}", value <= limit)


def _times_faster(name: str, ours: float | None, theirs: float | None, least: float) -> Target:
    wanted = f"at least {least:g} times faster"
    if ours is None or theirs is None:
        return Target(name, wanted)
    return Target(name, wanted, f"{theirs / ours:.1f} times faster", theirs / ours >= least)


def _ratio(measured: _Measured, method: str) -> float | None:
    result = measured.get(method)
    return None if result is None else result.ratio


def _roofline(measured: _Measured) -> float | None:
    result = measured.get("full")
    if result is None or result.roofline is None or result.median_ms is None:
        return None
    return result.median_ms / result.roofline.bound_ms


def _share(outcome: Outcome, workload: str, method: str, limit: float) -> Target:
    name, wanted = f"share of {method} in a training step (8 × 64 tokens, bf16)", f"at most {limit:.0%}"
    known = (share for share in outcome.shares if (share.workload, share.method) == (workload, method))
    share = next(known, None)
    if share is None or share.share is None:
        return Target(name, wanted)
    return Target(name, wanted, f"{share.share:.1%} ({share.precision})", share.share <= limit)


def _memory(measured: _Measured) -> Target:
    name, wanted = "extra peak memory of a step", f"at most {_PEAK_MB} MB, no m × m or m × n tensor"
    known = [result for result in measured.modes() if result.peak_bytes is not None]
    if not known:
        return Target(name, wanted)
    worst = max(known, key=lambda result: result.peak_bytes or 0)
    peak = (worst.peak_bytes or 0) / MB
    dense = [f"{result.method} {shape}" for result in known for shape in result.dense_shapes[:1]]
    text = f"{peak:.1f} MB ({worst.method}), " + (f"but {', '.join(dense)}" if dense else "none")
    return Target(name, wanted, text, peak <= _PEAK_MB and not dense)


def _kernels(growth: Sequence[GrowthPoint], layers: int) -> Target:
    name, wanted = f"kernels of a step, {layers} → {2 * layers} layers", "unchanged"
    counts: dict[str, dict[int, GrowthPoint]] = {}
    for point in growth:
        if point.axis == "layers" and point.kernels is not None and METHODS[point.method].mode is not None:
            counts.setdefault(point.method, {})[point.size] = point
    both = {mode: (p[layers], p[2 * layers]) for mode, p in counts.items() if {layers, 2 * layers} <= set(p)}
    if not both:
        return Target(name, wanted)
    text = ", ".join(
        f"{mode} {few.kernels} → {many.kernels} (calls {few.calls} → {many.calls})"
        for mode, (few, many) in both.items()
    )
    return Target(name, wanted, text, all(few.kernels == many.kernels for few, many in both.values()))


def _on_hopper(outcome: Outcome) -> list[Target]:
    """The targets on an H100 or H200."""
    measured = _Measured(outcome, ("llama-2-7b", 8, "fp32"))
    targets = [
        _at_most("Llama-2-7B r=8: efficient", measured.median("efficient"), 3.0, "ms"),
        _at_most("Llama-2-7B r=8: full vs memory roofline", _memory_roofline(measured.get("full")), 1.3),
    ]
    for mode in ("efficient", "full"):
        result = measured.get(mode)
        for name, wanted, what in (
            ("synchronisation", "none", "waits"),
            ("CUDA graph", "can be captured", "graph"),
        ):
            title = f"Llama-2-7B r=8: {mode}, {name}"
            if result is None or result.kernels is None:
                targets.append(Target(title, wanted))
            elif what == "waits":
                targets.append(Target(title, wanted, result.waits or "none", result.waits is None))
            else:
                fine = isinstance(result.graph, float)
                text = f"replayed in {result.graph:.2f} ms" if fine else str(result.graph or "not tried: it waits")
                targets.append(Target(title, wanted, text, fine))
    return targets


def _memory_roofline(result: Result | None) -> float | None:
    if result is None or result.roofline is None or result.median_ms is None:
        return None
    return result.median_ms / result.roofline.memory_ms


def targets_of(outcome: Outcome, key: tuple[str, int, str] = TARGET_WORKLOAD, device_name: str = "cpu") -> list[Target]:
    """All targets with what was measured for them.

    Args:
        outcome: What was measured.
        key: Workload, rank and dtype that they hold for.
        device_name: An H100 or H200 has targets of its own.
    """
    measured = _Measured(outcome, key)
    layers = MODELS[key[0]].layers
    targets = [
        _times_faster(
            "efficient vs lora-pro-adamw efficient",
            measured.median("efficient"),
            measured.median("adamw_efficient"),
            12,
        ),
        _at_most("efficient vs fused AdamW", _ratio(measured, "efficient"), 4),
        _at_most("factored vs fused AdamW", _ratio(measured, "factored"), 8),
        _times_faster("full vs lora-pro-adamw full", measured.median("full"), measured.median("adamw_full"), 6),
        _at_most("full vs the roofline of the same run", _roofline(measured), 1.5),
        _share(outcome, key[0], "efficient", 0.02),
        _share(outcome, key[0], "full", 0.15),
        _memory(measured),
        _kernels(outcome.growth, layers),
    ]
    if any(name in device_name for name in ("H100", "H200")):
        targets += _on_hopper(outcome)
    return targets


def median_rates(outcome: Outcome) -> tuple[float, float] | None:
    """The copy bandwidth in GB/s and the fp32 matmul rate in GFLOP/s, medians over the run."""
    copies = [rate for machine in outcome.machines for rate in machine.copy_gb_per_s]
    products = [rate for machine in outcome.machines for rate in machine.matmul_gflop_per_s]
    return (statistics.median(copies), statistics.median(products)) if copies else None
