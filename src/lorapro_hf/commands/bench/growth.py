"""How do time and kernels of a step grow with the number of layers, with m, n and r?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from lorapro_hf.commands.bench.measure import Contender, measure_in_turns
from lorapro_hf.commands.bench.results import GrowthPoint, Outcome
from lorapro_hf.commands.bench.settings import BASELINE, MODELS, BenchSettings, Method, ModelShapes
from lorapro_hf.commands.bench.workloads import Workload

AXES: Mapping[str, str] = {"layers": "layers", "m": "m (out)", "n": "n (in)", "r": "r"}
_RANK = 8
_COPIES = 8  # layers of equal shape where m, n or r grows


def small_model(settings: BenchSettings) -> ModelShapes:
    """The first model of the run that is small enough to be made larger, or to be trained; else SmolLM2-135M."""
    models = [MODELS[name] for name in settings.workloads]
    return next((model for model in models if model.trained), MODELS["smollm2-135m"])


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through the points in log-log scale, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    above = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / math.fsum((a - mean_x) ** 2 for a in x)


def series(model: ModelShapes, method: Method, axis: str) -> list[tuple[int, Workload]]:
    """Sizes on an axis with their workloads; dense methods stop earlier in layers."""
    if axis == "layers":
        times = (0.5, 1, 2) if method.dense else (1, 2, 4)
        counts = [int(model.layers * factor) for factor in times]
        return [(count, Workload.of(model, _RANK, "fp32", count)) for count in counts]
    h = model.hidden
    if axis == "r":
        ranks = (8, 16, 32, 64, 128) if h >= 256 else (2, 4, 8, 16)
        return [(rank, _layers_of(2 * h, 2 * h, rank)) for rank in ranks]
    sizes = (h, 2 * h, 4 * h, 8 * h)
    return [(size, _layers_of(size, h, _RANK) if axis == "m" else _layers_of(h, size, _RANK)) for size in sizes]


def _layers_of(m: int, n: int, rank: int) -> Workload:
    return Workload("growth", (("proj", m, n),), _COPIES, rank, "fp32")


def measure_growth(settings: BenchSettings, outcome: Outcome, device: torch.device, say: Callable[[str], None]) -> None:
    """Measure the baseline and the modes of LoRA-Pro along all axes; the sizes of one method take turns."""
    model = small_model(settings)
    for axis in AXES:
        for method in settings.measured:
            if method.name != BASELINE and method.mode is None:
                continue
            say(f"{method.title} against {axis}")
            workloads = series(model, method, axis)
            points = [GrowthPoint(method.name, axis, size) for size, _ in workloads]
            outcome.growth += points
            try:
                contenders = [Contender(method.name, w, device, settings.seed) for _, w in workloads]
                samples = [point.samples_ms for point in points]
                measure_in_turns(
                    contenders,
                    samples,
                    rounds=settings.rounds,
                    repeats=settings.repeats,
                    seconds=settings.seconds / 2,
                )
                for contender, point in zip(contenders, points, strict=True):
                    contender.count(point)
            except Exception as error:
                outcome.notes.append(f"Growth of {method.title} with {axis}: {type(error).__name__}: {error}")


def exponents(points: Sequence[GrowthPoint]) -> dict[tuple[str, str], tuple[float, float]]:
    """By method and axis the fitted exponents of time and kernels."""
    fitted = {}
    for key in dict.fromkeys((point.method, point.axis) for point in points):
        mine = [p for p in points if (p.method, p.axis) == key and p.samples_ms and p.kernels]
        if len(mine) > 1:
            sizes = [point.size for point in mine]
            times = [sorted(point.samples_ms)[len(point.samples_ms) // 2] for point in mine]
            kernels = [float(point.kernels or 1) for point in mine]
            fitted[key] = (fitted_exponent(sizes, times), fitted_exponent(sizes, kernels))
    return fitted
