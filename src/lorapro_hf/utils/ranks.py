"""Which errors have the ranks of a process group met?"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist


def errors_of_ranks(error: Exception | None, group: dist.ProcessGroup, device: torch.device | None = None) -> str:
    """The errors of all ranks of a group in words, empty without any. Collective: no rank may wait for another one.

    Args:
        error: that of this rank, `None` without one.
        group: the ranks.
        device: this rank's; NCCL sends objects through the current device, which need not be the rank's.
    """
    errors: list[str | None] = [None] * group.size()
    own = None if error is None else f"{type(error).__name__}: {error}"
    with torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext():
        dist.all_gather_object(errors, own, group=group)
    return "; ".join(
        f"rank {dist.get_global_rank(group, rank)} raised {raised}"
        for rank, raised in enumerate(errors)
        if raised is not None
    )
