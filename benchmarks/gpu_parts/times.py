"""How long does a step take on the shapes of real models, beside other optimizers and the memory roofline?"""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from functools import partial
from typing import Any

from gpu_parts.layers import measure_layer_times
from gpu_parts.record import Record
from lorapro_hf.commands.bench.measure import Bench, Contender
from lorapro_hf.commands.bench.ratios import measure_ratios
from lorapro_hf.commands.bench.report import environment
from lorapro_hf.commands.bench.results import Outcome, Result
from lorapro_hf.commands.bench.settings import BASELINE, DEFAULT_WORKLOADS, METHODS, MODELS, BenchSettings, missing
from lorapro_hf.commands.bench.workloads import Workload
from lorapro_hf.config import MODES

PEERS = ("riemannian", "lorarite")
RANKS = (8, 64, 256)
WORKLOADS = [(name, rank, "fp32") for rank in RANKS for name in DEFAULT_WORKLOADS]
WORKLOADS += [(name, 64, "bf16") for name in DEFAULT_WORKLOADS]  # last, as the time may not suffice
TINY = [("tiny", 4, "fp32")]
NEEDED = 25.0  # seconds for one workload


def compile_ahead(record: Record, rank: int) -> None:
    """Have Triton compile what the steps at one rank need; its cache on disk keeps the kernels."""
    if not record.on_cuda:
        record.not_done("compiling ahead: it needs a GPU")
        return
    for mode in MODES:
        one_block = Workload.of(MODELS[DEFAULT_WORKLOADS[0]], rank, "fp32", 1)
        record.attempt(f"first steps of {mode}, r={rank}", partial(Contender, mode, one_block, record.device))


def measure_times(record: Record) -> None:
    """Measure one workload after the other, until the time is up."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler prints lines of its own
    methods = (BASELINE, *MODES, *PEERS)
    for name in methods:
        if reason := missing(METHODS[name]):
            record.not_done(f"times of {METHODS[name].title}: {reason}")
    settings = BenchSettings(methods=methods, device=record.device.type, rounds=3, repeats=3, seconds=0.5)
    if record.is_tiny:
        settings = BenchSettings(methods=methods, device=record.device.type, rounds=1, repeats=1, seconds=0.5)
    measure_layer_times(record)
    bench = Bench(settings, record.device, Outcome(environment(record.device)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, rank, dtype in TINY if record.is_tiny else WORKLOADS:
            title = f"{MODELS[name].title}, r={rank}, {dtype}"
            record.attempt(title, partial(_measure, record, bench, name, rank, dtype), 0 if record.is_tiny else NEEDED)


def _measure(record: Record, bench: Bench, name: str, rank: int, dtype: str) -> None:
    before = len(bench.outcome.results)
    measure_ratios(bench, MODELS[name], rank, dtype)
    new = [result for result in bench.outcome.results[before:] if result.step_ms or result.note]
    for result in new:
        method = METHODS[result.method]
        if method.ours and result.step_ms is None and not (result.note or "").startswith("not "):
            record.found.errors.append(f"{MODELS[name].title}, r={rank}, {dtype}, {method.title}: {result.note}")
    record.found.figures.setdefault("results", []).extend(_figures(bench, result) for result in new)
    record.found.figures["machines"] = [asdict(machine) for machine in bench.outcome.machines]


def _figures(bench: Bench, result: Result) -> dict[str, Any]:
    """The figures of a result, with the least time in which the memory can be read and written.

    Every optimizer reads factors, gradients and state and writes factors and state.
    """
    figures = asdict(result)
    if result.step_ms is not None and result.state_bytes is not None:
        lengths = sum(m + n for _, m, n in MODELS[result.workload].block)
        of_factors = result.layers * result.rank * lengths * {"fp32": 4, "bf16": 2}[result.dtype]
        speed = bench.outcome.machines[result.batch - 1].copy_gb_per_s
        figures["least_ms"] = (3 * of_factors + 2 * result.state_bytes) / speed / 1e6
    return figures
