"""Pairs in rows layout and full gradients of their weights, for steps that are held against dense oracles."""

import torch


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(m, n, r, start="random", dtype=torch.float64, K=3, seed=0):
    """K pairs A `(K, r, n)` and B transposed `(K, r, m)`."""
    A, Bt = 0.3 * normal(K, r, n, seed=seed), 0.2 * normal(K, r, m, seed=seed + 1)
    return A.to(dtype), (Bt if start == "random" else torch.zeros_like(Bt)).to(dtype)


def full_gradients(m, n, count, rank=None, K=3, seed=10):
    """Gradients `(count, K, m, n)` of uneven rows and columns, of a given rank as from a batch of so few tokens."""
    rank = min(m, n) if rank is None else rank
    g = normal(count, K, m, rank, seed=seed) @ normal(count, K, rank, n, seed=seed + 1)
    return g * normal(m, 1, seed=seed + 2).exp() * normal(n, seed=seed + 3).exp() * 1e-2


def assert_near(found, expected, tolerance):
    """Every matrix within the tolerance of its expected one, relative to that one's norm."""
    error = (found.double() - expected).flatten(-2).norm(dim=-1) / expected.flatten(-2).norm(dim=-1)
    assert error.max().item() < tolerance
