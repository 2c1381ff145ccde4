"""Which 256 numbers between -1 (or 0) and 1 can an 8-bit moment take?

The dynamic map of Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861), as bitsandbytes
builds it: 0, 1 and the midpoints of cells. Seven decades are divided evenly, each into twice as many cells as the one
below.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DECADES = 7


def dynamic_map(signed: bool) -> Tensor:
    """The 256 entries in ascending order, on the CPU.

    Args:
        signed: whether values have a sign; without one each decade has twice as many entries.

    Returns:
        `(256,)` float32, equal to `bitsandbytes.functional.create_dynamic_map(signed)`.
    """
    entries = [0.0, 1.0]
    for decade in range(DECADES):
        cells = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        # In the order of operations of bitsandbytes, which decides the last bit of an entry.
        entries += (10 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    if signed:
        entries += [-entry for entry in entries[2:]]
    return torch.tensor(sorted(entries), dtype=torch.float32)


def dynamic_thresholds(signed: bool) -> Tensor:
    """The borders between the numbers stored as one code and those stored as the next, on the CPU.

    Args:
        signed: as in `dynamic_map`.

    Returns:
        `(257,)` float32. Code c stores the numbers above `thresholds[c]` up to and including `thresholds[c + 1]`; the
        first and last threshold are infinite.
    """
    entries = dynamic_map(signed)
    ends = torch.tensor([torch.inf])
    return torch.cat([-ends, (entries[:-1] + entries[1:]) / 2, ends])


@lru_cache(maxsize=32)
def tables_on(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The signed map and its thresholds, then the unsigned ones, on a device.

    Args:
        device: where the moments are.

    Returns:
        Two pairs of `(256,)` and `(257,)` float32 tensors, made once for each device; not to be written to.
    """
    signed, signed_thresholds, unsigned, unsigned_thresholds = (
        table.to(device) for kind in (True, False) for table in (dynamic_map(kind), dynamic_thresholds(kind))
    )
    return signed, signed_thresholds, unsigned, unsigned_thresholds
