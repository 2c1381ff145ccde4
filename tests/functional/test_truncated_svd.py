"""The truncated decomposition equals LAPACK's in float64 where singular values fall, and keeps as much elsewhere."""

from __future__ import annotations

import pytest
import torch

from dense_gradients import normal
from lorapro_hf.functional import truncated_svd as module
from lorapro_hf.functional.truncated_svd import truncated_svd


def orthonormal(rows):
    return torch.allclose(rows @ rows.mT, torch.eye(rows.shape[-2], dtype=rows.dtype).expand(rows.shape[0], -1, -1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("shape", [(80, 60), (60, 80)])
def test_falling_singular_values(monkeypatch, shape, is_exact, dtype, tolerance):
    monkeypatch.setattr(module, "EXACT_SIZE", 512 if is_exact else 0)
    matrices = normal(2, *shape, seed=0) * torch.linspace(0, -6, shape[1], dtype=torch.float64).exp()
    U, S, Vt = (part.double() for part in truncated_svd(matrices.to(dtype), 3))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    expected = left[..., :3] * values[:, None, :3] @ right[:, :3]
    found = U * S[:, None] @ Vt
    assert U.shape == (2, shape[0], 3) and ((found - expected).norm() / expected.norm()).item() < tolerance
    if dtype == torch.float64:
        assert orthonormal(U.mT) and orthonormal(Vt)


def test_signs_of_noise_lose_less_than_a_hundredth(monkeypatch):
    """Singular values that lie as close as can be."""
    monkeypatch.setattr(module, "EXACT_SIZE", 0)
    signs = normal(1, 300, 400, seed=1).sign()
    _, S, _ = truncated_svd(signs, 8)
    best = torch.linalg.svdvals(signs)[:, :8]
    assert (best * (1 + 1e-12) >= S).all() and S.square().sum() > 0.99 * best.square().sum()


def test_a_matrix_of_lower_rank_and_the_random_state(monkeypatch):
    monkeypatch.setattr(module, "EXACT_SIZE", 0)
    low = normal(1, 90, 2, seed=2) @ normal(1, 2, 70, seed=3)
    before = torch.get_rng_state()
    U, S, Vt = truncated_svd(low, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert orthonormal(U.mT) and orthonormal(Vt) and (S[0, 2:] < 1e-12 * S[0, 0]).all()
    torch.testing.assert_close(U * S[:, None] @ Vt, low)
    again = truncated_svd(low, 4)
    assert all(torch.equal(one, other) for one, other in zip((U, S, Vt), again, strict=True))
