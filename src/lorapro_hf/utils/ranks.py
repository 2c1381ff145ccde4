"""Which errors have the ranks of a process group met?"""

from __future__ import annotations

import torch.distributed as dist


def errors_of_ranks(error: Exception | None, group: dist.ProcessGroup) -> str:
    """The errors of all ranks of a group in words, empty without any. Collective: no rank may wait for another one.

    Args:
        error: that of this rank, `None` without one.
        group: the ranks.
    """
    errors: list[str | None] = [None] * group.size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}", group=group)
    return "; ".join(
        f"rank {dist.get_global_rank(group, rank)} raised {raised}"
        for rank, raised in enumerate(errors)
        if raised is not None
    )
