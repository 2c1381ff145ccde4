"""Which normal number belongs to each element of a matrix, whatever is computed first, where and by how many threads?

A number depends on a key (seed, layer, window) and on its row and column alone. The counter-based generator
Philox4x32-10 (Salmon et al., 2011) gives four words for the counter `(16 b + l, row, layer, window)`; Box-Muller turns
the first two into the numbers of the columns `64 b + l` and `64 b + 16 + l`, the others into those 32 columns further
right. torch computes the same numbers as the C++ kernel, to the rounding of float32.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro_hf.kernels import native
from lorapro_hf.kernels.native import address

_LANES = 16  # counters that lie side by side
_WORD = 0xFFFFFFFF
_MULTIPLIERS, _STEPS_OF_KEY = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


class NoiseKey(NamedTuple):
    """Names the noise of a matrix: a seed of 64 bits, and numbers of 32 bits for its layer and the time."""

    seed: int
    layer: int
    window: int


class _Noise(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "first_row", "threads", "seed", "layer", "window")),
        ("ids", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("is_of_columns", ctypes.c_int64),
        ("out", ctypes.c_void_p),
    ]


def with_noise(weight: Tensor | None, scale: Tensor, key: NoiseKey, rows: range | Tensor, columns: int) -> Tensor:
    """Some rows of a matrix plus noise, as a new tensor `(rows, columns)` in the dtype of the scale.

    Args:
        weight: these rows, of any floating dtype; `None` for the noise alone.
        scale: standard deviation of each row `(rows, 1)` or of each column `(1, columns)`, float32 or float64.
        key: names the noise.
        rows: consecutive numbers of the rows in the whole matrix, or any numbers as a tensor.
        columns: of the matrix.
    """
    own = None if weight is None else weight.to(scale.dtype)
    if _is_native(own, scale):
        return _by_kernel(own, scale, key, rows, columns)
    numbers = torch.arange(rows.start, rows.stop, device=scale.device) if isinstance(rows, range) else rows
    noise = standard_normal(numbers, columns, key).to(scale.dtype).mul_(scale)
    return noise if own is None else noise.add_(own)


def standard_normal(rows: Tensor, columns: int, key: NoiseKey) -> Tensor:
    """The numbers of given rows of a matrix before they are scaled, `(rows, columns)` float32, computed in torch."""
    blocks = -(-columns // (4 * _LANES))
    counters = torch.arange(blocks * _LANES, device=rows.device).expand(len(rows), -1)
    layer, window = (torch.full_like(counters, number) for number in (key.layer, key.window))
    a, b, c, d = _philox((counters, rows.to(torch.int64)[:, None].expand_as(counters), layer, window), key.seed)
    numbers = torch.stack([*_box_muller(a, b), *_box_muller(c, d)])  # (4, rows, blocks * lanes)
    return numbers.unflatten(-1, (blocks, _LANES)).movedim(0, 2).flatten(1)[:, :columns]


def _philox(counters: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of words that lie in int64."""
    a, b, c, d = counters
    keys = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # the lower 64 bits, which wrap around
        a, b = (q >> 32).bitwise_and_(_WORD).bitwise_xor_(b).bitwise_xor_(keys[0]), q.bitwise_and_(_WORD)
        c, d = (p >> 32).bitwise_and_(_WORD).bitwise_xor_(d).bitwise_xor_(keys[1]), p.bitwise_and_(_WORD)
        keys = (keys[0] + _STEPS_OF_KEY[0]) & _WORD, (keys[1] + _STEPS_OF_KEY[1]) & _WORD
    return a, b, c, d


def _box_muller(length: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normal numbers, float32, of two words; the largest possible size is 5.8."""
    u = ((length >> 9).to(torch.float32) + 0.5) * 2.0**-23
    radius = u.log_().mul_(-2).sqrt_()
    theta = (angle - (angle >> 31 << 32)).to(torch.float32) * (math.pi * 2.0**-31)  # from -pi to pi
    return radius * theta.cos(), radius * theta.sin()


def _is_native(weight: Tensor | None, scale: Tensor) -> bool:
    lies_plainly = weight is None or (weight.is_cpu and weight.stride(-1) == 1)
    return lies_plainly and scale.is_cpu and scale.dtype == torch.float32 and native.native_kernels() is not None


def _by_kernel(weight: Tensor | None, scale: Tensor, key: NoiseKey, rows: range | Tensor, columns: int) -> Tensor:
    library: Any = native.native_kernels()
    out = torch.empty(len(rows), columns, dtype=scale.dtype, device=scale.device)
    scale, ids = scale.contiguous(), None if isinstance(rows, range) else rows.to(torch.int64).contiguous()
    seed = key.seed - (key.seed >> 63 << 64)  # as a signed number
    first = rows.start if isinstance(rows, range) else 0
    noise = _Noise(
        *out.shape, first, torch.get_num_threads(), seed, key.layer, key.window, address(ids),
        None if weight is None else weight.data_ptr(), 0 if weight is None else weight.stride(0),
        address(scale), scale.shape == (1, columns), address(out),
    )  # fmt: skip
    library.lorapro_noise(ctypes.byref(noise))
    return out
