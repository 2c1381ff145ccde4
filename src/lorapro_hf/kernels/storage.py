"""How are the two dense moments stored: in float32 (or float64), bfloat16, or 8-bit codes?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro_hf.kernels.dynamic_map import tables_on
from lorapro_hf.utils.extras import MissingExtraError, install_command

BLOCK = 256  # columns of a row that share one scale in 8-bit storage
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


def load(values: Tensor, absmax: Tensor | None, signed: bool, dtype: torch.dtype) -> Tensor:
    """One moment of some rows `(..., n)` in the dtype of the computation; the stored tensor itself where possible."""
    if values.dtype != torch.uint8:
        return values.to(dtype)
    assert absmax is not None
    codes = _whole_blocks(values)
    code = _map(signed, values.device)
    exact = bitsandbytes_operators().dequantize_blockwise(codes, absmax.flatten(), code, BLOCK, torch.float32)
    exact = exact.view(codes.shape)[..., : values.shape[-1]].contiguous()
    return (exact if signed else exact.square()).to(dtype)


def store(values: Tensor, absmax: Tensor | None, exact: Tensor, signed: bool, step: Tensor, found_inf: Tensor) -> None:
    """Write a moment back unless `found_inf` (0-dim) is 1; float32 and float64 have been updated in place already.

    bfloat16 rounds the first moment to nearest and the second stochastically: with `beta2 = 0.999` its changes are
    smaller than half a unit in the last place, so rounding to nearest would lose them. The dither is a function of the
    bits of the value and of the step (one per entry, `(K, 1, 1)`), so that a resumed run repeats it.
    """
    exact = exact.float() if values.dtype in (torch.bfloat16, torch.uint8) else exact
    if values.dtype == torch.bfloat16:
        values.copy_(exact if signed else dithered(exact, step))
    elif values.dtype == torch.uint8:
        assert absmax is not None
        whole = _whole_blocks(exact if signed else exact.sqrt())
        codes, scales = bitsandbytes_operators().quantize_blockwise(whole, _map(signed, values.device), BLOCK)
        if signed and values.device.type == "cpu":
            # On the CPU bitsandbytes rounds on a grid and stores 0 as 2e-5 of the largest value: elements without a
            # gradient would move. The root of V is only rounded up, so that it is not 0 below an M that is not.
            tiny = whole.view(-1, BLOCK).abs() <= _TINY * scales.view(-1, 1)
            codes = codes.view(-1, BLOCK).masked_fill(tiny, _ZERO)
        # Quantising the same values again may change a scale: a skipped step must write nothing.
        keep = found_inf > 0
        values.copy_(torch.where(keep, values, codes.view(whole.shape)[..., : values.shape[-1]]))
        absmax.copy_(torch.where(keep, absmax, scales.view(absmax.shape)))


def dithered(exact: Tensor, step: Tensor) -> Tensor:
    """Float32 values rounded up or down at random to values that bfloat16 holds exactly."""
    bits = exact.view(torch.int32)
    mixed = (bits + step.to(torch.int32) * _signed(0x9E3779B1)) * _signed(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13 & 0x7FFFF)) * _signed(0xC2B2AE35)
    return (bits + (mixed >> 16 & 0xFFFF) & ~0xFFFF).view(torch.float32)


def _map(signed: bool, device: torch.device) -> Tensor:
    return tables_on(device)[0 if signed else 2]


def _signed(constant: int) -> int:
    return constant - (1 << 32)  # int32 arithmetic wraps around as uint32's does


def _whole_blocks(rows: Tensor) -> Tensor:
    missing = -rows.shape[-1] % BLOCK
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()


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
