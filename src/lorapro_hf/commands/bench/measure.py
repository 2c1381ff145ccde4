"""How long does a step take, measured in turns with the others?"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lorapro_hf.commands.bench.peers import build_optimizer
from lorapro_hf.commands.bench.probes import capture, kernels_of, memory_of, waits_for_device
from lorapro_hf.commands.bench.results import Result
from lorapro_hf.commands.bench.workloads import Task, Workload
from lorapro_hf.commands.common.meters import kept_bytes, state_bytes
from lorapro_hf.optim.lora_pro import LoRAProAdamW

WARM_UP, MOST_WARM_UP = 3, 8
# From here on two steps are enough to warm up, or one: state is allocated then.
_SLOW_MS, _SLOWEST_MS = 1000.0, 20_000.0


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running between two readings of the clock."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def timed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of `work`, on CUDA until the device is done with it."""
    cuda = device.type == "cuda"
    with _no_collection():
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3


class Contender:
    """One method on a model of its own, warmed up and ready to be measured.

    Args:
        method: Name out of `METHODS`.
        workload: What it works on.
        device: Where.
        seed: Decides factors and gradients; the same for all.
    """

    def __init__(self, method: str, workload: Workload, device: torch.device, seed: int = 0) -> None:
        self.method = method
        self.device = device
        self.task = Task(workload, device, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer: Any = build_optimizer(method, self.task)
            self.estimate_ms = self._warm_up()

    def _warm_up(self) -> float:
        """Take the steps that allocate state and compile code, until they no longer differ; gives the fastest."""
        best = math.inf
        for turn in range(MOST_WARM_UP):
            took = self.step_ms()
            settled = took <= 2 * best
            best = min(best, took)
            few = took > _SLOWEST_MS or (settled and turn > 0 and took > _SLOW_MS)
            if few or (settled and turn >= WARM_UP - 1):
                break
        return best

    def _step(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer.step()

    def step_ms(self) -> float:
        """Milliseconds of one step, on gradients that have just been written."""
        self.task.restore_gradients()
        return timed_ms(self.optimizer.step, self.device)

    def _fresh_step(self) -> Callable[[], object]:
        self.task.restore_gradients()
        if isinstance(self.optimizer, LoRAProAdamW):  # so that this is not the one step that waits for the device
            self.optimizer.finish_training()
        return self._step

    def probe(self, result: Result) -> None:
        """Fill in what is looked at in steps that are not timed: memory, kernels and, on CUDA, waiting."""
        result.state_bytes = state_bytes(self.optimizer)
        result.kept_bytes = kept_bytes(self.optimizer, self.task.model)
        memory = memory_of(self._fresh_step(), self.device, twice=self.estimate_ms < _SLOW_MS)
        result.peak_bytes, result.largest_bytes, result.largest_shape = memory.peak, memory.largest, memory.shape
        dense = self.task.workload.dense_shapes
        result.dense_shapes = sorted(shape for shape in memory.shapes if shape[-2:] in dense)
        self.count(result)
        if self.device.type == "cuda":
            result.waits = waits_for_device(self._fresh_step())
            if result.waits is None:
                result.graph = capture(self._fresh_step())

    def count(self, into: Any) -> None:
        """Fill in the numbers of kernels and calls."""
        count = kernels_of(self._fresh_step(), self.device)
        into.kernels, into.calls = count.kernels, count.calls


def turns(estimates_ms: Sequence[float], rounds: int, repeats: int, seconds: float) -> list[list[int]]:
    """How many steps each contender takes in each round, so that none takes much longer than `seconds`.

    Slow contenders take one step a turn, and the slowest leave out rounds; two steps at least are left to each.
    """
    plan = []
    for estimate in estimates_ms:
        total = min(rounds * repeats, max(2, int(seconds * 1e3 / max(estimate, 1e-3))))
        plan.append([total * (i + 1) // rounds - total * i // rounds for i in range(rounds)])
    return plan


def measure_in_turns(
    contenders: Sequence[Contender],
    samples: Sequence[list[float]],
    *,
    rounds: int,
    repeats: int,
    seconds: float,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Time all contenders in rounds, so that whatever the machine does meanwhile meets all of them alike.

    Args:
        contenders: In another order each round.
        samples: Filled with the milliseconds of each contender's steps.
        rounds: Number of rounds.
        repeats: Steps a turn.
        seconds: Time for each contender.
        between: Called once a round.
    """
    plan = turns([contender.estimate_ms for contender in contenders], rounds, repeats, seconds)
    for turn in range(rounds):
        between()
        first = turn % len(contenders)
        for index in (*range(first, len(contenders)), *range(first)):
            for _ in range(plan[index][turn]):
                samples[index].append(contenders[index].step_ms())
