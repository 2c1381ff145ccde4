"""How much of a step can be taken before the product of both changes counts?

A step that moves A by ΔA and B by ΔB moves `B A` by `ΔB A + B ΔA + ΔB ΔA`. The first two terms are what a step is
judged by; the last one is small only if the step is. A trust region of `limit` shortens a step until

    ‖ΔB ΔA‖ ≤ limit · ‖ΔB A + B ΔA‖

in the Frobenius norm. The inner product of the whole change with its first two terms is then at least
`(1 - limit) ‖ΔB A + B ΔA‖²`: with a limit below 1 the weight moves to the side that was meant, with a larger one the
last term may undo the others. From B = 0, ΔA is 0 and all of the step is taken; right after it, B is of the size of one
step and ΔA asks for a turn of A by as much as A is long.

All norms come from r × r products. They are taken in float64, since what fits into float32 need not do so when squared
(a B of 1e-25 asks for a ΔA of 1e22), and since the terms of first order may all but cancel. Tensors are
`(..., r, length)`, in rows layout: B is given by its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What is left of a step, as a share of the limit, below which B counts as zero. A linear step lets B grow by about the
# limit, relative to its size, so that a B left tiny by a first step at a tiny rate would hold up hundreds of steps.
# Linear warm-ups from B = 0 stay above a tenth.
FRESH_START = 0.03

Keep = tuple[float | Tensor, float | Tensor]  # tensors as the steps, `(..., 1, 1)`


def square(rows: Tensor) -> Tensor:
    """`F Fᵀ` `(..., r, r)` in float64."""
    exact = rows.to(_exact_dtype(rows))
    return exact @ exact.mT


def shares_of_both(
    A: Tensor, Bt: Tensor, step_A: Tensor, step_Bt: Tensor, limit: float, keep: Keep = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """By what to multiply the changes of A and of B, `(..., 1, 1)` each, at most 1.

    Both are shortened alike, unless next to nothing would be left: then B counts as zero, A stays and B takes all of
    its own step.

    Args:
        A: before the step and its decay.
        Bt: before the step and its decay.
        step_A: the change of A.
        step_Bt: the change of B.
        limit: as above.
        keep: what decay leaves of A and of B.
    """
    of_A, across_A, square_A = _grams(A, step_A)
    of_B, across_B, square_B = _grams(Bt, step_Bt)
    first_order = keep[0] ** 2 * _inner(square_B, of_A) + keep[1] ** 2 * _inner(of_B, square_A)
    first_order += 2 * keep[0] * keep[1] * _inner(across_B, across_A.mT)
    share = _share(_inner(square_B, square_A), limit**2 * first_order.clamp_min(0)).to(A.dtype)
    is_fresh = share < FRESH_START * limit
    return torch.where(is_fresh, 0.0, share), torch.where(is_fresh, 1.0, share)


def share_of_A(
    A: Tensor, Bt: Tensor, step_A: Tensor, square_B: Tensor, limit: float, keep: Keep = (1.0, 1.0)
) -> Tensor:
    """By what to multiply the change of A alone, `(..., 1, 1)`, at most 1, if that of B stays as it is.

    Args:
        A: before the step and its decay.
        Bt: before the step and its decay.
        step_A: the change of A, at right angles to the rows of A, so that the two terms of first order are too.
        square_B: `square` of the change of B.
        limit: as above.
        keep: what decay leaves of A and of B.
    """
    square_A = square(step_A)
    excess = _inner(square_B, square_A) - (limit * keep[1]) ** 2 * _inner(square(Bt), square_A)
    return _share(excess, (limit * keep[0]) ** 2 * _inner(square_B, square(A))).to(A.dtype)


def _share(asked: Tensor, allowed: Tensor) -> Tensor:
    return torch.where(asked > allowed, (allowed / asked).sqrt(), 1.0)


def _grams(factor: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`F Fᵀ`, `ΔF Fᵀ` and `ΔF ΔFᵀ`, `(..., r, r)` each, out of one product."""
    r = factor.shape[-2]
    both = factor.new_empty(*factor.shape[:-2], 2 * r, factor.shape[-1], dtype=_exact_dtype(factor))
    both[..., :r, :], both[..., r:, :] = factor, step
    gram = both @ both.mT
    return gram[..., :r, :r], gram[..., r:, :r], gram[..., r:, r:]


def _exact_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64  # where there is no float64


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius products of matrices, `(..., 1, 1)`."""
    return (left * right).sum((-2, -1), keepdim=True)
