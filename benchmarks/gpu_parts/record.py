"""What has a part of the check found so far?"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorapro_hf.commands.common.records import write_json


@dataclass(frozen=True)
class Check:
    """A number and the largest value it may have."""

    name: str
    value: float
    limit: float

    @property
    def is_good(self) -> bool:
        """Whether the number is within its limit; NaN is not."""
        return self.value <= self.limit


@dataclass
class Findings:
    """What a part has found, as its file holds it."""

    checks: list[Check] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    not_done: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether no number is wrong and nothing has failed."""
        return not self.errors and all(check.is_good for check in self.checks)


class Record:
    """The findings of a running part, written to a file after each piece of work.

    Args:
        path: the JSON file.
        device: where the part runs.
        is_tiny: whether small shapes are wanted.
        until: `time.time()` after which no further piece of work begins.
    """

    def __init__(self, path: Path, device: torch.device, is_tiny: bool, until: float) -> None:
        self.path, self.device, self.is_tiny, self.until = path, device, is_tiny, until
        self.found = Findings()
        self._started = time.time()
        self.save()

    @property
    def on_cuda(self) -> bool:
        """Whether the part runs on a GPU."""
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        """The time that is left for the part."""
        return self.until - time.time()

    def check(self, name: str, value: float, limit: float) -> None:
        """Record a number that must be at most `limit`."""
        self.found.checks.append(Check(name, float(value), limit))

    def not_done(self, what: str) -> None:
        """Record what could not be done, and why."""
        self.found.not_done.append(what)

    def attempt(self, name: str, work: Callable[[], object], needs_seconds: float = 0.0) -> None:
        """Do a piece of work unless time is up; an exception becomes an error of the part."""
        if self.seconds_left < needs_seconds:
            self.not_done(f"{name}: the time was up")
        else:
            try:
                work()
            except Exception as error:
                traceback.print_exc()
                lines = str(error).strip().splitlines() or [""]
                self.found.errors.append(f"{name}: {type(error).__name__}: {lines[0][:300]}")
        self.save()

    def save(self) -> None:
        """Write the findings so far."""
        self.found.seconds = time.time() - self._started
        write_json(self.path, asdict(self.found))


def read_findings(path: Path) -> Findings:
    """The findings in a file; an error is among them if there is no such file."""
    if not path.exists():
        return Findings(errors=["the part ended before it began"])
    content = json.loads(path.read_text(encoding="utf-8"))
    nan = float("nan")  # JSON holds null for it
    checks = [
        Check(each["name"], nan if each["value"] is None else each["value"], each["limit"])
        for each in content.pop("checks")
    ]
    return Findings(checks=checks, **content)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """`‖found − expected‖ / ‖expected‖` in float64 on the device of `expected`."""
    found, expected = found.detach().to(expected.device, torch.float64), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))
