r"""How does a step move the factors: both at once along projected gradients, or one after the other along u?

`linear_step` moves both at once along `h_A`, `h_B`, by `−γ s (B h_A + h_B A) + γ² s h_B h_A`. Right after B = 0 the
last term is as large as the others. `sequential_step` has no such term: B moves first, and A moves along the rest of
the direction u `(m, n)`, seen through the new B:

    B' = B − γ/s · u Aᵀ (AAᵀ)⁺        A' = A − γ/s · (B'ᵀB')⁺ B'ᵀ u (I − P_A)

This gives exactly, not to first order, `s (B'A' − BA) = −γ [u P_A + P_B' u (I − P_A)]`: the best that two factors can
do for u once B' has its column space, and never longer than γ u. X plays no role. From B = 0 the weight moves by
`−γ P_B' u` with `col(B') = col(u Aᵀ)`, a low-rank approximation of u sketched by A.

Computation: `û = u Âᵀ` and `w = B̂'ᵀ u` in the orthonormal bases of A and B' are of the size of u whatever the scale of
the factors, and `ΔB = −γ/s û T⁻¹ Vᵀ`, `ΔA = −γ/s U' Σ'⁻¹ w (I − ÂᵀÂ)`. Absent directions have a zero in T⁻¹ or Σ'⁻¹,
so rank-deficient and zero factors need no case of their own.

Where `StepOptions.longest` is given, the changes of both factors are multiplied by the fraction that keeps the step of
the weight within it, see `lorapro_hf.functional.step_limit`. In a sequential step P_B' is that of the whole ΔB.

All tensors are in rows layout, with B transposed, and all float32 or all float64. Steps allocate nothing larger than
the factors and wait for no value.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lorapro_hf.functional.bases import Bases, RowBasis, row_bases, row_basis
from lorapro_hf.functional.step_limit import kept_fraction
from lorapro_hf.functional.step_options import StepOptions
from lorapro_hf.kernels.dense import DirectionProducts

REACH = 0.5  # about the length of a row of PEFT's initial A, 1 / √3


class Direction(Protocol):
    """A step direction u `(K, m, n)`, known by its products."""

    def through_A(self, weights: Tensor) -> Tensor:
        """`weights (u Âᵀ)ᵀ` `(K, r, m)` for weights `(K, r, r)`; the columns of Âᵀ are the basis of A."""
        ...

    def rest_through_B(self, weights: Tensor, basis_B: RowBasis) -> Tensor:
        """`weights B̂ᵀ u (I − P_A)` `(K, r, n)` for weights `(K, r, r)` and a basis of B."""
        ...


class SequentialStep(NamedTuple):
    """The factors after a step."""

    A: Tensor  # (K, r, n)
    Bt: Tensor  # (K, r, m)
    basis_B: RowBasis | None  # of the new B, `None` if the step was limited

    def bases(self, rtol: float | None) -> Bases:
        """The bases of the new factors."""
        if self.basis_B is None:
            return Bases(*row_bases([self.A, self.Bt], rtol))
        return Bases(row_basis(self.A, rtol), self.basis_B)


@torch.no_grad()
def sequential_step(
    A: Tensor, Bt: Tensor, products: DirectionProducts, scaling: float | Tensor, bases: Bases, options: StepOptions
) -> SequentialStep:
    """The factors after a sequential step along a direction u that is known by its products with their bases.

    Args:
        A: `(K, r, n)`, before its decay.
        Bt: `(K, r, m)`, before its decay.
        products: of u with the rows of the bases; `K_u` is required.
        scaling: s in `W = W0 + s B A`; a number, a 0-dim tensor, or a tensor `(K,)`.
        bases: `row_basis(A, rtol)` and `row_basis(Bt, ALL_DIRECTIONS)`: a direction of B that is too small to be
            projected on is part of B' all the same, and this step may make it large enough.
        options: see `StepOptions`.

    Returns:
        The new factors. Without a limit, `s (B'A' − BA)` with the decayed B, A is
        `−[lr_B u P_A + lr_A P_B' u (I − P_A)]`. A follows the directions of the new B as it is stored; its products
        with u are those of B before rounding.
    """
    rates = options.rates
    moved = per_pair(rates.lr_B, A) * _reciprocal(per_pair(scaling, A) * per_pair(rates.keep_A, A))
    # The product of u with the new B, by linearity: B' = B − moved K T⁻¹Vᵀ.
    through_B = (per_pair(rates.keep_B, A) * bases.B.vectors * bases.B.singular[:, None]) @ products.B_u
    assert products.K_u is not None
    through_B = through_B.baddbmm_(moved * bases.A.whitening, products.K_u, alpha=-1)
    return spend_direction(A, Bt, _Products(products.u_A, through_B, bases.A), scaling, bases.A, options)


@torch.no_grad()
def spend_direction(
    A: Tensor, Bt: Tensor, direction: Direction, scaling: float | Tensor, basis_A: RowBasis, options: StepOptions
) -> SequentialStep:
    """The factors after a sequential step along a direction that can be multiplied by any rows; see `sequential_step`.

    This is more accurate where u itself is at hand in some form: no product with the singular values of B' has to be
    divided by them again. `basis_A` is `row_basis(A, rtol)`. The products of A with u, too, are those of the B that is
    stored.
    """
    rates, s = options.rates, per_pair(scaling, A)
    moved = per_pair(rates.lr_B, A) * _reciprocal(s * per_pair(rates.keep_A, A))
    step_B = direction.through_A(-moved * basis_A.whitening)
    longest, (dtype_A, dtype_B) = options.longest, options.factor_dtypes
    new_Bt = settle(Bt, step_B if longest is None else step_B.clone(), rates.keep_B, options.active, dtype_B)
    basis_B = row_basis(new_Bt, options.rtol)
    step_A = direction.rest_through_B(-per_pair(rates.lr_A, A) / s * basis_B.whitening, basis_B)
    if longest is not None:
        kept = kept_fraction(A, Bt, step_A, step_B, longest)
        step_A *= kept
        new_Bt = settle(Bt, step_B.mul_(kept), rates.keep_B, options.active, dtype_B)
    new_A = settle(A, step_A, rates.keep_A, options.active, dtype_A)
    return SequentialStep(new_A, new_Bt, basis_B if longest is None else None)


@torch.no_grad()
def linear_step(A: Tensor, Bt: Tensor, h_A: Tensor, h_Bt: Tensor, options: StepOptions) -> tuple[Tensor, Tensor]:
    """The factors after a step from A, Bt, before their decay, along `h_A` and `h_Bt`, which are overwritten."""
    rates = options.rates
    step_A, step_Bt = h_A.mul_(-per_pair(rates.lr_A, A)), h_Bt.mul_(-per_pair(rates.lr_B, A))
    if options.longest is not None:
        kept = kept_fraction(A, Bt, step_A, step_Bt, options.longest)
        step_A, step_Bt = step_A.mul_(kept), step_Bt.mul_(kept)
    return (
        settle(A, step_A, rates.keep_A, options.active, options.factor_dtypes[0]),
        settle(Bt, step_Bt, rates.keep_B, options.active, options.factor_dtypes[1]),
    )


def change_through(change: Tensor, Bt: Tensor, basis_B: RowBasis) -> Tensor:
    """`B'⁺ B change` `(K, r, n)`: the change of A that moves `B'A` as `change` moves `BA`, as far as B' can.

    With it, and B going to B', `s (B'A' − BA) = s [P_B' B change + (B' − B) A]`: no product of two changes. From B = 0
    nothing is asked of A. Where B' has long outgrown the B that `change` was made for, A moves the less, the larger B'
    is beside B.

    Args:
        change: `(K, r, n)`.
        Bt: `(K, r, m)`, the transpose of the B that the change was made for.
        basis_B: `row_basis` of the transpose of B'.
    """
    return (basis_B.whitening @ (basis_B.rows @ Bt.mT)) @ change


def lengthened(change: Tensor, basis_B: RowBasis, lr: float | Tensor) -> Tensor:
    """`(I + ρ² (BᵀB + n γ²)⁻¹)^½ change` `(K, r, n)`, with ρ = `REACH`.

    A change of A moves the weight through B: not at all at B = 0, and hardly while B is small. Lengthened, it acts as
    through singular values `√(σ² + ρ²)` in the place of σ. Where B has outgrown ρ it stays as it is. The elements of
    AdamW's changes are of size γ, so that the second term keeps each direction of a change shorter than about ρ.

    Args:
        change: `(K, r, n)`.
        basis_B: `row_basis` of the transpose of B.
        lr: the learning rate γ of A.
    """
    rate = per_pair(lr, change)
    squares = basis_B.singular[..., None, :].square() + change.shape[-1] * rate * rate
    factors = (1 + REACH**2 / squares.clamp_min(torch.finfo(change.dtype).tiny)).sqrt()
    return (basis_B.vectors * factors) @ (basis_B.vectors.mT @ change)


def settle(
    factor: Tensor, step: Tensor, keep: float | Tensor, active: Tensor | None, factor_dtype: torch.dtype | None
) -> Tensor:
    """`keep * factor + step` as it will be stored, or `factor` where the pair is not active; overwrites `step`."""
    keep = per_pair(keep, factor)
    new = step.addcmul_(factor, keep) if isinstance(keep, Tensor) else step.add_(factor, alpha=keep)
    if factor_dtype is not None and factor_dtype != new.dtype:
        new = new.to(factor_dtype).to(new.dtype)
    return select(active, new, factor)


def select(active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` `(K, ...)` where bool `(K,)` is True and `old` where it is False, to the bit, whatever the other holds."""
    if active is None:
        return new
    of_new, of_old = new.flatten(1), old.flatten(1)
    if new.device.type == "cpu" and _is_wide(of_new) and _is_wide(of_old):
        # On the CPU torch.where goes element by element, which takes three times as long as an addition.
        of_new, of_old = of_new.view(torch.complex128), of_old.view(torch.complex128)
    return torch.where(active[:, None], of_new, of_old).view(new.dtype).view(new.shape)


def per_pair(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or a tensor that broadcasts over `(K, r, length)`."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(like)
    return value[..., None, None] if value.dim() else value


class _Products(NamedTuple):
    """A direction known by its products with the factors."""

    u_A: Tensor
    B_u: Tensor  # (K, r, n), B'ᵀ u with the new B
    basis_A: RowBasis

    def through_A(self, weights: Tensor) -> Tensor:
        return weights @ self.u_A

    def rest_through_B(self, weights: Tensor, basis_B: RowBasis) -> Tensor:
        # From right to left: the product of the two small matrices would square the condition number of B'.
        through = weights @ (basis_B.whitening.mT @ self.B_u)
        return through - (through @ self.basis_A.rows.mT) @ self.basis_A.rows


def _reciprocal(value: float | Tensor) -> float | Tensor:
    """1 / value, and 0 for 0: a factor that decays to nothing leaves no direction to move along."""
    if isinstance(value, Tensor):
        return torch.where(value != 0, 1 / value, 0)
    return 1 / value if value else 0.0


def _is_wide(tensor: Tensor) -> bool:
    """Whether rows can be viewed as words of 16 bytes."""
    words = 16 // tensor.element_size()
    return (
        tensor.is_contiguous()
        and tensor.numel() > 0
        and tensor.shape[1] % words == 0
        and tensor.storage_offset() % words == 0
    )
