"""What fraction of a step can be taken before the product of both changes counts?

A step that moves A by ΔA and B by ΔB moves `B A` by `ΔB A + B ΔA + ΔB ΔA`. The first two terms are the intended
change; the last one is small only if the step is. A trust region ρ shortens a step until

    ‖ΔB ΔA‖ ≤ ρ · ‖ΔB A + B ΔA‖

in the Frobenius norm. The inner product of the whole change with its first two terms is then at least
`(1 − ρ) ‖ΔB A + B ΔA‖²`: with ρ below 1 the weight moves in the intended direction, with a larger ρ the last term may
undo the others. From B = 0, ΔA is 0 and the whole step is taken. Right after it B is as long as one step, and ΔA would
turn A by as much as A is long.

All norms come from r × r products in float64: squares of float32 values may overflow float32 (a B of 1e-25 leads to a
ΔA of 1e22), and the terms of first order may nearly cancel. Tensors are `(..., r, length)` in rows layout: B is given
by its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

# B counts as zero where the kept fraction of a step is below this multiple of the trust region. A linear step lets B
# grow by about the trust region, relative to its size: a B left tiny by a first step at a tiny rate would delay
# hundreds of steps. Linear warm-ups from B = 0 stay above a tenth.
FRESH_START = 0.03

Keep = tuple[float | Tensor, float | Tensor]  # tensors as the steps, `(..., 1, 1)`


def square(rows: Tensor) -> Tensor:
    """`F Fᵀ` `(..., r, r)` in float64."""
    exact = rows.to(_exact_dtype(rows))
    return exact @ exact.mT


def kept_fractions(
    A: Tensor, Bt: Tensor, step_A: Tensor, step_Bt: Tensor, trust_region: float, keep: Keep = (1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """The fractions of the changes of A and of B that are kept, `(..., 1, 1)` each, at most 1.

    Both are shortened alike, unless almost nothing would be left: then B counts as zero, A stays and B takes its whole
    step.

    Args:
        A: before the step and its decay.
        Bt: before the step and its decay.
        step_A: the change of A.
        step_Bt: the change of B.
        trust_region: ρ as above.
        keep: the fractions of A and of B that decay leaves.
    """
    of_A, across_A, square_A = _grams(A, step_A)
    of_B, across_B, square_B = _grams(Bt, step_Bt)
    first_order = keep[0] ** 2 * _inner(square_B, of_A) + keep[1] ** 2 * _inner(of_B, square_A)
    first_order += 2 * keep[0] * keep[1] * _inner(across_B, across_A.mT)
    kept = _kept(_inner(square_B, square_A), trust_region**2 * first_order.clamp_min(0)).to(A.dtype)
    is_fresh = kept < FRESH_START * trust_region
    return torch.where(is_fresh, 0.0, kept), torch.where(is_fresh, 1.0, kept)


def kept_fraction_of_A(
    A: Tensor, Bt: Tensor, step_A: Tensor, square_B: Tensor, trust_region: float, keep: Keep = (1.0, 1.0)
) -> Tensor:
    """The fraction of the change of A that is kept, `(..., 1, 1)`, at most 1, if the change of B stays as it is.

    Args:
        A: before the step and its decay.
        Bt: before the step and its decay.
        step_A: the change of A, orthogonal to the rows of A, so that the two terms of first order are orthogonal too.
        square_B: `square` of the change of B.
        trust_region: ρ as above.
        keep: the fractions of A and of B that decay leaves.
    """
    square_A = square(step_A)
    excess = _inner(square_B, square_A) - (trust_region * keep[1]) ** 2 * _inner(square(Bt), square_A)
    return _kept(excess, (trust_region * keep[0]) ** 2 * _inner(square_B, square(A))).to(A.dtype)


def _kept(asked: Tensor, allowed: Tensor) -> Tensor:
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
