"""How are the two dense moments stored: in float32 (or float64), bfloat16, or 8-bit codes?

The codes are those of the dynamic map of Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv
2110.02861), as bitsandbytes builds it: 0, 1 and the midpoints of cells. Seven decades are divided evenly, each into
twice as many cells as the one below.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro_hf.utils.extras import MissingExtraError, install_command

BLOCK = 256  # columns of a row that share one scale in 8-bit storage
_DECADES = 7
_ZERO = 127  # the code of 0 in the signed map
_TINY = 1e-5  # of the largest value of a block: half the smallest value that bitsandbytes stores on the CPU


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
    """Write both moments back into bfloat16 or codes, unless `found_inf` (0-dim) is 1.

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
        edges = torch.linspace(0.1, 1, cells + 1, dtype=torch.float32)
        # In the order of operations of bitsandbytes, which decides the last bit of an entry.
        entries += (10 ** (decade - _DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    if signed:
        entries += [-entry for entry in entries[2:]]
    return torch.tensor(sorted(entries), dtype=torch.float32)


def dynamic_thresholds(signed: bool) -> Tensor:
    """The borders between codes, `(257,)` float32 on the CPU, the first and the last infinite.

    Code c stores the numbers above `thresholds[c]` up to and including `thresholds[c + 1]`.
    """
    entries = dynamic_map(signed)
    ends = torch.tensor([torch.inf])
    return torch.cat([-ends, (entries[:-1] + entries[1:]) / 2, ends])


@lru_cache(maxsize=32)
def tables_on(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The signed map and its thresholds, then the unsigned ones, on a device; they must not be written to."""
    signed, signed_thresholds, unsigned, unsigned_thresholds = (
        table.to(device) for kind in (True, False) for table in (dynamic_map(kind), dynamic_thresholds(kind))
    )
    return signed, signed_thresholds, unsigned, unsigned_thresholds


def bitsandbytes_operators() -> Any:
    """The quantisers of bitsandbytes.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401  (registers the operators)
    except ImportError as error:
        raise MissingExtraError(
            f"mode 'full_8bit' needs bitsandbytes for this device; install it with `{install_command('8bit')}`, or "
            "choose another mode."
        ) from error
    return torch.ops.bitsandbytes


def _decoded(values: Tensor, absmax: Tensor | None, signed: bool) -> Tensor:
    assert absmax is not None
    codes, code = _whole_blocks(values), tables_on(values.device)[0 if signed else 2]
    exact = bitsandbytes_operators().dequantize_blockwise(codes, absmax.flatten(), code, BLOCK, torch.float32)
    return exact.view(codes.shape)[..., : values.shape[-1]].contiguous()


def _encode(values: Tensor, absmax: Tensor | None, exact: Tensor, signed: bool, found_inf: Tensor) -> None:
    assert absmax is not None
    whole, code = _whole_blocks(exact), tables_on(values.device)[0 if signed else 2]
    codes, scales = bitsandbytes_operators().quantize_blockwise(whole, code, BLOCK)
    if signed and values.device.type == "cpu":
        # On the CPU bitsandbytes rounds on a grid and stores 0 as 2e-5 of the largest value: elements without a
        # gradient would move. The root of V is only rounded up, so that it is not 0 below an M that is not.
        tiny = whole.view(-1, BLOCK).abs() <= _TINY * scales.view(-1, 1)
        codes = codes.view(-1, BLOCK).masked_fill(tiny, _ZERO)
    # Quantising the same values again may change a scale: a skipped step must write nothing.
    keep = found_inf > 0
    values.copy_(torch.where(keep, values, codes.view(whole.shape)[..., : values.shape[-1]]))
    absmax.copy_(torch.where(keep, absmax, scales.view(absmax.shape)))


def _signed(constant: int) -> int:
    return constant - (1 << 32)  # int32 arithmetic wraps around as uint32's does


def _whole_blocks(rows: Tensor) -> Tensor:
    missing = -rows.shape[-1] % BLOCK
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()
