"""How far are two gradients, or two steps, of one weight from each other?

A low-rank matrix is given by its halves `left` `(m, k)` and `right` `(k, n)`. It is formed only to be compared with a
dense one, a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorapro_hf.factors.recording import row_blocks
from lorapro_hf.functional.bases import row_basis
from lorapro_hf.functional.projection import project_lora_gradients
from lorapro_hf.functional.step_limit import kept_fraction
from lorapro_hf.functional.step_options import Rates
from lorapro_hf.optim.rules.base import UpdateRule

_ROUNDING = 1e-7


class Halves(NamedTuple):
    """The matrix `left @ right`."""

    left: Tensor  # (m, k)
    right: Tensor  # (k, n)

    def rows(self, rows: slice) -> Tensor:
        """The given rows, as a dense matrix."""
        return self.left[rows] @ self.right

    def norm(self) -> float:
        """Its Frobenius norm, without cancellation between its parts."""
        triangles = [torch.linalg.qr(half.to(exact_dtype(half)), mode="r").R for half in (self.left, self.right.mT)]
        return float((triangles[0] @ triangles[1].mT).norm())


class Factors(NamedTuple):
    """The whole values and gradients of a pair."""

    A: Tensor  # (r, n)
    B: Tensor  # (m, r)
    grad_A: Tensor
    grad_B: Tensor
    scaling: float

    def own_gradient(self) -> Halves:
        """The direction in which plain LoRA's gradients move the weight, `s (B g_A + g_B A)`."""
        return equivalent_halves(self.A, self.B, self.grad_A, self.grad_B, self.scaling)

    def with_gradients(self, grad_A: Tensor, grad_B: Tensor) -> Factors:
        """The same pair with other gradients, in its dtype."""
        return self._replace(grad_A=grad_A.to(self.A), grad_B=grad_B.to(self.B))

    def equivalent_gradient(self, rtol: float | None = None) -> Halves:
        """The direction in which LoRA-Pro's gradients move the weight, as close to g as is possible."""
        h = project_lora_gradients(self.A, self.B, self.grad_A, self.grad_B, self.scaling, rtol=rtol)
        return equivalent_halves(self.A, self.B, *h, self.scaling)


def equivalent_halves(A: Tensor, B: Tensor, h_A: Tensor, h_B: Tensor, scaling: float) -> Halves:
    """`s (B h_A + h_B A)`."""
    return Halves(scaling * torch.cat([B, h_B], dim=1), torch.cat([h_A, A]))


def distance(g: Tensor, q: Halves) -> tuple[float, float, float]:
    """`‖g − q‖ / ‖g‖`, the same for the multiple of q that is closest to g, and the cosine between both.

    g `(m, n)` is not zero, and squares of the elements of both must be representable.
    """
    exact = exact_dtype(g)
    length, other = float(torch.linalg.vector_norm(g)), q.norm()
    if other == 0:
        return 1.0, 1.0, 0.0
    inner = float(((g @ q.right.mT).to(exact) * q.left).sum())
    gaps = [_distance_from(g, q, scale) / length for scale in (1.0, inner / other**2)]
    return gaps[0], gaps[1], inner / (length * other)


def _distance_from(g: Tensor, q: Halves, scale: float) -> float:
    """`‖g − scale · q‖`, in blocks of rows: a second matrix of the size of g would not fit into memory."""
    lengths = [
        torch.linalg.vector_norm(torch.addmm(g[rows], q.left[rows], q.right, alpha=-scale)) for rows in row_blocks(g)
    ]
    return float(torch.stack(lengths).to(exact_dtype(g)).norm())


class Fit(NamedTuple):
    """How well a pair's own gradients fit `s Bᵀ g` and `s g Aᵀ`, the gradients that g gives the factors.

    The scale between them undoes loss scaling, clipping, and the division of accumulated losses.
    """

    expected: tuple[Tensor, Tensor]  # by g: of A, of B
    own: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, g: Tensor, factors: Factors) -> Fit:
        """Of g `(m, n)` and a pair; in float64 where the device has it, as squares of tiny gradients underflow."""
        exact, s = exact_dtype(g), factors.scaling
        expected = (s * (factors.B.mT @ g).to(exact), s * (g @ factors.A.mT).to(exact))
        return cls(expected, (factors.grad_A.to(exact), factors.grad_B.to(exact)))

    def scale(self) -> float | None:
        """The factor to g that gives the best fit; `None` if a gradient is not finite, or all are zero."""
        inner = sum(float((e * f).sum()) for e, f in zip(*self, strict=True))
        square = sum(float(e.square().sum()) for e in self.expected)
        if not (math.isfinite(inner) and math.isfinite(square) and square > 0 and inner != 0):
            return None
        return inner / square

    def residual(self, scale: float) -> float:
        """The relative distance of the own gradients from `scale · expected`, the larger one of A's and B's.

        It is of the size of roundings if the factors' gradients are those of `scale · g`.
        """
        pairs = [(e, f) for e, f in zip(*self, strict=True) if bool(f.any())]
        return max(float((scale * e - f).norm() / f.norm()) for e, f in pairs)


def shared_scale(scales: Sequence[float], residuals: Sequence[float]) -> float:
    """The scale of all layers of a step: the mean of their own scales, weighted by `residual ** -2`.

    A layer whose factors saw g itself decides; if dropout has disturbed all layers, its noise averages out.
    """
    weights = [max(residual, _ROUNDING) ** -2 for residual in residuals]
    return sum(w * scale for w, scale in zip(weights, scales, strict=True)) / sum(weights)


def intended_step(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    new_B: Tensor,
    scaling: float,
    rates: Rates,
    rule: UpdateRule,
    longest: Tensor | None = None,
) -> tuple[Halves, float]:
    """The step of the weight that LoRA-Pro intends along Adam's direction u `(m, n)`, apart from weight decay.

    A `(r, n)` and B `(m, r)` are the values before the step, `new_B` the value after it; `longest` `(1,)` is that of
    `StepOptions`.

    Returns:
        the step, and the fraction that the trust region kept.
    """
    config, lr_A, lr_B = rule.config, float(rates.lr_A), float(rates.lr_B)
    if not rule.is_sequential:
        gradients = (scaling * (B.mT @ u), scaling * (u @ A.mT))
        h_A, h_B = project_lora_gradients(A, B, *gradients, scaling, x_mode=config.x_mode, rtol=config.rtol)
        step_A, step_B = -lr_A * h_A, -lr_B * h_B
        share = _share(A, B, step_A, step_B, longest)
        return equivalent_halves(A, B, share * step_A, share * step_B, scaling), share
    basis_A = row_basis(A, config.rtol)
    of_A, through_A = basis_A.rows, u @ basis_A.rows.mT
    if longest is not None:
        kept_A, kept_B = float(rates.keep_A) * A, float(rates.keep_B) * B
        step_B = -lr_B / (scaling * float(rates.keep_A)) * (through_A @ basis_A.whitening.mT)
        basis_B = row_basis((kept_B + step_B).mT.contiguous(), config.rtol)
        rest = basis_B.rows @ u - (basis_B.rows @ through_A) @ of_A
        step_A = -lr_A / scaling * (basis_B.whitening @ rest)
        share = _share(A, B, step_A, step_B, longest)
        if share < 1:
            step_A, step_B = share * step_A, share * step_B
            return equivalent_halves(kept_A, kept_B + step_B, step_A, step_B, scaling), share
    of_B = row_basis(new_B.mT.contiguous(), config.rtol).rows
    rest = of_B @ u - (of_B @ through_A) @ of_A
    return Halves(torch.cat([-lr_B * through_A, -lr_A * of_B.mT], dim=1), torch.cat([of_A, rest])), 1.0


def _share(A: Tensor, B: Tensor, step_A: Tensor, step_B: Tensor, longest: Tensor | None) -> float:
    """The fraction of a step that a trust region keeps."""
    if longest is None:
        return 1.0
    return float(kept_fraction(A[None], B.mT[None], step_A[None], step_B.mT[None], longest.to(A.device)))


def steps_between(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], scaling: float, rates: Rates
) -> tuple[Halves, Halves]:
    """The step of the weight from the decayed old values A, B to the new values A', B'.

    In float64 where the device has it, as steps are small.

    Returns:
        the realised step `s (B' A' − B A)`, and its first order `s (B ΔA + ΔB A)`.
    """
    exact = exact_dtype(old[0])
    A, B = (float(kept) * x.to(exact) for kept, x in zip((rates.keep_A, rates.keep_B), old, strict=True))
    step_A, step_B = new[0].to(exact) - A, new[1].to(exact) - B
    realised = Halves(scaling * torch.cat([step_B, B + step_B], dim=1), torch.cat([A, step_A]))
    return realised, equivalent_halves(A, B, step_A, step_B, scaling)


def relative_difference(one: Halves, other: Halves) -> float | None:
    """`‖one − other‖ / ‖other‖`, `None` if the other is zero."""
    exact = exact_dtype(one.left)
    left = torch.cat([one.left.to(exact), -other.left.to(exact)], dim=1)
    length = other.norm()
    return Halves(left, torch.cat([one.right.to(exact), other.right.to(exact)])).norm() / length if length else None


def exact_dtype(like: Tensor) -> torch.dtype:
    """Float64 where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64
