"""How does one launch take all dense moments of a stack through an Adam step on CUDA?

`dense_update` reads and writes the moments once, tile by tile, and multiplies each tile of Adam's direction u at once
with both factors; beside the moments nothing of the size of the weight exists. The kernel is in `triton_tiles`. Its
matrix products run on tensor cores: three TF32 products make one of float32 accuracy (errors of about 2⁻²¹). Float64
moments get exact (IEEE) products.

Sums are deterministic: each program adds up one rectangle of rows and columns in a fixed order, and torch adds the
rectangles. Their number, about `PROGRAMS` for a stack, does not depend on the device, so a resumed run repeats its
bits. The scratch for L entries is `L r (n row_splits + m column_splits)` numbers: 8 MB for one entry of 4096 x 4096 and
rank 8 (6 % of its moments), and less beside the moments of a larger stack.

A sequential update needs K = `u Aᵀ` of a whole row before it can form `Kᵀ u`. Its first sweep reads the moments and
forms K alone. The second sweep reads them again, computes the same u and stores the moments. So u is never rounded and
needs no scratch, for 24 instead of 16 bytes of traffic an element in float32.

The kernel has not run on hardware. It is tested through Triton's interpreter, which multiplies exactly, and compiled
ahead of time to sm_90 code, where four programs of 128 threads share a multiprocessor (float32 and bfloat16 moments,
rank up to 16). The rounding of TF32 products, the speed and the choices of `plan` have not been observed on a GPU.
8-bit storage takes about three times the instructions of float32 an element, which will limit its speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lorapro_hf.kernels.storage import Moments, tables_on
from lorapro_hf.kernels.triton_tiles import dense_kernel

PROGRAMS = 1024
PRECISION = "tf32x3"


class Stack(NamedTuple):
    """The arguments that both sweeps share."""

    moments: Moments
    left: Tensor
    right: Tensor
    A: Tensor
    steps: Tensor
    found_inf: Tensor
    betas: tuple[float, float]
    eps: float
    entries: tuple[int, ...] | None


class Launch(NamedTuple):
    """Compile-time settings of the kernel, and the rectangles that its programs take."""

    options: dict[str, Any]
    row_splits: int
    column_splits: int
    row_span: int
    column_span: int


def dense_update(
    moments: Moments,
    left: Tensor,
    right: Tensor,
    A: Tensor,
    Bt: Tensor,
    steps: Tensor,
    found_inf: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    sequential: bool = False,
    entries: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Update dense moments with gradients `leftᵀ right`, and return the products of Adam's direction u.

    The arguments are those of `lorapro_hf.kernels.dense.dense_update`. Moments are contiguous: float32, float64,
    bfloat16, or uint8 codes with their scales. Factors are float32, or float64 with float64 moments.

    Returns:
        `(A uᵀ (K, r, m), Bᵀ u (K, r, n), Kᵀ u (K, r, n) or None)` with K = u Aᵀ, in the dtype of the factors.

    Raises:
        ValueError: moments are not contiguous, or of another dtype.
    """
    _check(moments, A)
    stack = Stack(moments, left, right, A, steps, found_inf, betas, eps, None if entries is None else tuple(entries))
    if not sequential:
        uAt, Bu = _sweep(stack, Bt, row_side=True, store=True)
        return uAt, Bu, None
    uAt, _ = _sweep(stack, Bt[:, :0], row_side=True, store=False)
    _, sums = _sweep(stack, torch.cat([Bt, uAt], dim=1), row_side=False, store=True)
    Bu, Ku = sums.split(Bt.shape[1], dim=1)
    return uAt, Bu, Ku


def _sweep(stack: Stack, W: Tensor, *, row_side: bool, store: bool) -> tuple[Tensor, Tensor]:
    """Launch over the active entries: `A uᵀ` `(K, r, m)` if `row_side`, and `W u` `(K, q, n)` for W `(K, q, m)`."""
    moments, A = stack.moments, stack.A
    count, rank, n = A.shape
    q, m = W.shape[1:]
    entries = count if stack.entries is None else len(stack.entries)
    launch = plan(moments.exp_avg.dtype, A.dtype, (count, m, n), rank, q, store=store)
    uAt = A.new_empty(entries, launch.column_splits, rank if row_side else 0, m)
    Wu = A.new_empty(entries, launch.row_splits, q, n)
    index = None if stack.entries is None else _index_on(stack.entries, A.device)
    if uAt.numel() or Wu.numel():
        dense_kernel[(launch.row_splits, launch.column_splits, entries)](
            (moments.exp_avg, moments.exp_avg_sq, moments.exp_avg_absmax, moments.exp_avg_sq_absmax),
            tables_on(A.device) if moments.exp_avg.dtype == torch.uint8 else (None,) * 4,
            (stack.left.contiguous(), stack.right.contiguous(), A.contiguous(), W.contiguous()),
            (uAt, Wu),
            (stack.steps, _denominator(stack).to(A.dtype), stack.found_inf, index),
            count,
            m,
            n,
            launch.row_span,
            launch.column_span,
            RANK=rank,
            Q=q,
            BETAS=stack.betas,
            ROW_SIDE=row_side,
            STORE=store,
            **launch.options,
            # Multiply-adds round once: half the work, and as repeatable as two roundings.
            enable_fp_fusion=True,
        )
    return _gather(uAt, index, count), _gather(Wu, index, count)


def plan(
    storage: torch.dtype, dtype: torch.dtype, shape: tuple[int, int, int], rank: int, q: int, *, store: bool
) -> Launch:
    """The blocks and splits for moments `(K, m, n)` in `storage`, factors in `dtype`, r rows of A and q rows of W.

    They depend on the arguments only, so that a resumed run repeats its bits.
    """
    count, m, n = shape
    # The scale of a block of codes is its largest value: a tile must hold whole blocks.
    block_m, block_n = (16, 256) if storage == torch.uint8 and store else (64, 32)
    block_r = 16 if max(rank, q) <= 16 else 32
    options = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_R": block_r,
        "PRECISION": "ieee" if dtype == torch.float64 or torch.version.hip else PRECISION,
        "num_warps": 4,
        # Four programs on a multiprocessor hide latency better than two that fetch ahead.
        "num_stages": 1,
    }
    if block_n == 32 and dtype == torch.float32 and not torch.version.hip:
        options["maxnreg"] = 128 if block_r == 16 else 168
    # Rectangles that are nearly squares need the least scratch.
    wanted = max(1, PROGRAMS // count)
    row_splits = min(triton.cdiv(m, block_m), max(1, round((wanted * m / n) ** 0.5)))
    column_splits = min(triton.cdiv(n, block_n), triton.cdiv(wanted, row_splits))
    row_span = block_m * triton.cdiv(m, block_m * row_splits)
    column_span = block_n * triton.cdiv(n, block_n * column_splits)
    return Launch(options, triton.cdiv(m, row_span), triton.cdiv(n, column_span), row_span, column_span)


def _denominator(stack: Stack) -> Tensor:
    """`(2, K)` float64: `u = M / (√V * first + second)`; both hold the bias corrections, and the second holds eps."""
    steps = stack.steps.double()
    correction1, correction2 = (1 - beta**steps for beta in stack.betas)
    return torch.stack([correction1 / correction2.sqrt(), correction1 * stack.eps])


def _gather(partial: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Sum `(L, splits, rows, length)` over the splits, and place the sums among K entries, `(K, rows, length)`."""
    total = partial[:, 0] if partial.shape[1] == 1 else partial.sum(dim=1)
    return total if index is None else total.new_zeros(count, *total.shape[1:]).index_copy_(0, index, total)


@lru_cache(maxsize=64)
def _index_on(entries: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions as an int64 tensor; the host does not wait for a copy from pinned memory."""
    index = torch.tensor(entries, dtype=torch.int64, pin_memory=device.type == "cuda")
    return index.to(device, non_blocking=True)


def _check(moments: Moments, A: Tensor) -> None:
    if not moments.exp_avg.is_contiguous() or not moments.exp_avg_sq.is_contiguous():
        raise ValueError(
            "the moments of a stack must be contiguous; call .contiguous() on them once and keep the result."
        )
    storages = (torch.float64,) if A.dtype == torch.float64 else (torch.float32, torch.bfloat16, torch.uint8)
    if moments.exp_avg.dtype not in storages or moments.exp_avg.dtype != moments.exp_avg_sq.dtype:
        raise ValueError(
            f"moments of {moments.exp_avg.dtype} and {moments.exp_avg_sq.dtype} do not go with factors of {A.dtype}; "
            f"both must be one of {', '.join(map(str, storages))}."
        )
