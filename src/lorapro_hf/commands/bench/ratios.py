"""Which methods are measured side by side, on which part of a model?

A method is measured on the whole model where its memory and its time allow, else on one transformer block. Methods
that fit into memory together make a batch; each batch has a baseline of its own.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch

from lorapro_hf.commands.bench.measure import Contender, MachineProbe, measure_in_turns, roofline
from lorapro_hf.commands.bench.results import Outcome, Result, Spread
from lorapro_hf.commands.bench.settings import (
    BASELINE,
    METHODS,
    MODELS,
    BenchSettings,
    MeasuredOptimizer,
    ModelShapes,
    missing,
)
from lorapro_hf.commands.bench.workloads import Workload
from lorapro_hf.commands.common.meters import kept_bytes

_USABLE = 0.6  # of the free memory, for all contenders of a batch
_BLOCK_PATIENCE = 2  # longest step of one block, over the seconds of a method
_FIRST_PATIENCE = 5  # longest step of the whole model in the first combination; 1 in the others


def reason_of(error: BaseException) -> str:
    """The kind and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


@dataclass
class _Trial:
    """A method that has stepped one block of a model."""

    method: MeasuredOptimizer
    block_bytes: int
    whole: bool
    note: str | None


class Ratios:
    """Measures all methods on all combinations of model, rank and dtype.

    Args:
        settings: Of the run.
        outcome: Gets the results.
        device: Where.
        say: Called with a line about each piece of work.
    """

    def __init__(
        self, settings: BenchSettings, outcome: Outcome, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.outcome = outcome
        self.device = device
        self.say = say
        self._batches = 0

    def combinations(self) -> list[tuple[ModelShapes, int, str]]:
        """Model, rank and dtype, in the order in which they are measured: small ones first."""
        settings = self.settings
        ranks = sorted(settings.ranks)
        return [
            (MODELS[name], rank, dtype) for dtype in settings.dtypes for rank in ranks for name in settings.workloads
        ]

    def measure(self, model: ModelShapes, rank: int, dtype: str, deadline: float) -> None:
        """Measure all methods on one combination, batch by batch."""
        trials = [trial for method in self.settings.measured if (trial := self._try(method, model, rank, dtype))]
        baseline = next((trial for trial in trials if trial.method.name == BASELINE), None)
        if baseline is None:
            return
        for whole in (True, False):
            workload = Workload.of(model, rank, dtype, None if whole else 1)
            others = [t for t in trials if t is not baseline and t.whole == whole]
            for batch in self._batches_of(baseline, others, workload.layers, alone=whole and baseline.whole):
                if time.perf_counter() > deadline:
                    names = ", ".join(trial.method.title for trial in batch)
                    self.outcome.notes.append(f"{model.title} r={rank} {dtype}: no time left for {names}.")
                else:
                    self._measure_batch(batch, workload)

    def _result(self, method: MeasuredOptimizer, workload: Workload, note: str | None) -> Result:
        w = workload
        return Result(method.name, w.name, w.rank, w.dtype, w.layers, w.whole, self._batches, note=note)

    def _try(self, method: MeasuredOptimizer, model: ModelShapes, rank: int, dtype: str) -> _Trial | None:
        """Step one block; `None` (and a result with the reason) if that cannot be done."""
        block = Workload.of(model, rank, dtype, 1)
        self.say(f"{method.title}: one block")
        reason = missing(method) or self._too_large(method, block)
        if reason is None:
            try:
                contender = Contender(method.name, block, self.device, self.settings.seed)
                factors = sum(2 * factor.nbytes for factor in contender.synthetic.factors)
                size = factors + kept_bytes(contender.optimizer, contender.synthetic.model)
                took_ms = contender.estimate_ms
                if took_ms <= self.settings.seconds * _BLOCK_PATIENCE * 1e3:
                    note = self._why_one_block(
                        model, took_ms, size, first=(model, rank, dtype) == self.combinations()[0]
                    )
                    return _Trial(method, size, note is None, note)
                reason = f"not measured: {took_ms / 1e3:.0f} s a step for one block"
            except Exception as error:  # the table reports the errors of other optimizers
                reason = reason_of(error)
        self.outcome.results.append(self._result(method, block, reason))
        return None

    def _too_large(self, method: MeasuredOptimizer, block: Workload) -> str | None:
        """Why the memory is too short for one block."""
        if method.dense:
            # moments, and temporary tensors of m × n or m × m that other packages form
            needed = sum(8 * m * n for _, m, n in block.block) + max(16 * m * max(m, n) for _, m, n in block.block)
            if needed > available_bytes(self.device) * _USABLE:
                return f"not measured: one block needs about {needed / 1e9:.1f} GB"
        return None

    def _why_one_block(self, model: ModelShapes, took_ms: float, size: int, first: bool) -> str | None:
        """Why the whole model is not measured; `None` if it is."""
        if size * model.layers > available_bytes(self.device) * _USABLE / 2:  # leaves room for the baseline
            return f"one block: the model would need {size * model.layers / 1e9:.0f} GB"
        if took_ms * model.layers > self.settings.seconds * (_FIRST_PATIENCE if first else 1) * 1e3:
            return f"one block: the model would take about {took_ms * model.layers / 1e3:.0f} s a step"
        return None

    def _batches_of(self, baseline: _Trial, others: Sequence[_Trial], layers: int, alone: bool) -> list[list[_Trial]]:
        """Batches that fit into memory, each with the baseline at its head."""
        limit = available_bytes(self.device) * _USABLE
        batches: list[list[_Trial]] = [[baseline]] if others or alone else []
        for trial in others:
            together = sum(t.block_bytes for t in (*batches[-1], trial)) * layers
            if together > limit and len(batches[-1]) > 1:
                batches.append([baseline])
            batches[-1].append(trial)
        return batches

    def _measure_batch(self, batch: Sequence[_Trial], workload: Workload) -> None:
        self._batches += 1
        contenders: list[Contender] = []
        results: list[Result] = []
        for trial in batch:
            self.say(f"{trial.method.title}: warming up")
            result = self._result(trial.method, workload, trial.note)
            self.outcome.results.append(result)
            try:
                contenders.append(Contender(trial.method.name, workload, self.device, self.settings.seed))
                results.append(result)
            except Exception as error:
                result.note = reason_of(error)
        if not results or results[0].method != BASELINE:
            return
        probe = MachineProbe(self.device, small=workload.name == "tiny")
        self.say(f"{len(contenders)} methods in turns")
        samples = measure_in_turns(contenders, self.settings, between=probe.read)
        machine = probe.machine()
        self.outcome.machines.append(machine)
        for contender, result, times in zip(contenders, results, samples, strict=True):
            self.say(f"{METHODS[result.method].title}: memory and kernels")
            result.step_ms = Spread.of(times)
            result.ratio = statistics.median(times) / statistics.median(samples[0])
            try:
                contender.probe(result)
            except Exception as error:
                result.note = reason_of(error)
            result.roofline = roofline(result, workload, machine)
