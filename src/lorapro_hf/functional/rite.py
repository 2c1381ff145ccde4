r"""How does LoRA-RITE step: Adam with matrix second moments, the same for every split of `B A`?

LoRA-RITE (arXiv 2410.20625) writes `B = B̂ R_B` and `Aᵀ = Âᵀ R_A` with orthonormal columns and takes each factor's
gradient without the magnitude of the other factor, `ḡ_A = ∂L/∂Aᵀ R_B⁻¹` and `ḡ_B = ∂L/∂B R_A⁻¹`:

    V ← β V + (1 − β) ḡᵀḡ / rows        M ← β M + (1 − β) ḡ (V + ρ)^(-1/2)        ΔAᵀ = −γ M_A R_B⁻ᵀ

with decays that hold the bias correction, `β_t = β (1 − β^(t−1)) / (1 − β^t)`. After a step V and M follow the bases by
`P = B̂'ᵀ B̂`. The bases here are the polar factors, which are unique, so that they need not be kept. The length of a step
does not depend on s, as in the paper: published learning rates carry over.

Rows layout as in `lorapro_hf.functional.factored`: M is `(K, r, length)` and V `(K, r, r)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorapro_hf.functional.bases import Bases, Coordinates, RowBasis, coordinate_norms, row_bases, symmetric_eigh
from lorapro_hf.functional.factor_steps import linear_step, select
from lorapro_hf.functional.step_options import StepOptions


class RiteState(NamedTuple):
    """The moments of K pairs in the polar coordinates of their factors, zeros at first."""

    M_A: Tensor  # (K, r, n), in the dtype of the factors
    M_B: Tensor  # (K, r, m)
    V_A: Tensor  # (K, r, r), float64 where the device has it: its square root is inverted
    V_B: Tensor  # (K, r, r)
    steps: Tensor  # (K,)
    escape_A: Tensor | None = None  # (K,), in the dtype of V; `None` without an escape
    escape_B: Tensor | None = None


@dataclass(frozen=True)
class RiteGuards:
    """What holds back large gradients.

    Args:
        clip: the largest norm of all ḡ together; 0 for no limit.
        skip: an ḡ with a root mean square above it counts as zero; 0 for no limit.
        norm: 0-dim, that of all ḡ together, see `unmagnified_norms`. Needed for `clip`.
    """

    clip: float = 0.0
    skip: float = 0.0
    norm: Tensor | None = None


def unmagnified_norms(
    norms: tuple[Tensor, Tensor, Tensor], scaling: Tensor, shape: tuple[int, int, int], skip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The norms `(K,)` of ḡ_A and of ḡ_B, 0 for those that are skipped.

    Args:
        norms: those of the coordinates of the equivalent gradient and of their core, `(K,)` each.
        scaling: s of each pair, `(K,)`.
        shape: r, m and n.
        skip: as in `RiteGuards`.
    """
    (of_a, of_b, of_core), s, (r, m, n) = norms, scaling.abs(), shape
    return _unskipped(s * of_a, r * n, skip), _unskipped(s * torch.hypot(of_b, of_core), r * m, skip)


def _unskipped(norm: Tensor, count: int, skip: float) -> Tensor:
    return torch.where(norm > skip * count**0.5, 0, norm) if skip else norm


@torch.no_grad()
def rite_step(
    A: Tensor,
    Bt: Tensor,
    bases: Bases,
    gradient: Coordinates,
    scaling: Tensor,
    state: RiteState,
    guards: RiteGuards,
    options: StepOptions,
) -> tuple[Tensor, Tensor]:
    """One step of K pairs; updates `state` in place and returns the new A and B, transposed.

    Costs O((m + n) r² + r³) and waits for no value. Gradients of pairs that are not active may hold NaN or Inf.

    Args:
        A: `(K, r, n)`, float32 or float64.
        Bt: `(K, r, m)`, B transposed.
        bases: of both factors, `Bases(*row_bases([A, Bt], rtol))`.
        gradient: the equivalent gradient, from `gradient_coordinates`.
        scaling: s of each pair, `(K,)`.
        state: the moments, and the steps of each pair with this one counted in.
        guards: against large gradients.
        options: see `StepOptions`; the step is linear.
    """
    a, b = gradient
    shape = (a.shape[-2], b.shape[-1], a.shape[-1])
    norms = unmagnified_norms(coordinate_norms(bases, gradient), scaling, shape, guards.skip)
    clipped = torch.ones_like(scaling)
    if guards.clip:
        assert guards.norm is not None
        clipped = (guards.clip / guards.norm.to(scaling)).clamp_max(1).expand_as(scaling)
    weights = [(torch.where(norm > 0, scaling, 0) * clipped)[:, None, None] for norm in norms]
    # Both ḡ in polar coordinates; b lacks the part of the gradient that lies in the column space of B.
    g_A = (weights[0] * bases.B.vectors) @ a
    g_B = (weights[1] * bases.A.vectors) @ torch.baddbmm(b, (a @ bases.A.rows.mT).mT, bases.B.rows)
    sides = _sides(state, bases)
    moved = [side.updated(g, state.steps, options) for side, g in zip(sides, (g_A, g_B), strict=True)]
    h_A, h_Bt = (side.magnified(new.M) for side, new in zip(sides, moved, strict=True))
    new_A, new_Bt = linear_step(A, Bt, h_A, h_Bt, options)
    after = Bases(*row_bases([new_A, new_Bt], options.rtol))
    for side, new, basis in zip(sides, moved, (after.B, after.A), strict=True):
        side.store(new.carried_to(basis), options.active)
    return new_A, new_Bt


def carry_rite_moments(state: RiteState, before: Bases, after: Bases) -> None:
    """Express the moments in the polar coordinates of other factors, in place; both bases as for `rite_step`."""
    for side, basis in zip(_sides(state, before), (after.B, after.A), strict=True):
        side.store(side.carried_to(basis), None)


class _Side(NamedTuple):
    """The moments of one factor, and the basis of the other, in whose polar coordinates they are."""

    M: Tensor
    V: Tensor
    escape: Tensor | None
    basis: RowBasis

    def updated(self, g: Tensor, steps: Tensor, options: StepOptions) -> _Side:
        """The moments with ḡ counted in."""
        beta1, beta2 = (_bias_corrected(beta, steps.to(self.V)) for beta in options.betas)
        exact = g.to(self.V)
        V = torch.lerp(exact @ exact.mT / g.shape[-1], self.V, beta2[:, None, None])
        escape = None if self.escape is None else beta2 * self.escape
        preconditioned = _inverse_root(V, escape, options.eps).to(g) @ g
        return self._replace(M=torch.lerp(preconditioned, self.M, beta1[:, None, None].to(g)), V=V, escape=escape)

    def magnified(self, M: Tensor) -> Tensor:
        """`R⁻¹ M`, the direction of the factor."""
        return (self.basis.whitening @ self.basis.vectors.mT) @ M

    def carried_to(self, new: RowBasis) -> _Side:
        """The moments in the polar coordinates of another basis; the escape counts the second moment lost."""
        P = new.vectors @ (new.rows @ self.basis.rows.mT) @ self.basis.vectors.mT
        exact = P.to(self.V)
        V = exact @ self.V @ exact.mT
        escape = self.escape if self.escape is None else self.escape + _lost(self.V, V)
        return _Side(P @ self.M, V, escape, new)

    def store(self, new: _Side, active: Tensor | None) -> None:
        """Copy the moments of `new` here, for the active pairs."""
        for kept, value in zip(self[:3], new[:3], strict=True):
            if kept is not None and value is not None:
                kept.copy_(select(active, value[:, None], kept[:, None]).squeeze(1))


def _sides(state: RiteState, bases: Bases) -> tuple[_Side, _Side]:
    """Both sides, each in the coordinates of the other factor."""
    of_A = _Side(state.M_A, state.V_A, state.escape_A, bases.B)
    return of_A, _Side(state.M_B, state.V_B, state.escape_B, bases.A)


def _bias_corrected(beta: float, steps: Tensor) -> Tensor:
    """`β (1 − β^(t−1)) / (1 − β^t)` for t from 1 on: a moment that is 0 before needs no other correction."""
    rate = math.log(beta) if beta > 0 else -math.inf
    t = steps.clamp_min(1)
    return beta * torch.expm1((t - 1) * rate).nan_to_num(0.0) / torch.expm1(t * rate)


def _inverse_root(V: Tensor, escape: Tensor | None, eps: float) -> Tensor:
    """`(V + ρ)^(-1/2)` with the guards against division by zero of the reference."""
    values, vectors = symmetric_eigh((V + V.mT) / 2)
    values = values.clamp_min(0) + eps**2
    if escape is not None:
        values = values + escape[:, None]
    return (vectors / (values.sqrt() + eps)[:, None]) @ vectors.mT


def _lost(old: Tensor, new: Tensor) -> Tensor:
    """How much second moment `(K,)` a change of the bases has lost: in its trace, or in one eigenvalue if less."""
    values = [symmetric_eigh((V + V.mT) / 2)[0] for V in (old, new)]
    of_eigenvalue = (values[0] - values[1]).amax(-1).clamp_min(0)
    of_trace = (old - new).diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)
    return torch.minimum(of_eigenvalue, of_trace)
