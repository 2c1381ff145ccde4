"""How much memory does a training take?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # to clear_refs: forget the highest resident size so far


class PeakMemory:
    """The highest memory use since it was made: CUDA's allocator, or on a CPU the resident size of the process.

    Args:
        device: Where the training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:  # no Linux, or not allowed
            self.known = False

    def read(self) -> int | None:
        """Bytes, or `None` where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if self.known else None
        return None if match is None else int(match[1]) * 1024


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, memory that several share counted once."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(optimizer.state)}
    return sum(storage.nbytes() for storage in found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
