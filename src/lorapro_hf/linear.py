"""Given adjusted gradients of both factors, how are the two moved at once?"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapro_hf.sequential import Rates, per_pair, settle
from lorapro_hf.trust_region import shares_of_both


def linear_step(
    A: Tensor,
    Bt: Tensor,
    h_A: Tensor,
    h_Bt: Tensor,
    rates: Rates,
    *,
    live: Tensor | None = None,
    factor_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """The factors `(K, r, n)` and `(K, r, m)` after a step along `h_A` and `h_Bt`, which are overwritten.

    Args:
        A: `(K, r, n)`, before its decay.
        Bt: `(K, r, m)`, B transposed, before its decay.
        h_A: `(K, r, n)`.
        h_Bt: `(K, r, m)`.
        rates: as in `sequential_step`.
        live: as in `sequential_step`.
        factor_dtypes: dtypes in which A and B are stored, `None` for that of the inputs.
    """
    step_A, step_Bt = h_A.mul_(-per_pair(rates.lr_A, A)), h_Bt.mul_(-per_pair(rates.lr_B, A))
    if rates.trust_region is not None:
        keep = per_pair(rates.keep_A, A), per_pair(rates.keep_B, A)
        shares = shares_of_both(A, Bt, step_A, step_Bt, rates.trust_region, keep)
        step_A, step_Bt = (step.mul_(share) for step, share in zip((step_A, step_Bt), shares, strict=True))
    return (
        settle(A, step_A, rates.keep_A, live, factor_dtypes[0]),
        settle(Bt, step_Bt, rates.keep_B, live, factor_dtypes[1]),
    )
