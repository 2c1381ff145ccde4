"""Which methods are measured side by side on which part of a model, and what comes of it?

A method is measured on the whole model where its memory and its time allow, else on one transformer block. Methods
that fit into memory together make a batch; each batch has a baseline of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import torch

from lorapro_hf.commands.bench.measure import Contender, measure_in_turns
from lorapro_hf.commands.bench.peers import missing
from lorapro_hf.commands.bench.results import Outcome, Result
from lorapro_hf.commands.bench.roofline import MachineProbe, roofline
from lorapro_hf.commands.bench.settings import BASELINE, METHODS, MODELS, BenchSettings, Method, ModelShapes
from lorapro_hf.commands.bench.workloads import Workload
from lorapro_hf.commands.common.meters import kept_bytes

_MEMORY_SHARE = 0.6  # of what is available, for all contenders of a batch
_BLOCK_FACTOR = 2  # times the seconds of a method: longest step of one block
_TARGET_FACTOR = 5  # times the seconds of a method: longest step of the whole model in the workload with targets
TARGET_WORKLOAD = ("smollm2-135m", 8, "fp32")


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
    """What one block of a model says about a method."""

    method: Method
    estimate_ms: float
    block_bytes: int
    whole: bool
    note: str | None = None


@dataclass
class Forecasts:
    """Steps of one block measured so far, to tell beforehand which would take too long."""

    known: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)

    @staticmethod
    def work(method: Method, workload: Workload) -> float:
        """An upper bound of how the work of a step grows, in no unit."""
        r = workload.rank
        total = 0.0
        for _, m, n in workload.block:
            total += (m + n) * r * r + 30 * r**3 + (r * m * (m + n) if method.dense else 0)
        return total * workload.layers

    def note(self, method: Method, workload: Workload, took_ms: float) -> None:
        """Remember a measured step."""
        self.known.setdefault((method.name, workload.dtype), []).append((self.work(method, workload), took_ms))

    def expected_ms(self, method: Method, workload: Workload) -> float | None:
        """What a step would take at most, `None` if none has been measured."""
        known = self.known.get((method.name, workload.dtype), [])
        work = self.work(method, workload)
        return min((took * max(1.0, work / before) for before, took in known), default=None)


class Ratios:
    """Measures all methods on all combinations of model, rank and dtype.

    Args:
        settings: Of the run.
        outcome: Filled as results come in.
        device: Where.
        say: Told what is being done.
    """

    def __init__(
        self, settings: BenchSettings, outcome: Outcome, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.outcome = outcome
        self.device = device
        self.say = say
        self.forecasts = Forecasts()
        self._batches = 0

    def combinations(self) -> list[tuple[ModelShapes, int, str]]:
        """Model, rank and dtype, in the order in which they are measured: small ones first."""
        settings = self.settings
        return [
            (MODELS[name], rank, dtype)
            for dtype in settings.dtypes
            for rank in sorted(settings.ranks)
            for name in settings.workloads
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
                    continue
                self._measure_batch(batch, workload)

    def _result(self, method: Method, workload: Workload, note: str | None = None) -> Result:
        whole, layers = workload.whole, workload.layers
        return Result(
            method.name, workload.name, workload.rank, workload.dtype, layers, whole, self._batches, note=note
        )

    def _try(self, method: Method, model: ModelShapes, rank: int, dtype: str) -> _Trial | None:
        """Step one block; `None` (and a result with the reason) if that cannot be done."""
        block = Workload.of(model, rank, dtype, 1)
        self.say(f"{method.title}: one block")
        reason = missing(method) or self._too_much(method, block)
        if reason is None:
            try:
                contender = Contender(method.name, block, self.device, self.settings.seed)
                factors = sum(2 * factor.nbytes for factor in contender.task.factors)
                size = factors + kept_bytes(contender.optimizer, contender.task.model)
                took_ms = contender.estimate_ms
                self.forecasts.note(method, block, took_ms)
                if took_ms <= self.settings.seconds * _BLOCK_FACTOR * 1e3:
                    return self._trial(method, model, block, took_ms, size)
                reason = f"not measured: {took_ms / 1e3:.0f} s a step for one block"
            except Exception as error:  # whatever a peer raises goes into the table
                reason = reason_of(error)
        self.outcome.results.append(self._result(method, block, reason))
        return None

    def _too_much(self, method: Method, block: Workload) -> str | None:
        """Why not even one block should be tried."""
        expected, limit = self.forecasts.expected_ms(method, block), self.settings.seconds * _BLOCK_FACTOR * 1e3
        if expected is not None and expected > limit:
            return f"not measured: about {expected / 1e3:.0f} s a step for one block"
        if method.dense:
            # moments and what peers form of weights of their own size, or m × m
            needed = sum(8 * m * n for _, m, n in block.block) + max(16 * m * max(m, n) for _, m, n in block.block)
            if needed > available_bytes(self.device) * _MEMORY_SHARE:
                return f"not measured: one block needs about {needed / 1e9:.1f} GB"
        return None

    def _trial(self, method: Method, model: ModelShapes, block: Workload, took_ms: float, size: int) -> _Trial:
        is_target = (model.name, block.rank, block.dtype) == TARGET_WORKLOAD
        limit = self.settings.seconds * (_TARGET_FACTOR if is_target else 1) * 1e3
        note = None
        if size * model.layers > available_bytes(self.device) * _MEMORY_SHARE / 2:  # the baseline is there as well
            note = f"one block: the model would need {size * model.layers / 1e9:.0f} GB"
        elif took_ms * model.layers > limit:
            note = f"one block: the model would take about {took_ms * model.layers / 1e3:.0f} s a step"
        return _Trial(method, took_ms, size, note is None, note)

    def _batches_of(self, baseline: _Trial, others: Sequence[_Trial], layers: int, alone: bool) -> list[list[_Trial]]:
        """Batches that fit into memory, each with the baseline at its head."""
        limit = available_bytes(self.device) * _MEMORY_SHARE
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
        self.outcome.machines.append(probe.machine)
        for result in results:
            result.baseline_ms = results[0].samples_ms
        self.say(f"{len(contenders)} methods in turns")
        settings = self.settings
        measure_in_turns(
            contenders,
            [result.samples_ms for result in results],
            rounds=settings.rounds,
            repeats=settings.repeats,
            seconds=settings.seconds,
            between=probe.read,
        )
        for contender, result in zip(contenders, results, strict=True):
            self.say(f"{METHODS[result.method].title}: memory and kernels")
            try:
                contender.probe(result)
            except Exception as error:
                result.note = reason_of(error)
            result.roofline = roofline(result, workload, probe.machine)
