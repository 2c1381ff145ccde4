"""Have all ranks of a group reached a collective call, and do the missing ones still run?

Ranks tell each other through the store of the process group: a collective would hang, or match another one, where a
rank is missing.
"""

from __future__ import annotations

import os
import select
import time
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from lorapro_hf.utils.private_names import private

_LONGEST_PAUSE = 0.25  # seconds between two looks at the store


class Absence(NamedTuple):
    """The ranks that are missing."""

    ranks: list[int]
    """Their ranks in the whole run."""
    ended: bool
    """Whether their processes on this machine have ended; otherwise the time limit was reached."""


class Attendance:
    """The ranks of a group that reach collective calls.

    Args:
        group: the ranks.
        store: the key-value store to use; by default that of the process group.

    Attributes:
        limit: the timeout of the process group.
    """

    def __init__(self, group: dist.ProcessGroup, store: Any = None) -> None:
        self._store = private("torch.distributed.distributed_c10d", "_get_default_store")() if store is None else store
        self.limit: timedelta = self._store.timeout
        self._group, self._rank, self._size = group, group.rank(), group.size()
        self._name = f"lorapro_hf/{group.group_name}"

    def sign_in(self) -> None:
        """Register this process, so that other ranks can see whether it still runs."""
        machine = _machine()
        if machine is not None:
            self._store.set(f"{self._name}/process/{self._rank}", f"{machine} {os.getpid()}")

    def wait_for_all(self) -> Absence | None:
        """Wait until all ranks have called this as often as this rank.

        Returns:
            The missing ranks, in which case this call is not counted; `None` if all ranks have come.
        """
        turn = self._store.add(f"{self._name}/came/{self._rank}", 1)
        self._store.add(f"{self._name}/turn/{turn}", 1)
        begun, pause = time.monotonic(), 0.001
        while self._store.add(f"{self._name}/turn/{turn}", 0) < self._size:
            has_run_out = time.monotonic() - begun > self.limit.total_seconds()
            ended = self._ended(turn) if pause == _LONGEST_PAUSE else []
            if ended or has_run_out:
                absent = ended or self._absent(turn)
                self._store.add(f"{self._name}/came/{self._rank}", -1)
                self._store.add(f"{self._name}/turn/{turn}", -1)
                return Absence([self._in_the_run(rank) for rank in absent], bool(ended))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return None

    def _absent(self, turn: int) -> list[int]:
        return [rank for rank in range(self._size) if self._store.add(f"{self._name}/came/{rank}", 0) < turn]

    def _ended(self, turn: int) -> list[int]:
        """The missing ranks whose processes ran on this machine and have ended."""
        ended = {rank for rank, process in self._processes_here.items() if _has_ended(process)}
        return [rank for rank in self._absent(turn) if rank in ended] if ended else []

    def _in_the_run(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)

    @cached_property
    def _processes_here(self) -> dict[int, int]:
        """The process ids of the ranks on this machine."""
        found, machine = {}, _machine()
        for rank in range(self._size):
            key = f"{self._name}/process/{rank}"
            if machine is not None and self._store.check([key]):
                where, process = self._store.get(key).decode().rsplit(maxsplit=1)
                if where == machine:
                    found[rank] = int(process)
        return found


def _machine() -> str | None:
    """An id that ranks share if they see the same process ids; `None` if it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _has_ended(process: int) -> bool:
    if not hasattr(os, "pidfd_open"):  # a Python that was built for older systems
        return False
    try:
        watched = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    except OSError:  # an old kernel, or not permitted
        return False
    try:
        look = select.poll()
        look.register(watched, select.POLLIN)
        return bool(look.poll(0))
    finally:
        os.close(watched)
