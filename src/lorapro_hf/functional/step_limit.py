r"""How large is the step of a weight, and which fraction of it may two factors take?

Changes of the factors move `B A` by `D = (B + ΔB)(A + ΔA) − B A = ΔB A + (B + ΔB) ΔA`, a product `L R` of 2r columns
and 2r rows. Its Schatten norm of order 16 needs nothing but products of 2r x 2r matrices:

    ‖D‖₁₆ = (Σ σᵢ¹⁶)^(1/16) = (tr (LᵀL RRᵀ)⁸)^(1/16)        ‖D‖₂ ≤ ‖D‖₁₆ ≤ (2r)^(1/16) ‖D‖₂

The upper bound is 1.19 ‖D‖₂ for r = 8. The norm is smooth, needs no eigenproblem and waits for no value, and does not
depend on how `B A` is split into factors.

The bulk of the singular values of a weight W0 `(m, n)` ends, if its entries were independent, at
`‖W0‖_F (1/√m + 1/√n)`, the edge of the Marchenko-Pastur law. A trust region κ lets a step have κ times this length: if
`s ‖D‖₁₆` is larger, ΔA and ΔB are multiplied by the same fraction. The product of both then shrinks by its square, so
that the weight moves by no more than that where ΔB ΔA is small, or does not undo the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bulk_edge(square: Tensor, m: int, n: int) -> Tensor:
    """`‖W‖_F (1/√m + 1/√n)` for weights `(m, n)` with the squared Frobenius norms `square`."""
    return square.sqrt() * (m**-0.5 + n**-0.5)


def kept_fraction(A: Tensor, Bt: Tensor, step_A: Tensor, step_Bt: Tensor, longest: Tensor) -> Tensor:
    """The largest fraction, at most 1, of the step D of `B A` whose Schatten norm of order 16 is at most `longest`.

    It is 1 for a step of 0. Where parts cancel to a fraction δ of their sizes its relative error is about 1e-15 / δ².
    The fourth powers of the factors and of their changes must not overflow float64.

    Args:
        A: `(K, r, n)`, before the step.
        Bt: `(K, r, m)`, the transpose of B.
        step_A: ΔA `(K, r, n)`.
        step_Bt: the transpose of ΔB, `(K, r, m)`.
        longest: `(K,)`, float64 where the device has it.

    Returns:
        `(K, 1, 1)` in the dtype of A.
    """
    length = _schatten_16(_gram(step_Bt, Bt + step_Bt), _gram(A, step_A))
    return torch.where(length > longest, longest / length, 1.0).to(A.dtype)[:, None, None]


def _schatten_16(left: Tensor, right: Tensor) -> Tensor:
    """`‖L R‖₁₆` `(K,)`, given `LᵀL` and `RRᵀ`."""
    # Columns of L of length one: blocks of very different sizes would underflow in the eighth power.
    lengths = left.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(lengths == 0, 0, 1 / lengths)
    right = right * lengths[:, :, None] * lengths[:, None]
    size = right.diagonal(dim1=-2, dim2=-1).sum(-1)
    of_unit = (left * inverse[:, :, None] * inverse[:, None]) @ (right / torch.where(size == 0, 1, size)[:, None, None])
    square = of_unit @ of_unit
    fourth = square @ square
    # A trace of an eighth power, below 0 only by rounding.
    return size.sqrt() * (fourth * fourth.mT).sum((-2, -1)).clamp_min(0) ** (1 / 16)


def _gram(first: Tensor, second: Tensor) -> Tensor:
    """The products of all rows of two `(K, r, k)` with each other, `(K, 2r, 2r)`."""
    r, k = first.shape[-2:]
    exact = torch.float32 if first.device.type == "mps" else torch.float64  # where there is no float64
    both = first.new_empty(*first.shape[:-2], 2 * r, k, dtype=exact)
    both[..., :r, :], both[..., r:, :] = first, second
    return both @ both.mT
