"""How does one program update its tiles of dense moments, and in what order does it add up its sums?

The kernel of `triton_dense`. A program owns a rectangle of one entry, `row_span` rows by `column_span` columns, and
takes tiles of `BLOCK_M` by `BLOCK_N`, one column block after the other. It alone sums the products of its tiles, in
registers or in memory that no other program touches. There are no atomics, so equal inputs give equal bits.

Arguments of the kernel:
    moments: pointers to M, V and, for 8-bit codes, their scales.
    tables: pointers to the signed map and its thresholds, then the unsigned ones.
    factors: pointers to left `(K, 2r, m)`, right `(K, 2r, n)`, A `(K, r, n)` and W `(K, q, m)`.
    sums: pointers to `(L, column splits, r, m)` and `(L, row splits, q, n)` for the L active entries.
    scalars: pointers to the steps `(K,)`, the factor and summand of the denominator `(2, K)`, found_inf, and the
        indices `(L,)` of the active entries or None.
    entries, m, n: the shape `(K, m, n)` of the moments.
    RANK, Q: r and q; a Q of 0 leaves out `W u`.
    BETAS: both, as constants, so that a float64 moment gets all their digits.
    ROW_SIDE: whether to form `A uᵀ`.
    STORE: whether to store the moments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorapro_hf.kernels.triton_storage import load_moment, store_moment


@triton.jit(do_not_specialize=["entries"])  # else some numbers of entries would be compiled by themselves, for minutes
def dense_kernel(
    moments: tl.tuple,
    tables: tl.tuple,
    factors: tl.tuple,
    sums: tl.tuple,
    scalars: tl.tuple,
    entries: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    row_span: tl.tensor,
    column_span: tl.tensor,
    RANK: tl.constexpr,
    Q: tl.constexpr,
    BETAS: tl.constexpr,
    ROW_SIDE: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Update one rectangle, `BLOCK_R` ranks at a time; `W u` of a column block stays in registers for a small q."""
    entry, row_start, column_start, uAt, Wu = _place(scalars, sums, m, n, row_span, column_span, RANK, Q)
    if tl.load(scalars[2]) != 0:
        if ROW_SIDE:
            _clear(uAt, RANK, row_start, row_span, m, BLOCK_R, BLOCK_M)
        _clear(Wu, Q, column_start, column_span, n, BLOCK_R, BLOCK_N)
        return
    left, right = factors[0] + entry * (2 * RANK) * m, factors[1] + entry * (2 * RANK) * n
    A, W = factors[2] + entry * RANK * n, factors[3] + entry * Q * m
    dtype: tl.constexpr = factors[0].dtype.element_ty
    first_ranks = tl.arange(0, BLOCK_R)
    for first_column in range(column_start, tl.minimum(column_start + column_span, n), BLOCK_N):
        column = first_column + tl.arange(0, BLOCK_N)
        kept = tl.zeros((BLOCK_R, BLOCK_N), dtype)
        for first_row in range(row_start, tl.minimum(row_start + row_span, m), BLOCK_M):
            row = first_row + tl.arange(0, BLOCK_M)
            g = tl.zeros((BLOCK_M, BLOCK_N), dtype)
            for k in range(0, 2 * RANK, BLOCK_R):
                ranks = k + first_ranks
                from_left = tl.trans(_block(left, ranks, 2 * RANK, row, m))
                from_right = _block(right, ranks, 2 * RANK, column, n)
                g = tl.dot(from_left, from_right, acc=g, input_precision=PRECISION, out_dtype=dtype)
            u = _advance(g, moments, tables, scalars, entry, entries, row, column, m, n, BETAS, STORE)
            if ROW_SIDE:
                for k in range(0, RANK, BLOCK_R):
                    from_A = tl.trans(_block(A, k + first_ranks, RANK, column, n))
                    found = tl.dot(u, from_A, input_precision=PRECISION, out_dtype=dtype)
                    _add(uAt, tl.trans(found), k + first_ranks, RANK, row, m, first_column, column_start)
            if Q > BLOCK_R:
                for k in range(0, Q, BLOCK_R):
                    weight = _block(W, k + first_ranks, Q, row, m)
                    found = tl.dot(weight, u, input_precision=PRECISION, out_dtype=dtype)
                    _add(Wu, found, k + first_ranks, Q, column, n, first_row, row_start)
                # Another thread may read these sums in the next round.
                tl.debug_barrier()
            elif Q > 0:
                weight = _block(W, first_ranks, Q, row, m)
                kept = tl.dot(weight, u, acc=kept, input_precision=PRECISION, out_dtype=dtype)
        if Q > 0 and Q <= BLOCK_R:
            _put(Wu, kept, first_ranks, Q, column, n)
        # The same for `uAt`; inside the inner loop a barrier would keep the compiler from fetching tiles ahead.
        tl.debug_barrier()


@triton.jit
def _place(
    scalars: tl.tuple,
    sums: tl.tuple,
    m: tl.tensor,
    n: tl.tensor,
    row_span: tl.tensor,
    column_span: tl.tensor,
    RANK: tl.constexpr,
    Q: tl.constexpr,
) -> tl.tensor:
    """The entry (int64), first row and first column of this program, and the places of its two sums."""
    which = tl.program_id(2).to(tl.int64)
    entry = which if scalars[3] is None else tl.load(scalars[3] + which).to(tl.int64)
    # Neighbours in the grid share their columns, so they read the same parts of right and A.
    row_split, column_split = tl.program_id(0), tl.program_id(1)
    uAt = sums[0] + (which * tl.num_programs(1) + column_split) * RANK * m
    Wu = sums[1] + (which * tl.num_programs(0) + row_split) * Q * n
    return entry, row_split * row_span, column_split * column_span, uAt, Wu


@triton.jit
def _block(rows: tl.tensor, ranks: tl.tensor, count: tl.tensor, position: tl.tensor, length: tl.tensor) -> tl.tensor:
    """`(ranks, positions)` of a factor of `count` rows, zero beyond its end."""
    mask = (ranks < count)[:, None] & (position < length)[None, :]
    return tl.load(rows + ranks[:, None] * length + position[None, :], mask=mask, other=0.0)


@triton.jit
def _put(
    total: tl.tensor, found: tl.tensor, ranks: tl.tensor, count: tl.tensor, position: tl.tensor, length: tl.tensor
) -> None:
    """Write `(ranks, positions)` of a sum."""
    mask = (ranks < count)[:, None] & (position < length)[None, :]
    tl.store(total + ranks[:, None] * length + position[None, :], found, mask=mask)


@triton.jit
def _add(
    total: tl.tensor,
    found: tl.tensor,
    ranks: tl.tensor,
    count: tl.tensor,
    position: tl.tensor,
    length: tl.tensor,
    first: tl.tensor,
    start: tl.tensor,
) -> None:
    """Add `(ranks, positions)` to a sum of this program; the first round, at `start`, overwrites the memory."""
    mask = (ranks < count)[:, None] & (position < length)[None, :]
    place = total + ranks[:, None] * length + position[None, :]
    known = mask & ((ranks * 0 + first) > start)[:, None]
    tl.store(place, tl.load(place, mask=known, other=0.0) + found, mask=mask)


@triton.jit
def _clear(
    total: tl.tensor,
    count: tl.tensor,
    start: tl.tensor,
    span: tl.tensor,
    length: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write zeros to a sum."""
    nothing = tl.zeros((BLOCK_R, BLOCK), total.dtype.element_ty)
    for first in range(start, tl.minimum(start + span, length), BLOCK):
        for k in range(0, count, BLOCK_R):
            _put(total, nothing, k + tl.arange(0, BLOCK_R), count, first + tl.arange(0, BLOCK), length)


@triton.jit
def _advance(
    g: tl.tensor,
    moments: tl.tuple,
    tables: tl.tuple,
    scalars: tl.tuple,
    entry: tl.tensor,
    entries: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    BETAS: tl.constexpr,
    STORE: tl.constexpr,
) -> tl.tensor:
    """Update the moments with a tile of the gradient, and return Adam's direction before the moments are rounded.

    Args:
        g: `(rows, columns)`, zero outside the moments.
        entry: the index in the stack, int64.
        row: `(rows,)`.
        column: `(columns,)`; for 8-bit codes exactly one block.
    """
    coded: tl.constexpr = moments[1].dtype.element_ty == tl.uint8
    row_ok, mask = row < m, (row < m)[:, None] & (column < n)[None, :]
    long_row = entry * m + row
    # Four columns for each thread in every storage: tiles then need not move between threads.
    offsets = long_row[:, None] * n + tl.max_contiguous(column, 4)[None, :]
    blocks = long_row * tl.cdiv(n, 256) + tl.min(column) // 256
    M = load_moment(moments[0], moments[2], tables[0], offsets, mask, blocks, row_ok)
    V = load_moment(moments[1], moments[3], tables[2], offsets, mask, blocks, row_ok)
    if coded:
        V = V * V
    beta1: tl.constexpr = BETAS[0]
    beta2: tl.constexpr = BETAS[1]
    M = M * beta1 + g * (1 - beta1)
    V = V * beta2 + (g * g) * (1 - beta2)
    # One factor and one summand of the denominator hold the bias corrections, which leaves one division.
    factor, summand = tl.load(scalars[1] + entry), tl.load(scalars[1] + entries + entry)
    root = tl.sqrt(V)
    u = tl.where(mask, M / (root * factor + summand), 0.0)
    if STORE:
        step = tl.load(scalars[0] + entry).to(tl.int32)
        store_moment(moments[0], moments[2], tables[1], offsets, mask, blocks, row_ok, M, step, True, False)
        kept = root if coded else V
        store_moment(moments[1], moments[3], tables[3], offsets, mask, blocks, row_ok, kept, step, False, True)
    return u
