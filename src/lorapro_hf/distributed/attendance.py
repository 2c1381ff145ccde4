"""Have all ranks of a group reached a collective call?

Ranks tell each other through the store of the process group: a collective would hang, or match another one, where a
rank is missing.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lorapro_hf.utils.private_names import private

_LONGEST_PAUSE = 0.25  # seconds between two looks at the store


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
        self._group = group
        self._name = f"lorapro_hf/{group.group_name}"

    def wait_for_all(self) -> list[int]:
        """Wait until all ranks have called this as often as this rank.

        Returns:
            The ranks of the whole run that did not come within the limit, in which case this call is not counted;
            empty if all ranks have come.
        """
        came = f"{self._name}/came/{self._group.rank()}"
        turn = self._store.add(came, 1)
        together = f"{self._name}/turn/{turn}"
        self._store.add(together, 1)
        begun, pause = time.monotonic(), 0.001
        while self._store.add(together, 0) < self._group.size():
            if time.monotonic() - begun > self.limit.total_seconds():
                ranks = range(self._group.size())
                absent = [rank for rank in ranks if self._store.add(f"{self._name}/came/{rank}", 0) < turn]
                self._store.add(came, -1)
                self._store.add(together, -1)
                return [dist.get_global_rank(self._group, rank) for rank in absent]
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return []
