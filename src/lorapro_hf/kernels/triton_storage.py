"""How does a tile of dense moments come from memory, and how does it go back?

Triton functions shared by the kernels of `triton_dense`; the forms of storage are those of `storage`.
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
    """A tile as it is remembered; for 8-bit codes of the second moment, its square root.

    Args:
        values: pointer to numbers or to 8-bit codes.
        absmax: pointer to the scale of each block of codes, or None.
        table: pointer to the 256 numbers that codes stand for, or None.
        offsets: `(rows, columns)` of the tile in `values`.
        mask: `(rows, columns)`, what lies inside the moment; the rest is zero.
        blocks: `(rows,)` of the tile's blocks in `absmax`.
        row_ok: `(rows,)`.

    Returns:
        `(rows, columns)`, float32 or the dtype of a wider moment.
    """
    if values.dtype.element_ty == tl.uint8:
        codes = tl.load(values + offsets, mask=mask, other=0).to(tl.int32)
        scale = tl.load(absmax + blocks, mask=row_ok, other=0.0)
        # Codes outside the moment would look up a number that is not zero.
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
    """Put a tile back; arguments as in `load_moment`.

    Args:
        thresholds: pointer to the 257 borders between codes, or None.
        tile: `(rows, columns)`, zero outside the moment; for 8-bit codes one block of each row.
        step: the step count t, int32, which the dither is hashed from.
        SIGNED: which of the two maps the codes belong to.
        DITHER: round to bfloat16 with a dither rather than to nearest.
    """
    if values.dtype.element_ty == tl.uint8:
        # A maximum passes over NaN; zero times NaN or Inf does not.
        largest = tl.max(tl.abs(tile), axis=1) + tl.sum(tile * 0.0, axis=1)
        scaled = tl.where(largest[:, None] > 0, tl.div_rn(tile, largest[:, None] + tl.zeros_like(tile)), 0.0)
        tl.store(values + offsets, nearest_code(scaled, thresholds, SIGNED).to(tl.uint8), mask=mask)
        tl.store(absmax + blocks, largest, mask=row_ok)
    elif values.dtype.element_ty == tl.bfloat16:
        rounded = dithered(tile, step) if DITHER else nearest(tile)
        # Carrying into the sign, the GPU's NaN would come out as a zero.
        rounded = tl.where(tile == tile, rounded, tile)
        tl.store(values + offsets, rounded.to(tl.bfloat16), mask=mask)
    else:
        tl.store(values + offsets, tile, mask=mask)


@triton.jit
def nearest(tile: tl.tensor) -> tl.tensor:
    """The nearest float32 numbers of which bfloat16 keeps all, ties to even; the interpreter's own cast truncates."""
    bits = tile.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def dithered(tile: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Float32 numbers of which bfloat16 keeps all, with expectation close to `tile` and a noise that can be replayed.

    Args:
        tile: float32, not negative.
        step: the step count t, int32.

    Returns:
        float32, shaped like `tile`.
    """
    bits = tile.to(tl.uint32, bitcast=True)
    hashed = (bits + step.to(tl.uint32) * 0x9E3779B1) * 0x85EBCA6B
    hashed ^= hashed >> 13
    hashed *= 0xC2B2AE35
    return ((bits + (hashed >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def nearest_code(scaled: tl.tensor, thresholds: tl.tensor, SIGNED: tl.constexpr) -> tl.tensor:
    """The code of the nearest entry of the dynamic map.

    The decade and the place within it give the code up to one; the two borders of that code decide. This takes two
    dependent look-ups where a binary search takes eight.

    Args:
        scaled: float32 in [-1, 1].
        thresholds: pointer to the 257 borders of the map.
        SIGNED: whether it is the signed map.

    Returns:
        int32, shaped like `scaled`.
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
