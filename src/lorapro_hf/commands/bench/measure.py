"""How long does a step take, measured in turns with the others?"""

from __future__ import annotations

import gc
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.benchmark.utils.timer import timer

from lorapro_hf.commands.bench.probes import kernels_of, memory_of, waits_for_device
from lorapro_hf.commands.bench.results import Machine, Result, Roofline
from lorapro_hf.commands.bench.settings import METHODS, BenchSettings
from lorapro_hf.commands.bench.workloads import SyntheticModel, Workload
from lorapro_hf.commands.common.meters import kept_bytes, state_bytes
from lorapro_hf.commands.common.optimizers import build
from lorapro_hf.optim.lora_pro import LoRAProAdamW

RATE = 1e-5
_WARM_UP, _MOST_WARM_UP = 3, 8
# steps above these times need only two warm-up steps, or one: the first allocates the state
_SLOW_MS, _SLOWEST_MS = 1000.0, 20_000.0
_COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}  # 256 MB and 1 GB: far beyond any cache
_MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


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


def timed_ms(work: Callable[[], object]) -> float:
    """Milliseconds of `work`, on CUDA until the device has finished it."""
    with _no_collection():
        start = timer()  # synchronizes CUDA devices
        work()
        return float((timer() - start) * 1e3)


class Contender:
    """One method on a model of its own, warmed up.

    Args:
        method: Name in `METHODS`.
        workload: The layers of the model.
        device: Where they are.
        seed: Decides factors and gradients; the same for all contenders.
    """

    def __init__(self, method: str, workload: Workload, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.synthetic = SyntheticModel(workload, device, seed)
        chosen = METHODS[method]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = build(chosen.builder, self.synthetic.model, RATE, chosen.settings)
            self.estimate_ms = self._warm_up()

    def _warm_up(self) -> float:
        """Step until the times no longer differ, so that state is allocated and code compiled; gives the fastest."""
        best = math.inf
        for turn in range(_MOST_WARM_UP):
            took = self.step_ms()
            settled = took <= 2 * best
            best = min(best, took)
            few = took > _SLOWEST_MS or (settled and turn > 0 and took > _SLOW_MS)
            if few or (settled and turn >= _WARM_UP - 1):
                break
        return best

    def step_ms(self) -> float:
        """Milliseconds of one step, on gradients that have just been written."""
        self.synthetic.restore_gradients()
        return timed_ms(self.optimizer.step)

    def _fresh_step(self) -> Callable[[], object]:
        self.synthetic.restore_gradients()
        if isinstance(self.optimizer, LoRAProAdamW):  # so that this is not the one step that waits for the device
            self.optimizer.finish_training()
        return self._step

    def _step(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer.step()

    def probe(self, result: Result) -> None:
        """Fill in the memory and kernels of a step and, on CUDA, whether it waits."""
        result.state_bytes = state_bytes(self.optimizer)
        result.kept_bytes = kept_bytes(self.optimizer, self.synthetic.model)
        used = memory_of(self._fresh_step(), self.device, twice=self.estimate_ms < _SLOW_MS)
        result.peak_bytes, result.largest_shape, result.kernels = used.peak, used.largest, used.kernels
        if self.device.type == "cuda":
            result.waits = waits_for_device(self._fresh_step())

    def kernels(self) -> int:
        """The number of kernels of a step."""
        return kernels_of(self._fresh_step(), self.device)


def turns(estimates_ms: Sequence[float], settings: BenchSettings) -> list[list[int]]:
    """How many steps each contender takes in each round, so that none takes much longer than `settings.seconds`.

    Slow contenders take one step a turn, and the slowest leave out rounds; each takes at least two steps.
    """
    plan, rounds = [], settings.rounds
    for estimate in estimates_ms:
        total = min(rounds * settings.repeats, max(2, int(settings.seconds * 1e3 / max(estimate, 1e-3))))
        plan.append([total * (i + 1) // rounds - total * i // rounds for i in range(rounds)])
    return plan


def measure_in_turns(
    contenders: Sequence[Contender], settings: BenchSettings, between: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """The milliseconds of each contender's steps, in rounds, so that disturbances of the machine meet all alike.

    Args:
        contenders: They take turns in another order each round.
        settings: Rounds, steps a turn and seconds for each contender.
        between: Called once a round.
    """
    samples: list[list[float]] = [[] for _ in contenders]
    plan = turns([contender.estimate_ms for contender in contenders], settings)
    for turn in range(settings.rounds):
        between()
        first = turn % len(contenders)
        for index in (*range(first, len(contenders)), *range(first)):
            for _ in range(plan[index][turn]):
                samples[index].append(contenders[index].step_ms())
    return samples


class MachineProbe:
    """Measures the copy bandwidth and the fp32 matmul rate.

    Args:
        device: Where.
        small: Take small arrays, for a trial run.
    """

    def __init__(self, device: torch.device, small: bool = False) -> None:
        size = 2**16 if small else _COPY_ELEMENTS[device.type]
        side = 64 if small else _MATMUL_SIZE[device.type]
        self._source, self._target = torch.ones(size, device=device), torch.zeros(size, device=device)
        self._left, self._right = torch.ones(side, side, device=device), torch.ones(side, side, device=device)
        self._product = torch.zeros(side, side, device=device)
        self._rates: list[tuple[float, float]] = []
        self.read()  # the first touches memory for the first time
        self._rates.clear()

    def read(self) -> None:
        """Take one reading of each."""
        copy_ms = timed_ms(lambda: self._target.copy_(self._source))
        matmul_ms = timed_ms(lambda: torch.mm(self._left, self._right, out=self._product))
        moved = self._source.nbytes + self._target.nbytes
        self._rates.append((moved / copy_ms / 1e6, 2 * self._left.shape[0] ** 3 / matmul_ms / 1e6))

    def machine(self) -> Machine:
        """The medians of all readings."""
        copies, products = zip(*self._rates, strict=True)
        return Machine(statistics.median(copies), statistics.median(products))


def roofline(result: Result, workload: Workload, machine: Machine) -> Roofline | None:
    """The least time of a step with the dense moments of `result`; `None` if it has none.

    The moments are read and written once: 16 bytes an element in fp32. An element takes 8r operations: 4r for the
    equivalent gradient, a product over 2r, and 2r for each of the two products of the direction with a factor.
    """
    if result.state_bytes is None or not METHODS[result.method].dense_moments:
        return None
    return Roofline(
        memory_ms=2 * result.state_bytes / machine.copy_gb_per_s / 1e6,
        compute_ms=8 * workload.rank * workload.elements / machine.matmul_gflop_per_s / 1e6,
    )
