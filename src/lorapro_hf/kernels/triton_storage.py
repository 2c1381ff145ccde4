"""How does a tile of dense moments come from memory, and how does it go back?

Triton functions for the kernel of `triton_tiles`; `storage` describes the forms of storage.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_moment(
    values: tl.tensor,
    absmax: tl.tensor,
    table: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    blocks: tl.tensor,
    row_ok: tl.tensor,
) -> tl.tensor:
    """A tile `(rows, columns)` in float32 or wider; for 8-bit codes of the second moment, its square root.

    Args:
        values: pointer to numbers or to 8-bit codes.
        absmax: pointer to the scale of each block of codes, or None.
        table: pointer to the 256 numbers that codes stand for, or None.
        offsets: `(rows, columns)`, the positions of the tile in `values`.
        mask: `(rows, columns)`, which positions lie inside the moment; the others give zero.
        blocks: `(rows,)`, the positions of the tile's blocks in `absmax`.
        row_ok: `(rows,)`, which rows lie inside the moment.
    """
    if values.dtype.element_ty == tl.uint8:
        codes = tl.load(values + offsets, mask=mask, other=0).to(tl.int32)
        scale = tl.load(absmax + blocks, mask=row_ok, other=0.0)
        # Code 0, which stands for positions outside the moment, is not the number zero.
        return tl.where(mask, tl.load(table + codes) * scale[:, None], 0.0)
    elif values.dtype.element_ty == tl.bfloat16:
        return tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(values + offsets, mask=mask, other=0.0)


@triton.jit
def store_moment(
    values: tl.tensor,
    absmax: tl.tensor,
    thresholds: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    blocks: tl.tensor,
    row_ok: tl.tensor,
    tile: tl.tensor,
    step: tl.tensor,
    SIGNED: tl.constexpr,
    DITHER: tl.constexpr,
) -> tl.tensor:
    """Store a tile; the other arguments are those of `load_moment`.

    Args:
        thresholds: pointer to the 257 borders between codes, or None.
        tile: `(rows, columns)`, zero outside the moment; for 8-bit codes one block of each row.
        step: the step count, int32, from which the dither is hashed.
        SIGNED: whether the codes are those of the signed map.
        DITHER: whether to round to bfloat16 with a dither instead of to nearest.
    """
    if values.dtype.element_ty == tl.uint8:
        # A maximum ignores NaN; zero times NaN or Inf is NaN.
        largest = tl.max(tl.abs(tile), axis=1) + tl.sum(tile * 0.0, axis=1)
        scaled = tl.where(largest[:, None] > 0, tl.div_rn(tile, largest[:, None] + tl.zeros_like(tile)), 0.0)
        tl.store(values + offsets, nearest_code(scaled, thresholds, SIGNED).to(tl.uint8), mask=mask)
        tl.store(absmax + blocks, largest, mask=row_ok)
    elif values.dtype.element_ty == tl.bfloat16:
        rounded = dithered(tile, step) if DITHER else nearest(tile)
        # The carry into the sign would make a zero of the GPU's NaN.
        rounded = tl.where(tile == tile, rounded, tile)
        tl.store(values + offsets, rounded.to(tl.bfloat16), mask=mask)
    else:
        tl.store(values + offsets, tile, mask=mask)


@triton.jit
def nearest(tile: tl.tensor) -> tl.tensor:
    """Round float32 numbers to bfloat16, ties to even, and return them in float32; the interpreter's cast truncates."""
    bits = tile.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def dithered(tile: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Round float32 numbers, none negative, to bfloat16 at random but repeatably, and return them in float32."""
    bits = tile.to(tl.uint32, bitcast=True)
    hashed = (bits + step.to(tl.uint32) * 0x9E3779B1) * 0x85EBCA6B
    hashed ^= hashed >> 13
    hashed *= 0xC2B2AE35
    return ((bits + (hashed >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def nearest_code(scaled: tl.tensor, thresholds: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """The codes, int32, of the nearest entries of the dynamic map to float32 numbers in [-1, 1].

    The decade and the place within it give each code up to one; the two borders of that code decide. This takes two
    dependent look-ups; a binary search takes eight.
    """
    size = tl.abs(scaled)
    decade = tl.zeros_like(scaled).to(tl.int32)
    mantissa = size * 1e6
    for exponent in tl.static_range(1, 7):
        inside = size >= 10.0 ** (exponent - 7)
        decade += inside.to(tl.int32)
        mantissa = tl.where(inside, size * 10.0 ** (6 - exponent), mantissa)
    cells = tl.full(scaled.shape, 1 if SIGNED else 2, tl.int32) << decade
    cell = ((mantissa - 0.1) * (1 / 0.9) * cells.to(tl.float32)).to(tl.int32)
    cell = tl.minimum(tl.maximum(cell, 0), cells - 1)
    if SIGNED:
        guess = 127 + cells + cell
        guess = tl.where(scaled < 0, 254 - guess, guess)
    else:
        guess = cells - 1 + cell
    above = scaled > tl.load(thresholds + guess + 1)
    below = scaled <= tl.load(thresholds + guess)
    return guess + above.to(tl.int32) - below.to(tl.int32)
