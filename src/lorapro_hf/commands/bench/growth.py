"""How do time and kernels of a step grow with the number of layers, with m, n and r?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from lorapro_hf.commands.bench.measure import Bench, Contender, measure_in_turns
from lorapro_hf.commands.bench.results import GrowthPoint, Spread
from lorapro_hf.commands.bench.settings import BASELINE, MODELS, BenchSettings, MeasuredOptimizer, ModelShapes
from lorapro_hf.commands.bench.workloads import Workload

AXES: Mapping[str, str] = {"layers": "layers", "m": "m (out)", "n": "n (in)", "r": "r"}
_RANK = 8
_COPIES = 8  # layers of equal shape where m, n or r grows


def small_model(settings: BenchSettings) -> ModelShapes:
    """The first model of the run that is small enough to be enlarged or trained, else SmolLM2-135M."""
    models = [MODELS[name] for name in settings.workloads]
    return next((model for model in models if model.trained), MODELS["smollm2-135m"])


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through the points in log-log scale, by least squares."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


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
    model, settings = small_model(bench.settings), bench.settings
    methods = [method for method in settings.measured if method.name == BASELINE or method.ours]
    for axis, method in ((axis, method) for axis in AXES for method in methods):
        bench.say(f"{method.title} against {axis}")
        sized = series(model, method, axis)
        try:
            contenders = [Contender(method.name, workload, bench.device, settings.seed) for _, workload in sized]
            samples = measure_in_turns(contenders, settings)
            for (size, _), contender, times in zip(sized, contenders, samples, strict=True):
                point = GrowthPoint(method.name, axis, size, Spread.of(times), contender.kernels())
                bench.outcome.growth.append(point)
        except Exception as error:
            bench.outcome.notes.append(f"Growth of {method.title} with {axis}: {type(error).__name__}: {error}")


def exponents(points: Sequence[GrowthPoint]) -> dict[tuple[str, str], tuple[float, float]]:
    """The fitted exponents of time and kernels, by method and axis."""
    fitted = {}
    for key in dict.fromkeys((point.method, point.axis) for point in points):
        mine = [p for p in points if (p.method, p.axis) == key]
        if len(mine) > 1:
            sizes = [point.size for point in mine]
            times, kernels = [point.step_ms.median for point in mine], [float(point.kernels or 1) for point in mine]
            fitted[key] = (fitted_exponent(sizes, times), fitted_exponent(sizes, kernels))
    return fitted
