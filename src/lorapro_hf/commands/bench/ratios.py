"""Which methods are measured side by side, on which part of a model?

A method is measured on the whole model where its memory and its time allow, else on one transformer block. Methods
that fit into memory together make a batch; each batch has a baseline of its own.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from lorapro_hf.commands.bench.measure import Bench, Contender, machine_speed, measure_in_turns, roofline
from lorapro_hf.commands.bench.results import Result, Spread
from lorapro_hf.commands.bench.settings import BASELINE, MeasuredOptimizer, ModelShapes, missing
from lorapro_hf.commands.bench.workloads import Workload
from lorapro_hf.commands.common.meters import kept_bytes

_USABLE = 0.6  # of the free memory, for all contenders of a batch
_PATIENCE = 2  # longest step of a block or a model, over the seconds of a method


class _Trial(NamedTuple):
    """A method that has stepped one block of a model; `note` says why it is not measured on the whole model."""

    method: MeasuredOptimizer
    block_bytes: int
    note: str | None


def reason_of(error: BaseException) -> str:
    """The kind and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def usable_bytes(device: torch.device) -> int:
    """The memory of the device that contenders may take."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0] * _USABLE)
    return int(psutil.virtual_memory().available * _USABLE)


def measure_ratios(bench: Bench, model: ModelShapes, rank: int, dtype: str) -> None:
    """Measure all methods on one model, rank and dtype, batch by batch."""
    block = Workload.of(model, rank, dtype, 1)
    trials = [trial for method in bench.settings.measured if (trial := _try(bench, method, block, model.layers))]
    if not trials or trials[0].method.name != BASELINE:
        return
    baseline, *others = trials
    for workload in (Workload.of(model, rank, dtype), block):
        chosen = [trial for trial in others if (trial.note is None) == workload.whole]
        if chosen or (workload.whole and baseline.note is None):
            for batch in _batches(baseline, chosen, usable_bytes(bench.device) // workload.layers):
                _measure_batch(bench, batch, workload)


def _result(bench: Bench, method: MeasuredOptimizer, workload: Workload, note: str | None) -> Result:
    w, batch = workload, len(bench.outcome.machines)
    result = Result(method.name, w.name, w.rank, w.dtype, w.layers, w.whole, batch, note=note)
    bench.outcome.results.append(result)
    return result


def _try(bench: Bench, method: MeasuredOptimizer, block: Workload, layers: int) -> _Trial | None:
    """Step one block; `None` (and a result with the reason) if that cannot be done."""
    bench.say(f"{method.title}: one block")
    usable, seconds = usable_bytes(bench.device), bench.settings.seconds * _PATIENCE
    # moments, and temporary tensors of m × n or m × m that other packages form
    needed = sum(8 * m * n for _, m, n in block.block) + max(16 * m * max(m, n) for _, m, n in block.block)
    reason = missing(method)
    if reason is None and method.dense and needed > usable:
        reason = f"not measured: one block needs about {needed / 1e9:.1f} GB"
    if reason is None:
        try:
            contender = Contender(method.name, block, bench.device, bench.settings.seed)
        except Exception as error:  # the table reports the errors of other optimizers
            reason = reason_of(error)
        else:
            took = contender.estimate_ms / 1e3
            size = sum(2 * factor.nbytes for factor in contender.synthetic.factors)
            size += kept_bytes(contender.optimizer, contender.synthetic.model)
            if took <= seconds:
                note = None
                if size * layers > usable / 2:  # leaves room for the baseline
                    note = f"one block: the model would need {size * layers / 1e9:.0f} GB"
                elif took * layers > seconds:
                    note = f"one block: the model would take about {took * layers:.0f} s a step"
                return _Trial(method, size, note)
            reason = f"not measured: {took:.0f} s a step for one block"
    _result(bench, method, block, reason)
    return None


def _batches(baseline: _Trial, others: Sequence[_Trial], limit: int) -> list[list[_Trial]]:
    """Batches whose blocks take at most `limit` bytes together, each with the baseline at its head."""
    batches = [[baseline]]
    for trial in others:
        if len(batches[-1]) > 1 and sum(each.block_bytes for each in (*batches[-1], trial)) > limit:
            batches.append([baseline])
        batches[-1].append(trial)
    return batches


def _measure_batch(bench: Bench, batch: Sequence[_Trial], workload: Workload) -> None:
    machine = machine_speed(bench.device, small=workload.name == "tiny")
    bench.outcome.machines.append(machine)
    measured: list[tuple[Contender, Result]] = []
    for trial in batch:
        bench.say(f"{trial.method.title}: warming up")
        result = _result(bench, trial.method, workload, trial.note)
        try:
            contender = Contender(trial.method.name, workload, bench.device, bench.settings.seed)
            measured.append((contender, result))
        except Exception as error:
            result.note = reason_of(error)
    if not measured or measured[0][1].method != BASELINE:
        return
    bench.say(f"{len(measured)} methods in turns")
    samples = measure_in_turns([contender for contender, _ in measured], bench.settings)
    for (contender, result), times in zip(measured, samples, strict=True):
        bench.say(f"{result.title}: memory and kernels")
        result.step_ms = Spread.of(times)
        result.ratio = statistics.median(times) / statistics.median(samples[0])
        try:
            contender.probe(result)
        except Exception as error:
            result.note = reason_of(error)
        result.roofline = roofline(result, workload, machine)
