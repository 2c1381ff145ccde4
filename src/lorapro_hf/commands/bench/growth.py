"""How do time and kernels of a step grow with the number of layers, with m, n and r?"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from lorapro_hf.commands.bench.measure import Bench, Contender, measure_in_turns
from lorapro_hf.commands.bench.probes import kernels_of
from lorapro_hf.commands.bench.results import GrowthPoint, Spread
from lorapro_hf.commands.bench.settings import MeasuredOptimizer, ModelShapes
from lorapro_hf.commands.bench.workloads import Workload

AXES: Mapping[str, str] = {"layers": "layers", "m": "m (out)", "n": "n (in)", "r": "r"}
_RANK = 8
_COPIES = 8  # layers of equal shape where m, n or r grows


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through the points in log-log scale, by least squares."""
    logarithms = [math.log(size) for size in sizes], [math.log(value or 1) for value in values]
    return statistics.linear_regression(*logarithms).slope


def series(model: ModelShapes, method: MeasuredOptimizer, axis: str) -> list[tuple[int, Workload]]:
    """Sizes on an axis with their workloads; dense methods get fewer layers."""
    if axis == "layers":
        counts = [int(model.layers * factor) for factor in ((0.5, 1, 2) if method.dense else (1, 2, 4))]
        return [(count, Workload.of(model, _RANK, "fp32", count)) for count in counts]
    h = model.hidden
    if axis == "r":
        ranks = (8, 16, 32, 64, 128) if h >= 256 else (2, 4, 8, 16)
        return [(rank, _layers_of(2 * h, 2 * h, rank)) for rank in ranks]
    sizes = (h, 2 * h, 4 * h, 8 * h)
    return [(size, _layers_of(size, h, _RANK) if axis == "m" else _layers_of(h, size, _RANK)) for size in sizes]


def _layers_of(m: int, n: int, rank: int) -> Workload:
    return Workload("growth", (("proj", m, n),), _COPIES, rank, "fp32")


def measure_growth(bench: Bench) -> None:
    """Measure the baseline and the modes of LoRA-Pro along all axes; the sizes of one method take turns."""
    settings = bench.settings
    for axis, method in itertools.product(AXES, settings.compared_modes):
        bench.say(f"{method.title} against {axis}")
        sized = series(settings.small_model, method, axis)
        try:
            contenders = [Contender(method.name, workload, bench.device, settings.seed) for _, workload in sized]
            samples = measure_in_turns(contenders, settings)
            for (size, _), contender, times in zip(sized, contenders, samples, strict=True):
                kernels = kernels_of(contender.fresh_step(), bench.device)
                bench.outcome.growth.append(GrowthPoint(method.name, axis, size, Spread.of(times), kernels))
        except Exception as error:
            bench.outcome.notes.append(f"Growth of {method.title} with {axis}: {type(error).__name__}: {error}")


def curves(points: Sequence[GrowthPoint]) -> list[list[GrowthPoint]]:
    """The points of each method along each axis, where there are several."""
    keys = dict.fromkeys((point.method, point.axis) for point in points)
    grouped = [[point for point in points if (point.method, point.axis) == key] for key in keys]
    return [curve for curve in grouped if len(curve) > 1]
