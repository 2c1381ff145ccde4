"""Which directions of a matrix are the largest?"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_SIZE = 512
"""Matrices whose smaller side is at most this long are decomposed exactly."""
_SPARE_DIRECTIONS = 16  # at least, beyond the rank
_ITERATIONS = 10  # as many as published code spends on signs of gradients, whose singular values lie close together


def truncated_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of matrices with their vectors, so that `U @ diag(S) @ Vt` is close to the matrix.

    Small matrices are decomposed exactly, large ones by subspace iteration from random directions (Halko, Martinsson
    and Tropp, 2011), twice as many as asked for. These come from a generator of the function's own and are always the
    same.

    Args:
        matrices: `(..., m, n)`, float32 or float64, finite.
        rank: how many, at most `min(m, n)`.

    Returns:
        U `(..., m, rank)`, S `(..., rank)` in descending order and Vt `(..., rank, n)`. The vectors are orthonormal,
        also those of singular values that are 0.
    """
    smaller = min(matrices.shape[-2:])
    width = rank + max(rank, _SPARE_DIRECTIONS)
    if smaller <= max(EXACT_SIZE, 2 * width):
        U, S, Vt = torch.linalg.svd(matrices, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(matrices.shape[-1], width, generator=generator, dtype=matrices.dtype)
        columns = torch.linalg.qr(matrices @ start.to(matrices.device)).Q
        for _ in range(_ITERATIONS):
            rows = torch.linalg.qr(matrices.mT @ columns).Q
            columns = torch.linalg.qr(matrices @ rows).Q
        U, S, Vt = torch.linalg.svd(columns.mT @ matrices, full_matrices=False)
        U = columns @ U
    return U[..., :rank], S[..., :rank], Vt[..., :rank, :]
