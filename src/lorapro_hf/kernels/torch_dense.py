"""How does plain torch take the step of dense moments? A cache-sized tile at a time, if asked with compiled kernels.

A tile is a batch of equal matrices, at least one for each thread: all rows of several weights, or rows of one weight
cut into parts. MKL multiplies each on a core of its own; the threads of one small product would mostly wait for each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lorapro_hf.kernels.storage import Moments, load, store

# The elements of one thread: gradient, direction and both moments stay in its part of the last-level cache. On other
# devices few large kernels are better than many small ones.
_CPU_ELEMENTS = 2**19
_DEVICE_ELEMENTS = 2**25


class DirectionProducts(NamedTuple):
    """The products of Adam's direction u with the factors, rows along the last dimension."""

    u_A: Tensor  # (K, r, m), the transpose of `u Aᵀ`
    B_u: Tensor  # (K, r, n), `Bᵀ u`
    K_u: Tensor | None  # (K, r, n), `Kᵀ u` with `K = u Aᵀ`, for a sequential update only


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


def dense_update(
    moments: Moments,
    left: Tensor,
    right: Tensor,
    A: Tensor,
    B: Tensor,
    steps: Tensor,
    found_inf: Tensor,
    *,
    products: DirectionProducts,
    entries: Sequence[int],
    betas: tuple[float, float],
    eps: float,
    compiled: bool = False,
) -> None:
    """See `lorapro_hf.kernels.dense.dense_update`; writes into `products`, which must be zeros."""
    advance = _compiled_advance if compiled else _fused_advance
    m, n = moments.exp_avg.shape[1:]
    g = u = left.new_empty(0)
    for tile in _tiles(entries, m, n, left.device, moments.exp_avg.dtype):
        L, R = tile.rows_of(left), tile.columns_of(right)
        shape = (len(L), L.shape[-1], n)
        if g.shape != shape:
            g, u = left.new_empty(shape), left.new_empty(shape)
        torch.bmm(L.mT, R, out=g)
        u = advance(_stored_rows(moments, tile), g, u, steps[tile.entries], found_inf, betas, eps)
        u_A = torch.bmm(tile.columns_of(A), u.mT)
        tile.put_rows(products.u_A, u_A)
        tile.add_columns(products.B_u, torch.bmm(tile.rows_of(B), u))
        if products.K_u is not None:
            tile.add_columns(products.K_u, torch.bmm(u_A, u))


def tile_elements(device: torch.device, storage: torch.dtype = torch.float32) -> int:
    """The largest number of elements of a tile, roughly; half as many in 8 bits, where quantising makes copies."""
    most = torch.get_num_threads() * _CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS
    return most // 2 if storage == torch.uint8 else most


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


def _stored_rows(moments: Moments, tile: _Tile) -> Moments:
    def cut(values: Tensor) -> Tensor:
        return values[tile.entries, tile.rows]

    absmax, sq_absmax = moments.exp_avg_absmax, moments.exp_avg_sq_absmax
    scales = (None, None) if absmax is None or sq_absmax is None else (cut(absmax), cut(sq_absmax))
    return Moments(cut(moments.exp_avg), cut(moments.exp_avg_sq), *scales)


def _fused_advance(
    stored: Moments, g: Tensor, u: Tensor, steps: Tensor, found_inf: Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update the moments `(entries, rows, n)` with g and return the direction, written to u.

    torch's fused AdamW does both in one pass: a "parameter" of zeros and a rate of −1 give u.
    """
    M, V = _load_both(stored, g.dtype)
    together = (M.shape[0], -1, M.shape[-1])
    torch._fused_adamw_(
        list(u.zero_().view(together).unbind()),
        list(g.view(together).unbind()),
        list(M.unbind()),
        list(V.unbind()),
        [],
        list(steps.unbind()),
        lr=-1.0,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )
    _store_both(stored, M, V, steps, found_inf)
    return u


def _compiled_advance(
    stored: Moments, g: Tensor, u: Tensor, steps: Tensor, found_inf: Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    """The same through `torch.compile`."""
    M, V = _load_both(stored, g.dtype)
    exact = steps.double()
    scales = (1 / (1 - betas[0] ** exact)).to(M), (1 - betas[1] ** exact).rsqrt().to(M)
    # Flat and one by one: any other shape would be compiled again.
    for each in zip(*(x.reshape(len(M), -1) for x in (M, V, g, u)), *scales, strict=True):
        _compiled(_adam)(*each, found_inf, *betas, eps)
    _store_both(stored, M, V, steps, found_inf)
    return u


def _load_both(stored: Moments, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        load(stored.exp_avg, stored.exp_avg_absmax, True, dtype),
        load(stored.exp_avg_sq, stored.exp_avg_sq_absmax, False, dtype),
    )


def _store_both(stored: Moments, M: Tensor, V: Tensor, steps: Tensor, found_inf: Tensor) -> None:
    step = steps[:, None, None]
    store(stored.exp_avg, stored.exp_avg_absmax, M, True, step, found_inf)
    store(stored.exp_avg_sq, stored.exp_avg_sq_absmax, V, False, step, found_inf)


def _adam(
    M: Tensor,
    V: Tensor,
    g: Tensor,
    u: Tensor,
    scale1: Tensor,
    scale2: Tensor,
    found_inf: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    new_M, new_V = M + (1 - beta1) * (g - M), beta2 * V + (1 - beta2) * (g * g)
    u.copy_(torch.where(found_inf > 0, 0, new_M * scale1 / (new_V.sqrt() * scale2 + eps)))
    M.copy_(torch.where(found_inf > 0, M, new_M))
    V.copy_(torch.where(found_inf > 0, V, new_V))


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True)
