r"""Which directions do the factors span, and what is a gradient in these directions?

A factor is given by its rows, `F` `(r, k)`: A as it is, B transposed. The eigenvectors of its r x r Gram matrix give
`F = U Σ F̂`, where the rows of F̂ are orthonormal. Directions that are absent (a B of zeros, a rank-deficient factor)
have zeros in Σ, in its inverse and in F̂, so that later computations need no special case for them.

With `B = B̂ Σ Uᵀ` and `A = V T Â` the gradients of the factors become `a = B̂ᵀ g`, `b = g Âᵀ` and their common core
`c = B̂ᵀ g Âᵀ`. Either factor can move the core, and X is the fraction ω of it that B moves:

    h_A = s⁻¹ U Σ⁻¹ [a − (ω∘c) Â]        h_B = s⁻¹ [(I − B̂B̂ᵀ) b + B̂ (ω∘c)] T⁻¹ Vᵀ

with `ω = 0` for X = 0, `½` for the symmetric choice and `τⱼ² / (σᵢ² + τⱼ²)` for the Sylvester one. Every intermediate
is of the size of `g`, whatever the scale of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorapro_hf.kernels.dense import has_triton

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


class Coordinates(NamedTuple):
    """An equivalent gradient `B̂ a + b Â` in the bases of its factors, rows along the last dimension."""

    a: Tensor  # (K, r, n), `B̂ᵀ g`
    b: Tensor  # (K, r, m), the transpose of `(I − P_B) g Âᵀ`


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


def symmetric_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of symmetric positive semidefinite matrices `(K, r, r)`.

    On CUDA a Triton kernel decomposes them while the host goes on, for r up to its `MAX_RANK`. Otherwise
    `torch.linalg.eigh` does, whose report of failures the host waits for on CUDA. A matrix that holds NaN or Inf gets
    NaN.
    """
    if matrices.device.type == "cuda" and has_triton():
        from lorapro_hf.kernels.triton_eigh import MAX_RANK
        from lorapro_hf.kernels.triton_eigh import symmetric_eigh as triton_eigh

        if matrices.shape[-1] <= MAX_RANK:
            return triton_eigh(matrices)
    # Given NaN or Inf, LAPACK fails for the whole batch or returns arbitrary values, depending on r.
    is_finite = matrices.isfinite().flatten(1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(is_finite[:, None, None], matrices, 0))
    nan = float("nan")
    return torch.where(is_finite[:, None], values, nan), torch.where(is_finite[:, None, None], vectors, nan)


def gradient_coordinates(
    basis_A: RowBasis, basis_B: RowBasis, grad_A: Tensor, grad_B: Tensor, scaling: float | Tensor = 1.0
) -> Coordinates:
    """The equivalent gradient closest to g, as far as the factor gradients determine it, in the bases of the factors.

    Args:
        basis_A: of A `(K, r, n)`.
        basis_B: of B transposed, `(K, r, m)`.
        grad_A: `s Bᵀ g` `(K, r, n)`.
        grad_B: the transpose of `s g Aᵀ`, `(K, r, m)`.
        scaling: s, a number or `(K, 1, 1)`.
    """
    a = (basis_B.whitening / scaling).mT @ grad_A
    b = (basis_A.whitening / scaling).mT @ grad_B
    return Coordinates(a, outside_(b, basis_B))


def coordinate_norms(bases: Bases, coordinates: Coordinates) -> tuple[Tensor, Tensor, Tensor]:
    """The norms of both coordinates and of their common core `a Âᵀ`, `(K,)` each."""
    a, b = coordinates
    of_a, of_b, of_core = (torch.linalg.vector_norm(x, dim=(-2, -1)) for x in (a, b, a @ bases.A.rows.mT))
    return of_a, of_b, of_core


def outside_(rows: Tensor, basis: RowBasis) -> Tensor:
    """The part of `rows` `(K, r, k)` that is orthogonal to a basis; overwrites them."""
    return rows.baddbmm_(rows @ basis.rows.mT, basis.rows, alpha=-1)


def factor_gradients_(
    basis_A: RowBasis, basis_B: RowBasis, coordinates: Coordinates, scaling: float | Tensor = 1.0, x_mode: str = "zero"
) -> tuple[Tensor, Tensor]:
    """Factor gradients `h_A` `(K, r, n)` and `h_B`, transposed `(K, r, m)`; overwrites the coordinates."""
    a, b = coordinates
    core_of_B = _core_fraction_of_B(basis_A, basis_B, x_mode) * (a @ basis_A.rows.mT)
    h_A = (basis_B.whitening / scaling) @ a.baddbmm_(core_of_B, basis_A.rows, alpha=-1)
    h_B = (basis_A.whitening / scaling) @ b.baddbmm_(core_of_B.mT, basis_B.rows)
    return h_A, h_B


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of projections and moments: float32, or float64 for float64 tensors."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


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


def _core_fraction_of_B(basis_A: RowBasis, basis_B: RowBasis, x_mode: str) -> Tensor | float:
    """The fraction ω `(..., r, r)` of the core that B moves; A moves the rest."""
    if x_mode == "zero":
        return 0.0
    if x_mode == "symmetric":
        return 0.5
    tau, sigma = basis_A.singular[..., None, :], basis_B.singular[..., None]
    # hypot keeps tiny factors from underflowing when squared; where both are absent the core is zero anyway.
    length = torch.hypot(tau, sigma)
    return torch.where(length > 0, tau / length, 0) ** 2
