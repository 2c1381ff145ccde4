"""How long does a step take, measured in turns with the others?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from timeit import Timer

import torch
from torch import Tensor
from torch.utils import benchmark
from torch.utils.benchmark.utils.timer import timer

from lorapro_hf.commands.bench.probes import memory_of, waits_for_device
from lorapro_hf.commands.bench.results import Machine, Outcome, Result, Roofline
from lorapro_hf.commands.bench.settings import METHODS, BenchSettings
from lorapro_hf.commands.bench.workloads import SyntheticModel, Workload
from lorapro_hf.commands.common.meters import kept_bytes, state_bytes
from lorapro_hf.commands.common.optimizers import build
from lorapro_hf.optim.lora_pro import LoRAProAdamW

RATE = 1e-5
_WARM_UP = 3  # steps; the first allocates the state
_SLOW_MS, _SLOWEST_MS = 1000.0, 20_000.0  # above these times two warm-up steps are enough, or one
_COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}  # 256 MB and 1 GB: far beyond any cache
_MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


@dataclass
class Bench:
    """A benchmark run: its settings, its figures so far, and `say`, which gets a line about each measurement."""

    settings: BenchSettings
    device: torch.device
    outcome: Outcome
    say: Callable[[str], None] = lambda text: None


def timed_ms(work: Callable[[], object]) -> float:
    """Milliseconds of `work` without garbage collection, on CUDA until the device has finished it."""
    return Timer(work, timer=timer).timeit(1) * 1e3


class Contender:
    """One method of `METHODS` on a model of its own, warmed up; `seed` decides factors and gradients."""

    def __init__(self, method: str, workload: Workload, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.synthetic = SyntheticModel(workload, device, seed)
        self.optimizer = build(METHODS[method].builder, self.synthetic.model, RATE, METHODS[method].settings)
        self.estimate_ms = self.step_ms()
        for _ in range(_WARM_UP - 1):
            if self.estimate_ms > _SLOWEST_MS:
                break
            self.estimate_ms = min(self.estimate_ms, self.step_ms())
            if self.estimate_ms > _SLOW_MS:
                break

    def step_ms(self) -> float:
        """Milliseconds of one step, on gradients that have just been written."""
        self.synthetic.restore_gradients()
        return timed_ms(self.optimizer.step)

    def fresh_step(self) -> Callable[[], object]:
        """A step to be probed, on gradients that have just been written."""
        self.synthetic.restore_gradients()
        if isinstance(self.optimizer, LoRAProAdamW):  # so that this is not the one step that waits for the device
            self.optimizer.finish_training()
        step: Callable[[], object] = self.optimizer.step
        return step

    def probe(self, result: Result) -> None:
        """Fill in the memory and kernels of a step and, on CUDA, whether it waits."""
        result.state_bytes = state_bytes(self.optimizer)
        result.kept_bytes = kept_bytes(self.optimizer, self.synthetic.model)
        used = memory_of(self.fresh_step(), self.device)
        result.peak_bytes, result.largest_shape, result.kernels = used.peak, used.largest, used.kernels
        if self.device.type == "cuda":
            result.waits = waits_for_device(self.fresh_step())


def turns(estimate_ms: float, settings: BenchSettings) -> list[int]:
    """How many steps a contender takes in each round, so that it takes at most about `settings.seconds`.

    Slow contenders take one step a turn, and the slowest leave out rounds; each takes at least two steps.
    """
    rounds = settings.rounds
    total = min(rounds * settings.repeats, max(2, int(settings.seconds * 1e3 / max(estimate_ms, 1e-3))))
    return [total * (turn + 1) // rounds - total * turn // rounds for turn in range(rounds)]


def measure_in_turns(contenders: Sequence[Contender], settings: BenchSettings) -> list[list[float]]:
    """The milliseconds of each contender's steps.

    They take turns in rounds, each round in another order, so that disturbances of the machine meet all alike.
    """
    samples: list[list[float]] = [[] for _ in contenders]
    plan = [turns(contender.estimate_ms, settings) for contender in contenders]
    for turn in range(settings.rounds):
        for place in range(len(contenders)):
            index = (turn + place) % len(contenders)
            samples[index] += [contenders[index].step_ms() for _ in range(plan[index][turn])]
    return samples


def machine_speed(device: torch.device, small: bool = False) -> Machine:
    """The speed of the machine; `small` takes small arrays, for a trial run."""
    size, side = (2**16, 64) if small else (_COPY_ELEMENTS[device.type], _MATMUL_SIZE[device.type])
    ones, zeros = torch.ones(size, device=device), torch.zeros(size, device=device)
    square, product = torch.ones(side, side, device=device), torch.zeros(side, side, device=device)

    def seconds(statement: str, source: Tensor, target: Tensor) -> float:
        names = {"torch": torch, "source": source, "target": target}
        threads = torch.get_num_threads()
        return benchmark.Timer(statement, globals=names, num_threads=threads).blocked_autorange().median

    copy_s = seconds("target.copy_(source)", ones, zeros)
    matmul_s = seconds("torch.mm(source, source, out=target)", square, product)
    return Machine((ones.nbytes + zeros.nbytes) / copy_s / 1e9, 2 * side**3 / matmul_s / 1e9)


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
