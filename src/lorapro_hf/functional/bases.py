"""Which directions does a factor span, and how strongly?

A factor is given by its rows, `F` `(r, k)`: A as it is, B transposed. The eigenvectors of its r x r Gram matrix give
`F = U Σ F̂`, where the rows of F̂ are orthonormal. Directions that are absent (a B of zeros, a rank-deficient factor)
have zeros in Σ, in its inverse and in F̂, so that later computations need no special case for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorapro_hf.kernels.eigh import symmetric_eigh

ALL_DIRECTIONS = 1e-14  # an rtol that drops only directions below the precision of float32 factors


class RowBasis(NamedTuple):
    """The r rows of a factor `F = vectors @ diag(singular) @ rows`, with zeros for absent directions."""

    vectors: Tensor  # (..., r, r) orthogonal
    singular: Tensor  # (..., r)
    inverse: Tensor  # (..., r)
    rows: Tensor  # (..., r, k), orthonormal where present

    @property
    def whitening(self) -> Tensor:
        """`U Σ⁻¹` `(..., r, r)`: its transpose times the factor gives `rows`."""
        return self.vectors * self.inverse[..., None, :]


class Bases(NamedTuple):
    """The bases of both factors of K pairs."""

    A: RowBasis
    B: RowBasis  # of B transposed


def row_basis(factor: Tensor, rtol: float | None = None) -> RowBasis:
    """The basis of one factor `(..., r, k)`, see `row_bases`."""
    return row_bases([factor], rtol)[0]


def row_bases(factors: Sequence[Tensor], rtol: float | None = None) -> list[RowBasis]:
    """The bases of factors `(..., r, k)`, from one eigendecomposition for all with the same r and device.

    Args:
        factors: float32 or float64.
        rtol: directions whose squared singular value is at most `rtol` times the largest count as absent. Default:
            `max(r * eps(dtype), max(r, k) * eps(Gram dtype))`.

    Returns:
        The bases. They are NaN for a factor that holds NaN or Inf: a check would wait for the device.
    """
    grams = [_gram(factor) for factor in factors]
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, gram in enumerate(grams):
        alike.setdefault((gram.shape[-1], gram.dtype, gram.device), []).append(index)
    bases: dict[int, RowBasis] = {}
    for indices in alike.values():
        flat = [grams[index].flatten(0, -3) if grams[index].dim() > 2 else grams[index][None] for index in indices]
        eigenvalues, vectors = symmetric_eigh(torch.cat(flat))
        sizes = [len(gram) for gram in flat]
        for index, values, of_factor in zip(indices, eigenvalues.split(sizes), vectors.split(sizes), strict=True):
            shape = grams[index].shape
            bases[index] = _basis(factors[index], values.view(shape[:-1]), of_factor.view(shape), rtol)
    return [bases[index] for index in range(len(factors))]


def _gram(factor: Tensor) -> Tensor:
    # A Gram matrix squares the condition number: float64 keeps the precision of float32 factors.
    exact = factor.to(torch.float64 if factor.device.type != "mps" else torch.float32)
    return exact @ exact.mT


def _basis(factor: Tensor, eigenvalues: Tensor, vectors: Tensor, rtol: float | None) -> RowBasis:
    r, k = factor.shape[-2:]
    if rtol is None:
        rtol = max(r * torch.finfo(factor.dtype).eps, max(r, k) * torch.finfo(eigenvalues.dtype).eps)
    smallest = (1 / torch.finfo(factor.dtype).max) ** 2  # below it the inverse is infinite
    present = ~(eigenvalues <= (rtol * eigenvalues[..., -1:]).clamp_min(smallest))  # NaN is no absent direction
    singular = torch.where(present, eigenvalues, 0).sqrt()
    inverse = torch.where(present, 1 / singular, 0).to(factor.dtype)
    vectors = vectors.to(factor.dtype)
    return RowBasis(vectors, singular.to(factor.dtype), inverse, (vectors * inverse[..., None, :]).mT @ factor)
