"""LoRA-FAIR's change of B equals the optimum of the dense objectives in float64, whatever λ and scale of B."""

from __future__ import annotations

import pytest
import torch

from dense_gradients import normal
from lorapro_hf.functional.aggregation import fair_shift, inner_product, truncated_product

LAMBDAS = (1e-6, 0.01, 10.0)


def clients(m=7, n=9, r=3, count=4, size=1.0, spread=1.0, seed=0):
    """The means B and A of the factors of clients, and the factors of the mean product, all weighted."""
    weights = normal(count, seed=seed).abs()
    weights = weights / weights.sum()
    B = size * (normal(m, r, seed=seed + 1) + spread * normal(count, m, r, seed=seed + 2))
    A = normal(r, n, seed=seed + 3) + spread * normal(count, r, n, seed=seed + 4)
    mean_B, mean_A = (torch.einsum("k,kij->ij", weights, factor) for factor in (B, A))
    return mean_B, mean_A, torch.cat(list(weights[:, None, None] * B), -1), torch.cat(list(A))


def cosine_objective(change, B, A, W, lam):
    product = (B + change) @ A
    return (W * product).sum() / (W.norm() * product.norm()) - lam * change.square().sum()


def climbed(B, A, W, lam, start):
    change = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([change], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -cosine_objective(change, B, A, W, lam)
        value.backward()
        return value

    optimizer.step(loss)
    return cosine_objective(change, B, A, W, lam).item()


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("size", [0.05, 5.0])
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_cosine_is_the_highest_of_the_dense_objective(size, spread, lam):
    B, A, target_B, target_A = clients(size=size, spread=spread)
    W = target_B @ target_A
    change, exists = fair_shift(B, A, target_B, target_A, lam, "cosine")
    at = change.clone().requires_grad_()
    value = cosine_objective(at, B, A, W, lam)
    value.backward()
    assert exists and at.grad.norm() < 1e-10 * max(1, lam * size) / min(1, size)
    starts = (torch.zeros_like(B), W @ torch.linalg.pinv(A) - B, -0.9 * B)
    assert value.item() > max(climbed(B, A, W, lam, start) for start in starts) - 1e-10
    assert value.item() > cosine_objective(torch.zeros_like(B), B, A, W, lam).item()
    assert (B + change).norm() <= B.norm()


@pytest.mark.parametrize("lam", LAMBDAS)
def test_a_slot_that_no_client_uses_changes_nothing(lam):
    B, A, target_B, target_A = clients(r=2)
    expected, _ = fair_shift(B, A, target_B, target_A, lam, "cosine")
    # it is the direction in which A is longest, and orthogonal to the others
    wide_B, wide_A = torch.nn.functional.pad(B, (1, 0)), torch.nn.functional.pad(A, (1, 0, 1, 0))
    wide_A[0, 0] = 10 * A.norm()
    change, exists = fair_shift(wide_B, wide_A, target_B, torch.nn.functional.pad(target_A, (1, 0)), lam, "cosine")
    assert exists
    torch.testing.assert_close(change, torch.nn.functional.pad(expected, (1, 0)), rtol=1e-8, atol=1e-10)


def test_a_mean_that_points_away_stays_only_where_lambda_holds_it():
    B, A, target_B, target_A = clients(spread=2.0)
    away = -(target_B @ target_A) @ torch.linalg.pinv(A)
    change, exists = fair_shift(away, A, target_B, target_A, 1e3, "cosine")
    assert exists and change.norm() < 1e-2 * away.norm()
    at = change.clone().requires_grad_()
    cosine_objective(at, away, A, target_B @ target_A, 1e3).backward()
    assert at.grad.norm() < 1e-8
    change, exists = fair_shift(away, A, target_B, target_A, 1e-4, "cosine")  # better the smaller B is
    assert not exists and not change.any()


@pytest.mark.parametrize("lam", [0.0, *LAMBDAS])
def test_ridge_is_the_least_squares_solution(lam):
    B, A, target_B, target_A = clients(spread=2.0)
    change, exists = fair_shift(B, A, target_B, target_A, lam, "ridge")
    damping = (lam * A.square().sum() / len(A)) ** 0.5 * torch.eye(len(A), dtype=A.dtype)
    goal = torch.cat([target_B @ target_A - B @ A, torch.zeros_like(B)], 1)
    expected = torch.linalg.lstsq(torch.cat([A, damping], 1).mT, goal.mT).solution.mT
    torch.testing.assert_close(change, expected, rtol=1e-10, atol=1e-12)
    assert exists


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
def test_limits(objective):
    B, A, target_B, target_A = clients()
    W = target_B @ target_A
    same_B, same_A = 5 * B[:, None].expand(-1, 4, -1).reshape(len(B), -1) / 20, A.repeat(4, 1)
    assert fair_shift(B, A, same_B, same_A, 0.01, objective)[0].norm() < 1e-14 * B.norm()
    assert fair_shift(B, A, target_B, target_A, 1e12, objective)[0].norm() < 1e-10 * B.norm()
    assert not fair_shift(0 * B, A, 0 * target_B, target_A, 0.01, objective)[0].any()
    best = W @ torch.linalg.pinv(A)
    change, exists = fair_shift(B, A, target_B, target_A, 0.0, objective)
    multiple = (best * B).sum() / best.square().sum() if objective == "cosine" else 1
    torch.testing.assert_close(B + change, multiple * best, rtol=1e-10, atol=1e-12)
    near, _ = fair_shift(B, A, target_B, target_A, 1e-11, objective)
    assert exists and (near - change).norm() < 1e-8 * B.norm()


@pytest.mark.parametrize("objective", ["cosine", "ridge"])
def test_dependent_rows_and_batches(objective):
    B, A, target_B, target_A = clients(spread=2.0)
    A[2] = A[0]
    alone, _ = fair_shift(B, A, target_B, target_A, 0.01, objective)
    assert alone.isfinite().all() and (alone[:, 0] - alone[:, 2]).abs().max() < 1e-10
    other = clients(spread=2.0, seed=20)
    packed = (torch.stack(parts) for parts in zip((B, A, target_B, target_A), other, strict=True))
    together, exists = fair_shift(*packed, 0.01, objective)
    assert exists.tolist() == [True, True]
    torch.testing.assert_close(together[0], alone)
    torch.testing.assert_close(together[1], fair_shift(*other, 0.01, objective)[0])


def test_truncation_and_inner_product_equal_the_dense_ones():
    _, _, B, A = clients()
    other_B, other_A, _, _ = clients(seed=9)
    W = B @ A
    torch.testing.assert_close(inner_product(B, A, other_B, other_A), (W * (other_B @ other_A)).sum())
    for rank in (2, 7):
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        left, right = truncated_product(B, A, rank)
        torch.testing.assert_close(left @ right, U[:, :rank] * S[:rank] @ Vt[:rank])
        torch.testing.assert_close(left.norm(), right.norm())
