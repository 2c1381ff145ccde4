"""How do gates weigh the r slots of a pair, and which slots are replaced by copies of which others?

BeamLoRA (arXiv 2502.13604) puts weights `g = r softmax(q / τ)` between the factors, `W = W0 + s B diag(g) A`. Slot i is
the column i of B and the row i of A, and its weight is its importance. From time to time the least important slots of
all pairs together become copies of the most important slots of their own pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-20  # columns of B are divided by the weights; a slot this faint has no part in the output


def gate_weights(q: Tensor, temperature: float) -> Tensor:
    """`r softmax(q / τ)` `(..., r)`, whose mean is 1."""
    return (q.shape[-1] * torch.softmax(q / temperature, -1)).clamp_min(_SMALLEST)


def gate_gradients(inner: Tensor, q: Tensor, temperature: float) -> Tensor:
    """The gradients by q `(..., r)`, from the inner products of the columns of `B diag(g)` with their gradients."""
    return (inner - torch.softmax(q / temperature, -1) * inner.sum(-1, keepdim=True)) / temperature


def kept_share(step: int, end: float, keep: float) -> float:
    """The share of all importance to keep at a step: from `keep` along a cosine to 1 at the step `end`."""
    return 1.0 if step >= end else 1 - (1 - keep) * (1 + math.cos(math.pi * step / end)) / 2


def replacements(weights: Sequence[Tensor], share: float, seed: int) -> list[tuple[list[int], list[int]]]:
    """The slots to replace in each matrix, and the slots that they become copies of.

    The most important slots of all matrices are kept as long as their sum is at most `share` of the whole. Of the
    others a matrix replaces the least important ones, at most half of its slots, by its most important ones in a random
    order.

    Args:
        weights: the importance of the slots of each matrix, `(r,)` on the CPU.
        share: of the sum of all importances.
        seed: of the order.
    """
    sizes = [len(each) for each in weights]
    values, order = torch.cat([each.double() for each in weights]).sort(descending=True, stable=True)
    is_left_out = torch.empty(len(order), dtype=torch.bool, device="cpu")
    is_left_out[order] = values.cumsum(0) > share * values.sum()
    generator = torch.Generator("cpu").manual_seed(seed)
    replaced = []
    for own, left_out in zip(weights, is_left_out.split(sizes), strict=True):
        count = min(int(left_out.sum()), len(own) // 2)
        best_first = own.double().argsort(descending=True, stable=True)
        sources = best_first[:count][torch.randperm(count, generator=generator, device="cpu")]
        replaced.append((best_first[len(own) - count :].tolist(), sources.tolist()))
    return replaced


def averaged(q: Tensor, slots: Sequence[int], sources: Sequence[int], temperature: float) -> Tensor:
    """The q `(r,)` that gives each slot and its source the mean of their weights, and the others the same as before."""
    new = q.clone()
    of_both = torch.stack([q[list(slots)], q[list(sources)]]) / temperature
    new[[*slots, *sources]] = (temperature * (of_both.logsumexp(0) - math.log(2))).repeat(2)
    return new


def squared_change(A: Tensor, Bt: Tensor, new_A: Tensor, new_Bt: Tensor) -> Tensor:
    """`‖B'A' − BA‖²` `(K,)`, from factors in rows layout `(K, r, n)` and `(K, r, m)`."""
    exact = torch.float32 if A.device.type == "mps" else torch.float64  # where there is no float64
    left, right = torch.cat([new_Bt, -Bt], -2).to(exact), torch.cat([new_A, A], -2).to(exact)
    return ((left @ left.mT) * (right @ right.mT)).sum((-2, -1)).clamp_min(0)
