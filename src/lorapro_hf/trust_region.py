"""How much of a step can be taken before the product of both changes counts?

A step that moves A by ΔA and B by ΔB moves `B A` by `ΔB A + B ΔA + ΔB ΔA`. The first two terms are what a step is
judged by; the last one is small only if the step is. A trust region of `limit` shortens a step until

    ‖ΔB ΔA‖ ≤ limit · ‖ΔB A + B ΔA‖

in the Frobenius norm, which no scaling of the factors against each other changes. From B = 0, ΔA is 0 and all of the
step is taken; right after it, B is of the size of one step and ΔA asks for a turn of A by as much as A is long.

All norms come from r × r products. Tensors are `(..., r, length)`, in rows layout: B is given by its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def share_of_both(A: Tensor, Bt: Tensor, step_A: Tensor, step_Bt: Tensor, limit: float) -> Tensor:
    """By what to multiply both changes, `(..., 1, 1)`, at most 1."""
    square_B = step_Bt @ step_Bt.mT
    square_A = step_A @ step_A.mT
    product = _inner(square_B, square_A)
    first_order = _inner(square_B, A @ A.mT) + _inner(Bt @ Bt.mT, square_A)
    first_order += 2 * _inner(step_Bt @ Bt.mT, A @ step_A.mT)
    allowed = limit**2 * first_order.clamp_min(0)
    return torch.where(product > allowed, (allowed / product).sqrt(), 1.0)


def share_of_A(A: Tensor, Bt: Tensor, step_A: Tensor, square_B: Tensor, limit: float) -> Tensor:
    """By what to multiply the change of A alone, `(..., 1, 1)`, at most 1, if that of B stays as it is.

    Args:
        A: before the step.
        Bt: before the step.
        step_A: the change of A, at right angles to the rows of A, so that the two terms of first order are too.
        square_B: `ΔBᵀ ΔB` `(..., r, r)`.
        limit: as above.
    """
    square_A = step_A @ step_A.mT
    excess = _inner(square_B, square_A) - limit**2 * _inner(Bt @ Bt.mT, square_A)
    allowed = limit**2 * _inner(square_B, A @ A.mT)
    return torch.where(excess > allowed, (allowed / excess).sqrt(), 1.0)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius products of matrices, `(..., 1, 1)`."""
    return (left * right).sum((-2, -1), keepdim=True)
