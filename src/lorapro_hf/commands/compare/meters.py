"""How much time and memory does a training take?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # to clear_refs: forget the highest resident size so far


class StepTimes(TrainerCallback):
    """Times the steps of a `Trainer` and the optimizer's part in them, in ms, and calls `on_step` after each."""

    def __init__(self, device: torch.device, on_step: Callable[[], None]) -> None:
        self.device, self.on_step = device, on_step
        self.step_ms: list[float] = []
        self.optimizer_ms: list[float] = []
        self._step = self._optimizer = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        self._step = self._now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The gradients are there."""
        self._optimizer = self._now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has taken its step."""
        self.optimizer_ms.append((self._now() - self._optimizer) * 1e3)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The step is over."""
        self.step_ms.append((self._now() - self._step) * 1e3)
        self.on_step()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class PeakMemory:
    """The highest memory use since it was made: CUDA's allocator, or on a CPU the resident size of the process."""

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
