"""What is remembered of a pair between steps, in which form, and which step do the moments ask for?

Full mode remembers the equivalent gradient `s (B h_A + h_B A)` of the size of the adapted weight. A block of rows is
updated, its Adam direction u formed and spent on the factor gradients `s Bᵀ u` and `s u Aᵀ` before the next block is
read, so that nothing of the size of the weight exists beside the two moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.pairs import LoRAPair
from lorapro_hf.projection import compute_dtype

# A block of all four arrays in play fits a CPU core's cache; elsewhere few large kernels are better than many small.
_BLOCK_ELEMENTS = {"cpu": 2**16}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


def dense_shape(pair: LoRAPair) -> tuple[int, ...]:
    """Shape `(..., m, n)` of the full-mode moments of a pair."""
    A, B = pair.matrix_A(pair.A), pair.matrix_B(pair.B)
    return (*B.shape[:-1], A.shape[-1])


def new_dense_state(pair: LoRAPair) -> dict[str, Any]:
    """Fresh full-mode state of a pair, kept under its A."""
    options: Any = {"dtype": compute_dtype(pair.A, pair.B), "device": pair.A.device}
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros(dense_shape(pair), **options),
        "exp_avg_sq": torch.zeros(dense_shape(pair), **options),
    }


def new_step_state() -> dict[str, Any]:
    """State of a factor whose moments are kept elsewhere: distributed checkpoints want some for each parameter."""
    return {"step": torch.zeros((), dtype=torch.float32)}


def new_factor_state(factor: Tensor) -> dict[str, Any]:
    """Fresh efficient-mode state of one factor."""
    dtype = compute_dtype(factor)
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(factor, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(factor, dtype=dtype, memory_format=torch.preserve_format),
    }


def state_bytes(pairs: Sequence[LoRAPair], mode: str) -> int:
    """Bytes that both moments of all pairs take in the given mode."""
    total = 0
    for pair in pairs:
        elements = torch.Size(dense_shape(pair)).numel() if mode == "full" else pair.A.numel() + pair.B.numel()
        total += 2 * elements * compute_dtype(pair.A, pair.B).itemsize
    return total


def adam_factor_gradients(
    state: dict[str, Any],
    A: Tensor,
    B: Tensor,
    h_A: Tensor,
    h_B: Tensor,
    scaling: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Take the equivalent gradient of one pair into its dense moments and give the factor gradients of their direction.

    Args:
        state: `step`, `exp_avg` and `exp_avg_sq` `(..., m, n)`, updated in place.
        A: `(..., r, n)`.
        B: `(..., m, r)`.
        h_A: adjusted gradient of A, shaped like it.
        h_B: adjusted gradient of B, shaped like it.
        scaling: `(...)`.
        betas: decay rates of the moments.
        eps: added to the denominator.

    Returns:
        `(s Bᵀ u, s u Aᵀ)` for Adam's direction u of the equivalent gradient, shaped like A and B.
    """
    state["step"] += 1
    t = state["step"].item()
    correction1, correction2 = 1 - betas[0] ** t, 1 - betas[1] ** t
    s = scaling[..., None, None]
    left, right = torch.cat([B, h_B], dim=-1), s * torch.cat([h_A, A], dim=-2)
    grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
    m, n = state["exp_avg"].shape[-2:]
    limit = _BLOCK_ELEMENTS.get(A.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    block = max(1, limit // (n * state["exp_avg"].shape[:-2].numel()))
    for start in range(0, m, block):
        rows = (..., slice(start, start + block), slice(None))
        M, V = state["exp_avg"][rows], state["exp_avg_sq"][rows]
        g = left[rows] @ right
        M.lerp_(g, 1 - betas[0])
        V.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        u = torch.sqrt(V, out=g).div_(correction2**0.5).add_(eps).reciprocal_().mul_(M).div_(correction1)
        grad_B[rows] = u @ A.mT
        grad_A += B[rows].mT @ u
    return grad_A.mul_(s), grad_B.mul_(s)
