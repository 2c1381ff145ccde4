"""How much time and memory does a training take?"""

from __future__ import annotations

import re
import statistics
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
        self.begun: dict[str, float] = {}
        self.times: dict[str, list[float]] = {"step_ms": [], "optimizer_ms": []}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.begun["step_ms"] = self._now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The gradients are there."""
        self.begun["optimizer_ms"] = self._now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has taken its step."""
        self._end("optimizer_ms")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The step is over."""
        self._end("step_ms")
        self.on_step()

    def medians(self) -> dict[str, float | None]:
        """The median `step_ms` and `optimizer_ms`."""
        return {name: statistics.median(times) if times else None for name, times in self.times.items()}

    def _end(self, name: str) -> None:
        self.times[name].append((self._now() - self.begun[name]) * 1e3)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class PeakMemory:
    """The highest memory use since it was made: CUDA's allocator, or on a CPU the resident size of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, True
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                _CLEAR.write_text(_RESET_PEAK)
        except OSError:  # no Linux, or not allowed
            self.known = False

    def read(self) -> int | None:
        """Bytes, or `None` where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text()) if self.known else None
        return None if match is None else int(match[1]) * 1024
