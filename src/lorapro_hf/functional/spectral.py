r"""How does a step orthogonalise its direction in the tangent space of the factors?

The momentum `N = B̂ N_a + N_b Â` of the equivalent gradient is replaced by its polar factor `msign(N) = U Vᵀ`, all of
whose singular values are one, and that by its projection `u = P_T(msign N)` on the tangent space, which the factors can
follow (LoRA-TSD, arXiv 2609.02734). Rows layout as in `lorapro_hf.functional.factored`, which keeps the same first
moment; there is no second one.

With bases `Q_a` of the rows of `N_a (I − P_A)` and `Q_b` of the columns of `N_b`, both polar factor and projection
happen in a core of 2r x 2r:

    N = [B̂ Q_b] [[C, S_a], [S_b, 0]] [Â; Q_a]        P_T sets the lower right block to zero
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorapro_hf.functional.bases import Bases, Coordinates, RowBasis, factor_gradients_, row_bases, row_basis
from lorapro_hf.functional.factor_steps import linear_step, per_pair, select, spend_direction
from lorapro_hf.functional.factored import transport
from lorapro_hf.functional.step_options import StepOptions

LENGTH = 0.2  # times the root of the longer side: a step of Adam's length for a weight, as in Muon


class SpectralDirection(NamedTuple):
    """K directions `u = B̂ (X Â + Y) + b Â` of shape (m, n) that are never formed, with `Y Âᵀ = 0` and `b ⟂ B̂`."""

    core: Tensor  # (K, r, r), X
    Y: Tensor  # (K, r, n)
    b: Tensor  # (K, r, m), transposed
    bases: Bases

    @property
    def coordinates(self) -> Coordinates:
        """The coordinates of u in its bases, as new tensors."""
        return Coordinates(torch.baddbmm(self.Y, self.core, self.bases.A.rows), self.b.clone())

    def through_A(self, weights: Tensor) -> Tensor:
        """`weights (u Âᵀ)ᵀ` `(K, r, m)` for weights `(K, r, r)`."""
        return weights @ torch.baddbmm(self.b, self.core.mT, self.bases.B.rows)

    def rest_through_B(self, weights: Tensor, basis_B: RowBasis) -> Tensor:
        """`weights B̂'ᵀ u (I − P_A)` `(K, r, n)` for weights `(K, r, r)` and any basis B̂' of B."""
        return (weights @ (basis_B.rows @ self.bases.B.rows.mT)) @ self.Y


class SpectralState(NamedTuple):
    """The first moments of K pairs in the tangent space, float32 or float64 like the factors."""

    M_a: Tensor  # (K, r, n): B̂ᵀ M
    M_b: Tensor  # (K, r, m): ((I − P_B) M Âᵀ)ᵀ


@torch.no_grad()
def spectral_step(
    A: Tensor,
    Bt: Tensor,
    bases: Bases,
    gradient: Coordinates,
    scaling: float | Tensor,
    state: SpectralState,
    options: StepOptions,
    iterations: int = 1,
) -> tuple[Tensor, Tensor]:
    """One orthogonalised step of K pairs; updates `state` in place and returns the new A and B, transposed.

    Costs O((m + n) r² + r³), allocates nothing larger than twice the factors, and waits for no value. Gradients of
    pairs that are not active may hold NaN or Inf.

    Args:
        A: `(K, r, n)`, float32 or float64 like all tensors here.
        Bt: `(K, r, m)`, B transposed.
        bases: of both factors, `Bases(*row_bases([A, Bt], rtol))`.
        gradient: the equivalent gradient, from `gradient_coordinates`.
        scaling: s in `W = W0 + s B A`; a number, a 0-dim tensor, or a tensor `(K,)`.
        state: the moments, zeros at first.
        options: see `StepOptions`; the second beta and `eps` play no role.
        iterations: how often polar factor and projection are repeated.
    """
    beta = options.betas[0]
    a = torch.baddbmm(gradient.a, bases.B.vectors.mT, state.M_a, beta=1 - beta, alpha=beta)
    b = torch.baddbmm(gradient.b, bases.A.vectors.mT, state.M_b, beta=1 - beta, alpha=beta)
    ahead = Coordinates(torch.lerp(gradient.a, a, beta), torch.lerp(gradient.b, b, beta))  # Nesterov's momentum
    u = spectral_direction(ahead, bases, options.rtol, iterations)
    if options.sequential:
        step = spend_direction(A, Bt, u, scaling, bases.A, options)
        new_A, new_Bt, new = step.A, step.Bt, step.bases(options.rtol)
    else:
        h_A, h_Bt = factor_gradients_(*bases, u.coordinates, per_pair(scaling, A), options.x_mode)
        del u, ahead
        new_A, new_Bt = linear_step(A, Bt, h_A, h_Bt, options)
        new = Bases(*row_bases([new_A, new_Bt], options.rtol))
    left, right = torch.cat([bases.B.rows, b], dim=-2), torch.cat([a, bases.A.rows], dim=-2)
    for kept, moment in zip(state, transport(left, right, new), strict=True):
        kept.copy_(select(options.active, moment, kept))
    return new_A, new_Bt


def spectral_direction(
    momentum: Coordinates, bases: Bases, rtol: float | None = None, iterations: int = 1
) -> SpectralDirection:
    """`0.2 √max(m, n) P_T(msign(N))` of a momentum N in the tangent space, in the coordinates of the bases.

    Args:
        momentum: `a` `(K, r, n)` and `b` `(K, r, m)`, with b orthogonal to the basis of B.
        bases: of the factors.
        rtol: squared singular values of N up to this fraction of the largest count as absent. Default: those that
            rounding in the dtype of N could have made.
        iterations: as in `spectral_step`.
    """
    a, b = momentum
    r = a.shape[-2]
    if rtol is None:
        # The length of a singular vector does not depend on its value, so that small values count as much as large ones
        # and only rounding may be cut off; bases of factors, which divide by them, have to cut off more.
        rtol = max((2 * r * torch.finfo(a.dtype).eps) ** 2, 2 * r * torch.finfo(torch.float64).eps)
    core = a @ bases.A.rows.mT
    outside = torch.baddbmm(a, core, bases.A.rows, alpha=-1)
    of_a, of_b = row_bases([outside, b], rtol)
    left = torch.cat([core, (of_b.vectors * of_b.singular[..., None, :]).mT], dim=-2)
    right = torch.cat([of_a.vectors * of_a.singular[..., None, :], torch.zeros_like(core)], dim=-2)
    N = torch.cat([left, right], dim=-1)
    for _ in range(iterations):
        polar = row_basis(N, rtol)
        N = polar.vectors @ polar.rows
        N[..., r:, r:].zero_()
    N = N * (LENGTH * max(a.shape[-1], b.shape[-1]) ** 0.5)
    return SpectralDirection(N[..., :r, :r], N[..., :r, r:] @ of_a.rows, N[..., r:, :r].mT @ of_b.rows, bases)
