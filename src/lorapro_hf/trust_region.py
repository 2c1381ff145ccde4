"""How much of a step can be taken before the product of both changes counts?

A step that moves A by ΔA and B by ΔB moves `B A` by `ΔB A + B ΔA + ΔB ΔA`. The first two terms are what a step is
judged by; the last one is small only if the step is. A trust region of `limit` shortens a step until

    ‖ΔB ΔA‖ ≤ limit · ‖ΔB A + B ΔA‖

in the Frobenius norm, which no scaling of the factors against each other changes. From B = 0, ΔA is 0 and all of the
step is taken; right after it, B is of the size of one step and ΔA asks for a turn of A by as much as A is long.

All norms come from r × r products of factors that are divided by their largest element, since what fits into float32
need not do so when squared: a B of 1e-25 asks for a ΔA of 1e22. Tensors are `(..., r, length)`, in rows layout: B is
given by its transpose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scaled(NamedTuple):
    """Rows `(..., r, length)`, or their products with each other `(..., r, r)`, apart from their size."""

    unit: Tensor
    size: Tensor  # (..., 1, 1), float64 where the device has it


def square(rows: Tensor) -> Scaled:
    """`F Fᵀ` `(..., r, r)`, and the square of the largest element of F, by which it has been divided."""
    return _square(_scaled(rows))


def share_of_both(A: Tensor, Bt: Tensor, step_A: Tensor, step_Bt: Tensor, limit: float) -> Tensor:
    """By what to multiply both changes, `(..., 1, 1)`, at most 1."""
    of_A, of_Bt, of_step_A, of_step_Bt = (_scaled(rows) for rows in (A, Bt, step_A, step_Bt))
    square_A, square_B = _square(of_step_A), _square(of_step_Bt)
    first_order = _inner(square_B, _square(of_A)) + _inner(_square(of_Bt), square_A)
    first_order += 2 * _inner(_product(of_step_Bt, of_Bt), _product(of_A, of_step_A))
    return _share(_inner(square_B, square_A), limit**2 * first_order.clamp_min(0)).to(A.dtype)


def share_of_A(A: Tensor, Bt: Tensor, step_A: Tensor, square_B: Scaled, limit: float) -> Tensor:
    """By what to multiply the change of A alone, `(..., 1, 1)`, at most 1, if that of B stays as it is.

    Args:
        A: before the step.
        Bt: before the step.
        step_A: the change of A, at right angles to the rows of A, so that the two terms of first order are too.
        square_B: `square` of the change of B.
        limit: as above.
    """
    square_A = square(step_A)
    excess = _inner(square_B, square_A) - limit**2 * _inner(square(Bt), square_A)
    return _share(excess, limit**2 * _inner(square_B, square(A))).to(A.dtype)


def _share(asked: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(asked > allowed, (allowed / asked).sqrt(), 1.0)


def _scaled(rows: Tensor) -> Scaled:
    size = torch.linalg.vector_norm(rows, float("inf"), dim=(-2, -1), keepdim=True)
    size = size.clamp_min(torch.finfo(size.dtype).tiny)
    return Scaled(rows / size, size.to(torch.float64 if rows.device.type != "mps" else torch.float32))


def _product(left: Scaled, right: Scaled) -> Scaled:
    return Scaled(left.unit @ right.unit.mT, left.size * right.size)


def _square(rows: Scaled) -> Scaled:
    return _product(rows, rows)


def _inner(left: Scaled, right: Scaled) -> Tensor:
    """Frobenius products of matrices, `(..., 1, 1)`."""
    return (left.unit * right.unit).sum((-2, -1), keepdim=True) * left.size * right.size
