"""How fast could a step with dense moments be on this machine, at best?"""

from __future__ import annotations

import statistics

import torch

from lorapro_hf.commands.bench.measure import timed_ms
from lorapro_hf.commands.bench.results import Machine, Result, Roofline
from lorapro_hf.commands.bench.settings import METHODS
from lorapro_hf.commands.bench.workloads import Workload

_COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**28}  # 256 MB and 1 GB: far beyond any cache
_MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


class MachineProbe:
    """Measures the copy bandwidth and the fp32 matmul rate, one reading of each at a time.

    Args:
        device: Where.
        small: Take arrays that fit anywhere, when the figures do not matter.
    """

    def __init__(self, device: torch.device, small: bool = False) -> None:
        self.device = device
        self.machine = Machine()
        size = 2**16 if small else _COPY_ELEMENTS[device.type]
        side = 64 if small else _MATMUL_SIZE[device.type]
        self._source, self._target = torch.ones(size, device=device), torch.zeros(size, device=device)
        self._left, self._right = torch.ones(side, side, device=device), torch.ones(side, side, device=device)
        self._product = torch.zeros(side, side, device=device)
        self.read()  # the first touches memory for the first time
        self.machine = Machine()

    def read(self) -> None:
        """Take one reading of each."""
        copy_ms = timed_ms(lambda: self._target.copy_(self._source), self.device)
        matmul_ms = timed_ms(lambda: torch.mm(self._left, self._right, out=self._product), self.device)
        moved = self._source.nbytes + self._target.nbytes
        self.machine.copy_gb_per_s.append(moved / copy_ms / 1e6)
        self.machine.matmul_gflop_per_s.append(2 * self._left.shape[0] ** 3 / matmul_ms / 1e6)


def roofline(result: Result, workload: Workload, machine: Machine) -> Roofline | None:
    """The least time of a step with the dense moments of `result`; `None` if it has none.

    The moments are read and written once: 16 bytes an element in fp32. An element takes 8r operations: 4r for g̃, a
    product over 2r, and 2r each for Bᵀu and uAᵀ.
    """
    if not machine.copy_gb_per_s or result.state_bytes is None or not METHODS[result.method].dense_moments:
        return None
    moved = 2 * result.state_bytes
    operations = 8 * workload.rank * workload.elements
    return Roofline(
        memory_ms=moved / statistics.median(machine.copy_gb_per_s) / 1e6,
        compute_ms=operations / statistics.median(machine.matmul_gflop_per_s) / 1e6,
    )
