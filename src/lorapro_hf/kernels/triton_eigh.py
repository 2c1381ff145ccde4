"""How are many small symmetric matrices decomposed on CUDA while the host goes on?

By Jacobi's method in float64, one program for each matrix. The pairs of a round are disjoint and rotate at once, so
that the element shared by the two directions of each pair becomes zero. The rounds of a sweep are a round-robin
tournament, in which every pair meets. Rotations also sort: the larger eigenvalue goes to the lower index. Without
sorting, repeated and widely spread eigenvalues (factors of deficient rank) need more than 12 sweeps from rank 16 on;
with it 6 to 10 mostly suffice, and at most 14 were seen. A program stops when only rounding is left.

The kernel has not run on hardware. It is tested through Triton's interpreter and compiled ahead of time to sm_90 code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RANK = 64
# Far more than any matrix of the tests needs.
MAX_SWEEPS = 40


def symmetric_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues `(K, r)` and orthonormal eigenvectors `(K, r, r)` of symmetric matrices `(K, r, r)`.

    Computed in float64 and returned in the dtype of the matrices, with the errors of `torch.linalg.eigh`. A matrix that
    holds NaN or Inf gets NaN in both.

    Raises:
        ValueError: r is larger than `MAX_RANK`.
    """
    count, rank = matrices.shape[:2]
    if rank > MAX_RANK:
        raise ValueError(f"matrices of rank {rank} exceed the kernel's {MAX_RANK}; use torch.linalg.eigh.")
    exact = matrices.to(torch.float64).contiguous()
    values, vectors = exact.new_empty(count, rank), torch.empty_like(exact)
    if exact.numel():
        block = max(2, triton.next_power_of_2(rank))
        jacobi_kernel[(count,)](
            exact,
            values,
            vectors,
            rank,
            BLOCK=block,
            MOST=MAX_SWEEPS,
            num_warps={2: 1, 4: 1, 8: 1, 16: 4, 32: 8}.get(block, 8),
            enable_fp_fusion=False,  # as in the interpreter; defaults differ between releases of Triton
        )
    return values.to(matrices.dtype), vectors.to(matrices.dtype)


@triton.jit
def jacobi_kernel(
    matrices: tl.tensor,
    values: tl.tensor,
    vectors: tl.tensor,
    rank: tl.tensor,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """Decompose one matrix in the registers of one program."""
    which = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    row, column = index[:, None], index[None, :]
    inside = (row < rank) & (column < rank)
    place = which * rank * rank + row * rank + column
    S = tl.load(matrices + place, mask=inside, other=0.0)
    # Zero times NaN or Inf is NaN, which must reach the results whatever the rotations do.
    spoiled = tl.sum(tl.sum(S * 0.0, axis=1), axis=0)
    scale = tl.max(tl.max(tl.abs(S), axis=1), axis=0)
    S = S / tl.where(scale > 0, scale, 1.0)
    vector = (row == column).to(tl.float64) + tl.zeros((BLOCK, BLOCK), tl.float64)
    players = rank + rank % 2
    left = tl.where(tl.max(tl.max(_beside_diagonal(S, row, column), axis=1), axis=0) > 0, MOST, 0)
    while left > 0:
        for turn in range(1, players):
            partner = _partners(index, turn, players)
            own, other, pivot = _rotations(S, index, partner, rank)
            across = tl.broadcast_to(partner[None, :], (BLOCK, BLOCK))
            down = tl.broadcast_to(partner[:, None], (BLOCK, BLOCK))
            S = own[None, :] * S + other[None, :] * tl.gather(S, across, 1)
            S = own[:, None] * S + other[:, None] * tl.gather(S, down, 0)
            S = tl.where(pivot, 0.0, S)
            vector = own[None, :] * vector + other[None, :] * tl.gather(vector, across, 1)
        rest = tl.max(tl.max(_beside_diagonal(S, row, column), axis=1), axis=0)
        # Less than this is rounding; NaN compares as False and ends the loop.
        left = tl.where(rest > 1e-15 * tl.max(tl.max(tl.abs(S), axis=1), axis=0), left - 1, 0)
    found = tl.sum(tl.where(row == column, S, 0.0), axis=0)
    # Positions must be valid even where values are NaN, or some results would not be written.
    key = tl.where(found == found, found, 0.0)
    key = tl.where(index < rank, key, float("inf"))
    # Both axes get copies of the same vector.
    before = (key[:, None] < key[None, :]) | ((key[:, None] == key[None, :]) & (row < column))
    position = tl.sum(before.to(tl.int32), axis=0)
    tl.store(values + which * rank + position, found * scale + spoiled, mask=index < rank)
    target = which * rank * rank + row * rank + position[None, :]
    tl.store(vectors + target, vector + spoiled, mask=inside)


@triton.jit
def _beside_diagonal(S: tl.tensor, row: tl.tensor, column: tl.tensor) -> tl.tensor:
    """The magnitudes of the elements beside the diagonal."""
    return tl.where(row == column, 0.0, tl.abs(S))


@triton.jit
def _partners(index: tl.tensor, turn: tl.tensor, players: tl.tensor) -> tl.tensor:
    """The partner of each index in a round: their sum is `turn` modulo `players - 1`; the last index takes the rest."""
    last = players - 1
    partner = turn - index
    partner = tl.where(partner < 0, partner + last, tl.where(partner >= last, partner - last, partner))
    partner = tl.where(partner == index, last, partner)
    partner = tl.where(index == last, (turn * (players // 2)) % last, partner)
    return tl.where(index > last, index, partner)


@triton.jit
def _rotations(S: tl.tensor, index: tl.tensor, partner: tl.tensor, rank: tl.tensor) -> tl.tensor:
    """The weights of each direction itself `(r,)` and of its partner `(r,)`, and the elements that become zero.

    Both partners compute the same angle with opposite signs, to the bit: a sum of two terms does not depend on order.
    """
    row, column = index[:, None], index[None, :]
    pivot = partner[:, None] == column
    diagonal = tl.sum(tl.where(row == column, S, 0.0), axis=0)
    opposite = tl.sum(tl.where(pivot, diagonal[None, :], 0.0), axis=1)
    shared = 0.5 * (tl.sum(tl.where(pivot, S, 0.0), axis=0) + tl.sum(tl.where(pivot, S, 0.0), axis=1))
    tau = (opposite - diagonal) / tl.where(shared == 0, 1.0, 2 * shared)
    sign = tl.where((tau > 0) | ((tau == 0) & (index < partner)), 1.0, -1.0)
    t = tl.where(shared == 0, 0.0, sign / (tl.abs(tau) + tl.sqrt(1 + tau * tau)))
    c = 1 / tl.sqrt(1 + t * t)
    s = t * c
    unsorted = ((index < partner) & (diagonal < opposite)) | ((partner < index) & (opposite < diagonal))
    swap = unsorted & (index < rank) & (partner < rank)
    return tl.where(swap, s, c), tl.where(swap, c, -s), pivot
