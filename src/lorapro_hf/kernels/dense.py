"""How is one step of dense moments taken: by Triton on CUDA, by C++ on a CPU, else by torch?

The kernels are in `triton_dense` and `dense.cpp`. torch takes one tile of the size of a cache at a time: a batch of
equal matrices, at least one for each thread, all rows of several weights or rows of one weight cut into parts. MKL
multiplies each matrix on its own core; threads that share one small product mostly wait.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro_hf.kernels import native
from lorapro_hf.kernels.native import address
from lorapro_hf.kernels.storage import Moments, buckets_on, load, store, tables_on

# The elements of one thread: gradient, direction and both moments stay in its part of the last-level cache. On other
# devices few large kernels are better than many small ones.
_CPU_ELEMENTS = 2**19
_DEVICE_ELEMENTS = 2**25
# The numbers in `dense.cpp` of the dtypes of factors and moments, and the rank above which MKL is faster.
_NATIVE_STORAGES = {
    (torch.float32, torch.float32): 0,
    (torch.float64, torch.float64): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.float32, torch.uint8): 2,
}
_NATIVE_RANK = 128  # with moments of 32 bits and more


class DirectionProducts(NamedTuple):
    """The products of Adam's direction u with the factors, rows along the last dimension."""

    u_A: Tensor  # (K, r, m), the transpose of `u Aᵀ`
    B_u: Tensor  # (K, r, n), `Bᵀ u`
    K_u: Tensor | None  # (K, r, n), `Kᵀ u` with `K = u Aᵀ`, for a sequential update only


def dense_update(
    moments: Moments,
    left: Tensor,
    right: Tensor,
    A: Tensor,
    B: Tensor,
    steps: Tensor,
    found_inf: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    sequential: bool = False,
    entries: Sequence[int] | None = None,
    backend: str = "auto",
) -> DirectionProducts:
    """Update dense moments with equivalent gradients and return the products of Adam's direction.

    With `g = leftᵀ right`: `M ← β₁ M + (1−β₁) g`, `V ← β₂ V + (1−β₂) g∘g` and `u = M̂ / (√V̂ + eps)`. Each tile of u is
    multiplied with the factors at once: beside the moments nothing of the size of `g` exists. The host does not wait
    for the device.

    Args:
        moments: of K weights `(m, n)`, updated in place.
        left: `(K, 2r, m)`.
        right: `(K, 2r, n)`.
        A: rows to multiply u with, `(K, r, n)`: A, or its orthonormal rows, which are better conditioned.
        B: the same for the columns of B, `(K, r, m)`.
        steps: `(K,)` float32, the step counts, this step included.
        found_inf: 0-dim; where it is 1 the moments stay as they are and u counts as 0.
        betas: decay rates of the moments.
        eps: added to the denominator.
        sequential: also give `K_u`.
        entries: the active entries, by default all; the others stay as they are and get zeros.
        backend: `"torch"`, `"triton"`, or `"auto"`.

    Raises:
        RuntimeError: the backend cannot serve this device.
    """
    chosen = choose_backend(backend, A.device)
    if chosen == "native" and _native_serves(moments, A):
        return _native_update(moments, (left, right, A, B), steps, found_inf, betas, eps, sequential, entries)
    if chosen == "triton":
        from lorapro_hf.kernels import triton_dense

        products = triton_dense.dense_update(
            moments, left, right, A, B, steps, found_inf, betas=betas, eps=eps, sequential=sequential, entries=entries
        )
        return DirectionProducts(*products)
    u_A, B_u, K_u = torch.zeros_like(B), torch.zeros_like(A), torch.zeros_like(A) if sequential else None
    m, n = moments.exp_avg.shape[1:]
    g = u = left.new_empty(0)
    for tile in _tiles(range(len(A)) if entries is None else entries, m, n, left.device, moments.exp_avg.dtype):
        L, R = tile.rows_of(left), tile.columns_of(right)
        shape = (len(L), L.shape[-1], n)
        if g.shape != shape:
            g, u = left.new_empty(shape), left.new_empty(shape)
        torch.bmm(L.mT, R, out=g)
        stored = Moments(*(None if x is None else x[tile.entries, tile.rows] for x in moments))  # type: ignore[arg-type]
        _advance(stored, g, u, steps[tile.entries], found_inf, betas, eps)
        tile_u_A = torch.bmm(tile.columns_of(A), u.mT)
        tile.put_rows(u_A, tile_u_A)
        tile.add_columns(B_u, torch.bmm(tile.rows_of(B), u))
        if K_u is not None:
            tile.add_columns(K_u, torch.bmm(tile_u_A, u))
    return DirectionProducts(u_A, B_u, K_u)


def _native_serves(moments: Moments, A: Tensor) -> bool:
    storage = moments.exp_avg.dtype
    return (A.dtype, storage) in _NATIVE_STORAGES and (A.shape[1] <= _NATIVE_RANK or storage.itemsize < 4)


def _native_update(
    moments: Moments,
    factors: tuple[Tensor, Tensor, Tensor, Tensor],
    steps: Tensor,
    found_inf: Tensor,
    betas: tuple[float, float],
    eps: float,
    sequential: bool,
    entries: Sequence[int] | None,
) -> DirectionProducts:
    """`dense_update` by `dense.cpp`."""
    left, right, A, B = (x.contiguous() for x in factors)
    (K, r, n), m = A.shape, B.shape[-1]
    products = DirectionProducts(torch.zeros_like(B), torch.zeros_like(A), torch.zeros_like(A) if sequential else None)
    active = range(K) if entries is None else entries
    if not (len(active) and m * n * r):
        return products
    tensors = [*moments, left, right, A, B, *products]
    maps = tables_on(A.device)
    tables = [x for i, signed in ((0, True), (2, False)) for x in (*maps[i : i + 2], buckets_on(signed, A.device))]
    counts, skip = steps.float().contiguous(), found_inf.float()  # names keep them alive during the call
    kernels = native.native_kernels()
    assert kernels is not None
    assert left.shape == (K, 2 * r, m) and right.shape == (K, 2 * r, n)
    failed = kernels.lorapro_dense_update(
        (ctypes.c_void_p * len(tensors))(*(address(x) for x in tensors)),
        (ctypes.c_void_p * len(tables))(*(address(x) for x in tables)),
        (ctypes.c_int64 * len(active))(*active),
        ctypes.c_int64(len(active)),
        *map(address, (counts, skip)),
        *map(ctypes.c_int64, (m, n, r)),
        ctypes.c_int(sequential),
        *map(ctypes.c_double, (*betas, eps)),
        ctypes.c_int(A.dtype == torch.float64),
        ctypes.c_int(_NATIVE_STORAGES[A.dtype, moments.exp_avg.dtype]),
        ctypes.c_int(torch.get_num_threads()),
    )
    if failed:
        raise MemoryError("no memory is left for the step of a dense moment.")
    return products


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend for this device: the given one, or the choice of `"auto"`.

    Raises:
        RuntimeError: it cannot serve this device.
    """
    if backend == "auto":
        if device.type == "cuda" and has_triton():
            return "triton"
        return "native" if device.type == "cpu" and native.native_kernels() is not None else "torch"
    if backend == "triton" and (device.type != "cuda" or not has_triton()):
        missing = "it is not installed, or turned off" if device.type == "cuda" else f"the factors are on {device.type}"
        raise RuntimeError(f"backend='triton' needs CUDA and the package triton, but {missing}. Use backend='auto'.")
    return backend


@cache
def has_triton() -> bool:
    """Whether Triton is installed and not turned off by `LORAPRO_HF_NO_TRITON=1` in the environment."""
    return find_spec("triton") is not None and os.environ.get("LORAPRO_HF_NO_TRITON", "0") in ("", "0")


def fused_adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    group: Mapping[str, Any],
    found_inf: Tensor,
) -> None:
    """`torch.optim.AdamW(fused=True)` for steps that have been counted already; does nothing where `found_inf` is 1."""
    tensors = [list(some) for some in (parameters, gradients, exp_avgs, exp_avg_sqs, (), steps)]
    torch._fused_adamw_(
        *tensors,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )


def tile_elements(device: torch.device, storage: torch.dtype = torch.float32) -> int:
    """The largest number of elements of a tile, roughly; half as many in 8 bits, where quantising makes copies."""
    most = torch.get_num_threads() * _CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS
    return most // 2 if storage == torch.uint8 else most


class _Tile(NamedTuple):
    entries: slice
    rows: slice
    parts: int  # how many equal parts the rows are cut into

    def rows_of(self, x: Tensor) -> Tensor:
        """The tile's part of `x` `(K, r, m)`: `(batch, r, rows)`."""
        return self._cut(x).flatten(0, 1)

    def columns_of(self, x: Tensor) -> Tensor:
        """The matrices of `x` `(K, r, n)` that belong to the tile: `(batch, r, n)`."""
        matrices = x[self.entries]
        return matrices.expand(self.parts, -1, -1) if self.parts > 1 else matrices

    def put_rows(self, x: Tensor, values: Tensor) -> None:
        cut = self._cut(x)
        cut.copy_(values.view(cut.shape))

    def add_columns(self, x: Tensor, values: Tensor) -> None:
        matrices = x[self.entries]
        matrices += values.view(len(matrices), self.parts, *values.shape[1:]).sum(1)

    def _cut(self, x: Tensor) -> Tensor:
        return x[self.entries, :, self.rows].unflatten(2, (self.parts, -1)).movedim(2, 1)


def _tiles(
    entries: Sequence[int], m: int, n: int, device: torch.device, storage: torch.dtype = torch.float32
) -> Iterator[_Tile]:
    if m * n == 0:
        return
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    elements = tile_elements(device, storage) // threads
    for start, stop in _runs(entries):
        if m * n <= elements:
            together = max(1, threads * elements // (m * n))
            together = max(threads, together - together % threads)
            for first in range(start, stop, together):
                yield _Tile(slice(first, min(first + together, stop)), slice(0, m), 1)
            continue
        height = max(1, elements // n)
        for entry in range(start, stop):
            yield from (_Tile(slice(entry, entry + 1), rows, parts) for rows, parts in _row_cuts(m, height, threads))


def _row_cuts(m: int, height: int, threads: int) -> Iterator[tuple[slice, int]]:
    """Rows of a tile and the number of its parts: full tiles first, then the rest in one part for each thread."""
    full = height * threads
    for start in range(0, m - full + 1, full):
        yield slice(start, start + full), threads
    start = m - m % full
    even = (m - start) // threads * threads
    if even:
        yield slice(start, start + even), threads
    if start + even < m:
        yield slice(start + even, m), 1


def _runs(entries: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as `(first, last + 1)`."""
    start = None
    for index, number in enumerate(entries):
        start = number if start is None else start
        if index + 1 == len(entries) or entries[index + 1] != number + 1:
            yield start, number + 1
            start = None


def _advance(
    stored: Moments,
    g: Tensor,
    u: Tensor,
    steps: Tensor,
    found_inf: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update the moments `(entries, rows, n)` of a tile with g, and write Adam's direction to u."""
    in_place = stored.exp_avg.dtype == g.dtype
    M, V = (stored.exp_avg, stored.exp_avg_sq) if in_place else load(stored, g.dtype)
    # One pass of torch's fused AdamW does both: a "parameter" of zeros and a rate of −1 give u.
    directions, gradients = (x.view(len(M), -1, M.shape[-1]).unbind() for x in (u.zero_(), g))
    group = {"lr": -1.0, "betas": betas, "eps": eps, "weight_decay": 0.0}
    fused_adamw(directions, gradients, M.unbind(), V.unbind(), steps.unbind(), group, found_inf)
    if not in_place:
        store(stored, M, V, steps[:, None, None], found_inf)
