"""How long are the rows of a matrix that is given by thin factors alone, or added to another one?"""

from __future__ import annotations

import torch
from torch import Tensor


def squared_row_norms(B: Tensor, A: Tensor, products: Tensor | None = None, squares: Tensor | float = 0.0) -> Tensor:
    """The squared norms of the rows of `W + B A`, without this matrix.

    Args:
        B: `(..., m, r)`.
        A: `(..., r, n)`.
        products: `W Aᵀ` `(..., m, r)`; `None` where W is 0.
        squares: the squared norms of the rows of W, `(..., m)`.

    Returns:
        `(..., m)`, not below 0.
    """
    across = B @ (A @ A.mT)
    if products is not None:
        across = across + 2 * products
    return (squares + torch.linalg.vecdot(across, B)).clamp_min_(0)
