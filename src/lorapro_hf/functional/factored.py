r"""How does AdamW on the equivalent gradient work without storing or forming anything of the size of the weight?

Rows layout: every factor-size quantity of K pairs is `(K, r, length)`, with B transposed. The first moment stays in the
tangent space of the factors, `M = B̂ M_a + M_b Â` with `B̂ᵀ M_b = 0`, and is projected onto that of the new factors at
the end of each step. `B̂ = B (BᵀB)^(+1/2)` and `Â = (AAᵀ)^(+1/2) A` are the polar factors: unlike singular vectors they
are unique, so that a state means the same wherever it is loaded. The second moment is the outer product of the exact
row and column means of g̃∘g̃. The derivation is in `docs/factored.md`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lorapro_hf.functional.bases import Bases, Coordinates, RowBasis, factor_gradients_, row_bases
from lorapro_hf.functional.factor_steps import linear_step, per_pair, select, spend_direction
from lorapro_hf.functional.step_options import StepOptions


class FactoredState(NamedTuple):
    """Moments of K pairs; float32 or float64 like the factors, but for the steps, which are float32."""

    M_a: Tensor  # (K, r, n): B̂ᵀ M
    M_b: Tensor  # (K, r, m): ((I − P_B) M Âᵀ)ᵀ
    column: Tensor  # (K, n): average of the column means of g̃∘g̃
    row: Tensor  # (K, m): average of its row means
    steps: Tensor  # (K,)


class AdamDirection(NamedTuple):
    """K directions `u = diag(row) leftᵀ right diag(column)` of shape (m, n) that are never formed."""

    left: Tensor  # (K, 2r, m), B̂ᵀ and M_bᵀ
    right: Tensor  # (K, 2r, n), M_a and Â
    row: Tensor  # (K, 1, m)
    column: Tensor  # (K, 1, n)
    A: Tensor  # (K, r, n), Â
    inner: Tensor  # (K, r, 2r), Â diag(column) rightᵀ

    def through_A(self, weights: Tensor) -> Tensor:
        """`weights (u Âᵀ)ᵀ` `(K, r, m)` for weights `(K, r, r)`."""
        return ((weights @ self.inner) @ self.left).mul_(self.row)

    def rest_through_B(self, weights: Tensor, basis_B: RowBasis) -> Tensor:
        """`weights B̂ᵀ u (I − P_A)` `(K, r, n)` for weights `(K, r, r)` and any basis of B."""
        through = weights @ self._through_B(basis_B)
        outside = (through @ self.right).mul_(self.column)
        return outside.baddbmm_(through @ self.inner.mT, self.A, alpha=-1)

    def coordinates(self, basis_B: RowBasis) -> Coordinates:
        """The coordinates of the part of u that the factors can follow, in the basis of A and this one of B."""
        a = (self._through_B(basis_B) @ self.right).mul_(self.column)
        b = (self.inner @ self.left).mul_(self.row)
        return Coordinates(a, b.baddbmm_(b @ basis_B.rows.mT, basis_B.rows, alpha=-1))

    def _through_B(self, basis_B: RowBasis) -> Tensor:
        return (basis_B.rows * self.row) @ self.left.mT


class FactoredStep(NamedTuple):
    """The factors after a step, in rows layout, and their bases, which the next step may start from."""

    A: Tensor
    Bt: Tensor
    bases: Bases


@torch.no_grad()
def factored_step(
    A: Tensor,
    Bt: Tensor,
    bases: Bases,
    gradient: Coordinates,
    scaling: float | Tensor,
    state: FactoredState,
    options: StepOptions,
) -> FactoredStep:
    """One AdamW step of K pairs with moments of O((m + n) r); updates `state` in place and returns the new factors.

    Costs O((m + n) r²), allocates nothing larger than twice the factors, and waits for no value. Gradients of pairs
    that are not active may hold NaN or Inf.

    Args:
        A: `(K, r, n)`, float32 or float64 like all tensors here.
        Bt: `(K, r, m)`, B transposed.
        bases: of both factors, by `row_bases`.
        gradient: the equivalent gradient, from `gradient_coordinates`.
        scaling: s in `W = W0 + s B A`; a number, a 0-dim tensor, or a tensor `(K,)`.
        state: the moments, zeros at first.
        options: `eps` is added to each root of a mean square; rows and columns without any gradient do not move even
            if it is 0.
    """
    moments = _updated(state, gradient, bases, options.betas)
    u = adam_direction(moments, bases, options.betas, options.eps)
    # The results of pairs that are not active are dropped before they meet an eigendecomposition.
    if options.sequential:
        step = spend_direction(A, Bt, u, scaling, bases.A, options)
        A, Bt, new = step.A, step.Bt, step.bases(options.rtol)
    else:
        h_A, h_Bt = factor_gradients_(*bases, u.coordinates(bases.B), per_pair(scaling, A), options.x_mode)
        A, Bt = linear_step(A, Bt, h_A, h_Bt, options)
        new = Bases(*row_bases([A, Bt], options.rtol))
    M_a, M_b = transport(u.left, u.right, new)
    _store(state, moments._replace(M_a=M_a, M_b=M_b), options.active)
    return FactoredStep(A, Bt, new)


def _updated(state: FactoredState, gradient: Coordinates, bases: Bases, betas: tuple[float, float]) -> FactoredState:
    """The moments with the gradient counted in; the first in the coordinates of the bases instead of the polar ones."""
    column, row = mean_squares(gradient, bases)
    beta1, beta2 = betas
    return FactoredState(
        torch.baddbmm(gradient.a, bases.B.vectors.mT, state.M_a, beta=1 - beta1, alpha=beta1),
        torch.baddbmm(gradient.b, bases.A.vectors.mT, state.M_b, beta=1 - beta1, alpha=beta1),
        state.column.lerp(column, 1 - beta2),
        state.row.lerp(row, 1 - beta2),
        state.steps + 1,
    )


def mean_squares(gradient: Coordinates, bases: Bases) -> tuple[Tensor, Tensor]:
    """The means of `g̃∘g̃` over each column `(K, n)` and over each row `(K, m)`, for `g̃ = B̂ a + b Â`."""
    (a, b), A, B = gradient, bases.A.rows, bases.B.rows
    # Both sums of squares are taken over orthogonal parts, so that no large terms cancel in them: g̃ = B̂ a + b Â by
    # columns, and g̃ = (g Âᵀ) Â + B̂ a (I − P_A) by rows.
    column = a.square().sum(-2) + ((b @ b.mT) @ A).mul_(A).sum(-2)
    core = a @ A.mT
    through_A = torch.baddbmm(b, core.mT, B)  # (g Âᵀ)ᵀ
    outside = torch.baddbmm(a @ a.mT, core, core.mT, alpha=-1)
    row = through_A.square_().sum(-2) + (outside @ B).mul_(B).sum(-2)
    return column.clamp_min_(0) / row.shape[-1], row.clamp_min_(0) / column.shape[-1]


def adam_direction(moments: FactoredState, bases: Bases, betas: tuple[float, float], eps: float) -> AdamDirection:
    """Adam's direction `u = M̂ / √V̂` with the second moment `V̂ = ρ̂ κ̂ᵀ / mean(κ̂)`, as a product of rank 2r.

    Each of the three roots gets its own eps, which keeps u a product: u = M̂ᵢⱼ (√mean + ε) / ((√ρ̂ᵢ + ε) (√κ̂ⱼ + ε)).
    That is Adam's own `M̂ / (√V̂ + ε)` where all entries are alike, and `M̂ / ε` where all are tiny. Where a denominator
    is zero u is zero.

    The moments have the step and its gradient counted in, with M_a and M_b in the coordinates of the bases.
    """
    grown_1, grown_2 = (_bias_correction(beta, moments.steps.to(moments.row))[:, None] for beta in betas)
    column, row = moments.column / grown_2, moments.row / grown_2
    overall = (column.mean(-1, keepdim=True).sqrt() + eps) / grown_1
    of_row, of_column = row.sqrt() + eps, column.sqrt() + eps
    by_row = torch.where(of_row > 0, 1 / of_row, 0)[:, None]
    by_column = torch.where(of_column > 0, overall / of_column, 0)[:, None]
    left = torch.cat([bases.B.rows, moments.M_b], dim=-2)
    right = torch.cat([moments.M_a, bases.A.rows], dim=-2)
    return AdamDirection(left, right, by_row, by_column, bases.A.rows, (bases.A.rows * by_column) @ right.mT)


def transport(left: Tensor, right: Tensor, new: Bases) -> tuple[Tensor, Tensor]:
    """Polar coordinates of the projection `P_B' M + (I − P_B') M P_A'` of a first moment `M = leftᵀ right`.

    `left` is `(K, k, m)`, `right` `(K, k, n)`; the results are `M_a'` `(K, r, n)` and `M_b'` `(K, r, m)`, transposed.
    """
    through_B = new.B.rows @ left.mT
    through_A = new.A.vectors @ (new.A.rows @ right.mT)
    # M Âᵀ' less its part in the new column space, B̂' (B̂'ᵀ M Âᵀ').
    M_b = (through_A @ left).baddbmm_(through_A @ through_B.mT, new.B.rows, alpha=-1)
    return (new.B.vectors @ through_B) @ right, M_b


def _bias_correction(beta: float, steps: Tensor) -> Tensor:
    """`1 − beta^t` without the cancellation that a power near 1 would bring."""
    return -torch.expm1(steps.clamp_min(1) * (math.log(beta) if beta > 0 else -math.inf))


def _store(state: FactoredState, new: FactoredState, active: Tensor | None) -> None:
    for kept, value in zip(state[:-1], new[:-1], strict=True):
        kept.copy_(select(active, value, kept))
    state.steps.add_(1 if active is None else active.to(state.steps))
