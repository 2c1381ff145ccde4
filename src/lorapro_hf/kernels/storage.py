"""How are the two dense moments stored: in float32 (or float64), bfloat16, or 8-bit codes?

The codes are those of the dynamic map of Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv
2110.02861), as bitsandbytes builds it: 0, 1 and the midpoints of cells. Seven decades are divided evenly, each into
twice as many cells as the one below.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # columns of a row that share one scale in 8-bit storage
_DECADES = 7
# A bucket of numbers is named by the upper half of their bits: the sign, the exponent and seven bits of the mantissa.
_LOWEST = 103 << 7  # the name of 2^-24: all smaller numbers share a bucket
_BUCKETS = (24 << 7) + 1  # up to 1, of each sign


class Moments(NamedTuple):
    """Dense moments of K weights of one shape; in 8 bits the second is stored as its square root."""

    exp_avg: Tensor  # (K, m, n), float or uint8 codes
    exp_avg_sq: Tensor  # (K, m, n)
    exp_avg_absmax: Tensor | None = None  # (K, m, ceil(n / BLOCK)) float32, of 8-bit storage only
    exp_avg_sq_absmax: Tensor | None = None


def moment_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of moments `(..., m, n)`; the `dtype` `torch.uint8` means 8-bit storage."""
    tensors = {"exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}
    if dtype == torch.uint8:
        scales = (*shape[:-1], -(-shape[-1] // BLOCK))
        tensors |= {"exp_avg_absmax": (scales, torch.float32), "exp_avg_sq_absmax": (scales, torch.float32)}
    return tensors


def load(stored: Moments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both moments of some rows `(..., n)` in the dtype of the computation."""
    if stored.exp_avg.dtype != torch.uint8:
        return stored.exp_avg.to(dtype), stored.exp_avg_sq.to(dtype)
    first, root = (
        _decoded(values, absmax, signed)
        for values, absmax, signed in ((stored[0], stored[2], True), (stored[1], stored[3], False))
    )
    return first.to(dtype), root.square().to(dtype)


def store(stored: Moments, M: Tensor, V: Tensor, step: Tensor, found_inf: Tensor) -> None:
    """Write both moments back into another dtype or into codes, unless `found_inf` (0-dim) is 1.

    bfloat16 rounds the first moment to nearest and the second stochastically: with `beta2 = 0.999` its changes are
    smaller than half a unit in the last place, so rounding to nearest would lose them. The dither is a function of the
    bits of the value and of the step (one per entry, `(K, 1, 1)`), so that a resumed run repeats it.
    """
    if stored.exp_avg.dtype == torch.bfloat16:
        stored.exp_avg.copy_(M.float())
        stored.exp_avg_sq.copy_(dithered(V.float(), step))
    elif stored.exp_avg.dtype == torch.uint8:
        _encode(stored.exp_avg, stored.exp_avg_absmax, M.float(), True, found_inf)
        _encode(stored.exp_avg_sq, stored.exp_avg_sq_absmax, V.float().sqrt(), False, found_inf)
    else:
        stored.exp_avg.copy_(M)
        stored.exp_avg_sq.copy_(V)


def dithered(exact: Tensor, step: Tensor) -> Tensor:
    """Float32 values rounded up or down at random to values that bfloat16 holds exactly."""
    bits = exact.view(torch.int32)
    mixed = (bits + step.to(torch.int32) * _signed(0x9E3779B1)) * _signed(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13 & 0x7FFFF)) * _signed(0xC2B2AE35)
    return (bits + (mixed >> 16 & 0xFFFF) & ~0xFFFF).view(torch.float32)


def dynamic_map(signed: bool) -> Tensor:
    """The 256 numbers that codes stand for, ascending: `(256,)` float32 on the CPU.

    They equal `bitsandbytes.functional.create_dynamic_map(signed)`. Without a sign each decade has twice as many.
    """
    entries = [0.0, 1.0]
    for decade in range(_DECADES):
        cells = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32, device="cpu")
        # In the order of operations of bitsandbytes, which decides the last bit of an entry.
        entries += (10 ** (decade - _DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    if signed:
        entries += [-entry for entry in entries[2:]]
    return torch.tensor(sorted(entries), dtype=torch.float32, device="cpu")


def dynamic_thresholds(signed: bool) -> Tensor:
    """The borders between codes, `(257,)` float32 on the CPU, the first and the last infinite.

    Code c stores the numbers above `thresholds[c]` up to and including `thresholds[c + 1]`: the nearest ones, but
    without a sign code 0 stores 0 alone. The root of V must not be 0 beside an M that is not.
    """
    entries = dynamic_map(signed)
    ends = torch.tensor([torch.inf], device="cpu")
    thresholds = torch.cat([-ends, (entries[:-1] + entries[1:]) / 2, ends])
    if not signed:
        thresholds[1] = 0
    return thresholds


@lru_cache(maxsize=32)
def tables_on(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The signed map and its thresholds, then the unsigned ones, on a device; they must not be written to."""
    signed, signed_thresholds, unsigned, unsigned_thresholds = (
        table.to(device) for kind in (True, False) for table in (dynamic_map(kind), dynamic_thresholds(kind))
    )
    return signed, signed_thresholds, unsigned, unsigned_thresholds


@lru_cache(maxsize=32)
def buckets_on(signed: bool, device: torch.device) -> Tensor:
    """The code of the lowest number of each bucket, `(2 * _BUCKETS,)` uint8, the buckets of negative numbers last.

    No bucket holds more than one border between codes. The tensor must not be written to.
    """
    smallest = torch.arange(_LOWEST, _LOWEST + _BUCKETS, dtype=torch.int32, device="cpu") << 16
    largest = smallest + 0xFFFF
    smallest[0] = 0
    lowest = torch.cat([smallest.view(torch.float32), -largest.view(torch.float32)])
    codes = torch.searchsorted(dynamic_thresholds(signed)[1:-1].contiguous(), lowest)
    return codes.to(device, torch.uint8)


def _decoded(values: Tensor, absmax: Tensor | None, signed: bool) -> Tensor:
    assert absmax is not None
    table = tables_on(values.device)[0 if signed else 2]
    exact = table.index_select(0, values.flatten().int()).view(values.shape)
    return exact.mul_(absmax.repeat_interleave(BLOCK, dim=-1)[..., : values.shape[-1]])


def _encode(values: Tensor, absmax: Tensor | None, exact: Tensor, signed: bool, found_inf: Tensor) -> None:
    assert absmax is not None
    blocks = torch.nn.functional.pad(exact, (0, -exact.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    # One number that is not finite spoils the scale of its block, so that it is seen.
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    scaled = torch.where(largest[..., None] > 0, blocks / largest[..., None], 0)
    codes = _codes(scaled, signed).flatten(-2)[..., : values.shape[-1]]
    # Quantising the same values again may change a scale: a skipped step must write nothing.
    keep = found_inf > 0
    values.copy_(torch.where(keep, values, codes))
    absmax.copy_(torch.where(keep, absmax, largest))


def _codes(scaled: Tensor, signed: bool) -> Tensor:
    """The codes of float32 numbers in [-1, 1]."""
    bits = scaled.contiguous().view(torch.int32)
    bucket = (bits >> 16 & 0x7FFF).sub_(_LOWEST).clamp_(min=0).add_((bits < 0).int(), alpha=_BUCKETS)
    guess = buckets_on(signed, scaled.device).index_select(0, bucket.flatten())
    border = tables_on(scaled.device)[1 if signed else 3][1:].index_select(0, guess.int())
    return (guess + (scaled.flatten() > border)).view(scaled.shape)


def _signed(constant: int) -> int:
    return constant - (1 << 32)  # int32 arithmetic wraps around as uint32's does
