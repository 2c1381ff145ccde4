"""How large are the frozen weights beside the pairs: whole, quantised or sharded?

A weight is taken as it is stored, as one matrix for each pair: as the residual that initializations such as PiSSA
leave, and without the factors of other adapters or methods. It is read in float64, a block at a time. A quantised
weight is dequantised, one layer after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.functional.step_limit import bulk_edge
from lorapro_hf.utils.private_names import private

_BLOCK_ELEMENTS = {"cpu": 2**20}  # that exist in float64 at a time
_BLOCK_ELSEWHERE = 2**24
_OF_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


class _Part(NamedTuple):
    """Elements of a weight from `start` on, in its order; the other parts lie on other ranks of `group`."""

    values: Tensor
    start: int = 0
    group: dist.ProcessGroup | None = None


@torch.no_grad()
def bulk_edges(pairs: Sequence[LoRAPair]) -> list[Tensor]:
    """The bulk edge of each pair's base weight, `(batch,)` float64 on the CPU.

    Where weights are sharded all ranks call this, with the same pairs.

    Raises:
        ValueError: a weight cannot be read, or is zero. The message names the layer and the remedy.
    """
    return [_bulk_edges(pair) for pair in pairs]


def _bulk_edges(pair: LoRAPair) -> Tensor:
    base: Any = pair.layer.get_base_layer()
    name = "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight"
    weight: Any = getattr(base, getattr(pair.layer, "parameter_name", name), None)
    m = pair.matrix_B(torch.empty(pair.shape_B, device="meta")).shape[-2]
    n = pair.matrix_A(torch.empty(pair.shape_A, device="meta")).shape[-1]
    if weight is not None and weight.device.type == "meta":
        raise _refusal(pair, "is not loaded, or offloaded")
    if not _is_plain(base, weight):
        squares = sum(_squares(_Part(block), 1, block.numel()) for block in _dequantised(pair, base, weight))
    else:
        elements = math.prod(getattr(weight, "ds_shape", weight.shape)) // pair.batch
        n = elements // m  # less than that of A for convolutions of groups
        part = _part(pair, weight)
        squares = _squares(part, pair.batch, elements)
        if part.group is not None:
            dist.all_reduce(squares, group=part.group)
    assert isinstance(squares, Tensor)
    edges = bulk_edge(squares.cpu().double(), m, n)
    if not bool((edges > 0).all() and edges.isfinite().all()):
        raise _refusal(pair, "is zero or not finite")
    return edges


def _is_plain(base: Any, weight: Any) -> bool:
    """Whether the elements of a weight are its numbers."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or type(base).__name__ in _OF_BITSANDBYTES:
        return False
    return type(weight) in (Tensor, nn.Parameter) or hasattr(weight, "placements") or hasattr(weight, "ds_shape")


def _part(pair: LoRAPair, weight: Any) -> _Part:
    """This rank's part of a weight: of a DTensor, of a parameter that ZeRO 3 has partitioned, or the whole."""
    if hasattr(weight, "ds_shape"):
        group, size = private(weight, "ds_process_group"), private(weight, "partition_numel")()
        start = group.rank() * size
        own = max(0, min(size, private(weight, "ds_numel") - start))  # parts of the last ranks are padded
        return _Part(private(weight, "ds_tensor").detach()[:own], start, group)
    if not hasattr(weight, "placements"):
        return _Part(weight.detach())
    own, shards = weight.detach().to_local(), [each for each in weight.placements if not each.is_replicate()]
    if not shards:
        return _Part(own)
    if len(shards) > 1 or type(shards[0]).__name__ != "Shard":
        raise _refusal(pair, f"is sharded as {weight.placements}")
    mesh_dim, dim = weight.placements.index(shards[0]), shards[0].dim
    group = weight.device_mesh.get_group(mesh_dim)
    if dim and pair.batch > 1:
        raise _refusal(pair, f"holds several matrices, and is sharded within them as {weight.placements}")
    rows = -(-weight.shape[dim] // group.size())
    return _Part(own, group.rank() * rows * math.prod(weight.shape[1:]) if dim == 0 else 0, group)


def _squares(part: _Part, batch: int, elements: int) -> Tensor:
    """The sums of the squares of the elements of each matrix that lie in a part, `(batch,)` float64."""
    exact = torch.float32 if part.values.device.type == "mps" else torch.float64
    sums = torch.zeros(batch, dtype=exact, device=part.values.device)
    size = _BLOCK_ELEMENTS.get(part.values.device.type, _BLOCK_ELSEWHERE)
    at, rows = part.start, max(1, size * len(part.values) // max(1, part.values.numel()))
    for block in part.values.split(rows):  # row by row, as a weight need not lie in one piece
        flat = block.reshape(-1).to(exact)
        while len(flat):
            entry = at // elements if batch > 1 else 0
            own = flat[: (entry + 1) * elements - at] if batch > 1 else flat
            sums[entry] += own @ own
            flat, at = flat[len(own) :], at + len(own)
    return sums


def _dequantised(pair: LoRAPair, base: Any, weight: Any) -> Iterator[Tensor]:
    """Flat blocks of a quantised weight: dequantised by bitsandbytes, or by the layer itself, given unit vectors."""
    if type(base).__name__ in _OF_BITSANDBYTES:
        with _whole(weight) as gathered:
            yield _by_bitsandbytes(base, gathered).reshape(-1)
        return
    n = getattr(base, "in_features", None)
    if not isinstance(n, int) or pair.layout != "matrix" or hasattr(weight, "ds_shape"):
        raise _refusal(pair, "has a format that cannot be read")
    held = next((each for each in (*base.buffers(), *base.parameters()) if each.is_floating_point()), pair.A)
    bias = getattr(base, "bias", None)
    for units in torch.eye(n, dtype=held.dtype, device=pair.A.device).split(1024):
        rows = base.forward(units)
        yield (rows if bias is None else rows - bias).reshape(-1)


def _by_bitsandbytes(base: Any, weight: Tensor) -> Tensor:
    if type(base).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.detach(), getattr(weight, "quant_state", None) or base.quant_state)
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, base.state).detach()


@contextmanager
def _whole(weight: Any) -> Iterator[Tensor]:
    """The codes of a weight, gathered from all ranks where these hold parts."""
    if hasattr(weight, "ds_shape"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight
    else:
        yield weight.full_tensor() if hasattr(weight, "placements") else weight


def _refusal(pair: LoRAPair, reason: str) -> ValueError:
    return ValueError(
        f"{pair.name}: its base weight ({type(pair.layer.get_base_layer()).__name__}) {reason}, but the trust region "
        "limits steps to a fraction of its size. Set trust_region=0 (--lora_pro_trust_region 0) for no limit, or leave "
        "the layer out of target_modules (exclude_modules)."
    )
