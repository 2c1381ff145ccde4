"""Orthogonalised steps in the tangent space, against a dense float64 oracle."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dense_gradients import assert_near, full_gradients, normal, pairs
from grids import few_of
from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.functional import reference
from lorapro_hf.functional.bases import Bases, Coordinates, gradient_coordinates, row_bases
from lorapro_hf.functional.spectral import SpectralState, spectral_direction, spectral_step
from lorapro_hf.functional.step_options import Rates, StepOptions

pytestmark = pytest.mark.filterwarnings("error")

LR, BETAS, DECAY = 0.02, (0.9, 0.99), 0.5
KEEP = (1 - LR * DECAY) ** 0.5
SCALINGS = (2.0, 0.5, 1.0)
LIMIT = 0.05  # of the step of a weight
SHAPES = [(24, 33, 4), (20, 13, 1), (6, 9, 11), (40, 6, 8)]
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def zero_state(A, Bt):
    return SpectralState(torch.zeros_like(A), torch.zeros_like(Bt))


def train(A, Bt, gradients, state=None, rates=None, update="linear", iterations=1, **options):
    """Take a step for each of the gradients; gives the trajectory of `s B A`, the last factors and the state."""
    s = torch.tensor(SCALINGS[: len(A)], dtype=A.dtype)[:, None, None]
    rates, longest = rates or Rates(LR, LR, KEEP, KEEP), LIMIT / s.flatten().double()
    options = StepOptions(rates, BETAS, sequential=update == "sequential", longest=longest, **options)
    state = zero_state(A, Bt) if state is None else state
    weights = []
    for g in gradients.to(A.dtype):
        bases = Bases(*row_bases([A, Bt]))
        gradient = gradient_coordinates(*bases, s * Bt @ g, s * A @ g.mT, s)
        A, Bt = spectral_step(A, Bt, bases, gradient, s.flatten(), state, options, iterations)
        weights.append(s * Bt.mT @ A)
    return torch.stack(weights), (A, Bt), state


def train_oracle(A, Bt, gradients, **settings):
    trajectories = []
    for k in range(len(A)):
        settings = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "longest": LIMIT, **settings}
        oracle = reference.DenseSpectral(A[k], Bt[k].T, SCALINGS[k], **settings)
        weights = []
        for g in gradients[:, k]:
            oracle.step(g)
            weights.append(SCALINGS[k] * oracle.B @ oracle.A)
        trajectories.append(torch.stack(weights))
    return torch.stack(trajectories, dim=1)


@few_of(
    shape=SHAPES,
    start=["zero", "random"],
    update=["sequential", "linear"],
    iterations=[1, 4],
    dtype=list(TOLERANCE),
)
def test_follows_the_dense_oracle(shape, start, update, iterations, dtype):
    m, n, r = shape
    A, Bt = pairs(m, n, r, start, dtype)
    gradients = full_gradients(m, n, 10).to(dtype)
    weights, _, _ = train(A, Bt, gradients, update=update, iterations=iterations)
    expected = train_oracle(A, Bt, gradients, update=update, iterations=iterations)
    assert_near(weights, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("update", ["sequential", "linear"])
def test_follows_the_oracle_from_a_rank_deficient_B(update):
    A, Bt = pairs(24, 33, 6)
    Bt = Bt[:, :2].repeat(1, 3, 1)
    gradients = full_gradients(24, 33, 10)
    assert_near(train(A, Bt, gradients, update=update)[0], train_oracle(A, Bt, gradients, update=update), 1e-8)


@pytest.mark.parametrize("rank", [1, 3])
def test_follows_the_oracle_when_a_batch_has_fewer_tokens_than_the_rank(rank):
    A, Bt = pairs(24, 33, 6)
    gradients = full_gradients(24, 33, 1, rank=rank)
    assert_near(train(A, Bt, gradients)[0], train_oracle(A, Bt, gradients), 1e-8)


@pytest.mark.parametrize("x_mode", ["sylvester", "zero", "symmetric"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_the_first_order_step_is_the_projected_polar_factor(start, x_mode):
    """`−lr · 0.2 √max(m, n) · P_T(polar(N))` of the weight, with N along the first gradient."""
    A, Bt = pairs(24, 33, 4, start)
    g, lr = full_gradients(24, 33, 1), 1e-7
    weights, _, _ = train(A, Bt, g, rates=Rates(lr, lr), x_mode=x_mode)
    for k, s in enumerate(SCALINGS):
        U, S, Vh = torch.linalg.svd(reference.projected_gradient(g[0, k], A[k], Bt[k].T), full_matrices=False)
        polar = U[:, 1e-9 * S[0] < S] @ Vh[1e-9 * S[0] < S]
        expected = -lr * 0.2 * 33**0.5 * reference.projected_gradient(polar, A[k], Bt[k].T)
        moved = weights[0, k] - s * Bt[k].T @ A[k]
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_repeated_orthogonalisation_brings_the_singular_values_of_the_direction_together():
    A, Bt = pairs(24, 33, 4)
    bases = Bases(*row_bases([A, Bt]))
    a, b = gradient_coordinates(*bases, Bt @ full_gradients(24, 33, 1)[0], A @ full_gradients(24, 33, 1)[0].mT)
    farthest = []
    for iterations in (1, 2, 4, 8):
        found = spectral_direction(Coordinates(a, b), bases, None, iterations).coordinates
        u = bases.B.rows.mT @ found.a + found.b.mT @ bases.A.rows
        singular = torch.linalg.svdvals(u / (0.2 * 33**0.5))[:, :8]
        farthest.append((singular - 1).abs().amax().item())
    assert farthest == sorted(farthest, reverse=True) and farthest[-1] < 0.5 * farthest[0]


@pytest.mark.parametrize("step", [{"x_mode": "zero"}, {"x_mode": "symmetric"}, {"update": "sequential"}])
def test_trajectory_does_not_depend_on_how_the_product_is_split(step):
    A, Bt = pairs(24, 33, 4)
    gradients = full_gradients(24, 33, 10)
    R = normal(3, 4, 4, seed=40) + 3 * torch.eye(4, dtype=torch.float64)
    weights, _, _ = train(A, Bt, gradients, **step)
    others, _, _ = train(R @ A, torch.linalg.inv(R).mT @ Bt, gradients, **step)
    torch.testing.assert_close(others, weights, rtol=1e-8, atol=1e-9)


def test_trajectory_does_not_depend_on_the_scale_of_the_gradient():
    A, Bt = pairs(24, 33, 4, "zero")
    gradients = full_gradients(24, 33, 10)
    assert_near(train(A, Bt, 1e-6 * gradients)[0], train(A, Bt, gradients)[0], 1e-9)


@pytest.mark.parametrize("r", [1, 2, 16, 64])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_zero_gradients_and_zero_factors_give_numbers(r, dtype):
    A, Bt = pairs(12, 20, r, "zero", dtype)
    gradients = full_gradients(12, 20, 4)
    gradients[0] = 0
    weights, factors, state = train(A, Bt, gradients)
    assert all(x.isfinite().all() for x in (weights, *factors, *state))
    assert not weights[0].any() and weights[1].any()


@pytest.mark.parametrize("update", ["sequential", "linear"])
def test_pairs_that_do_not_take_part_stay_and_the_others_do_not_notice(update):
    A, Bt = pairs(24, 33, 4, dtype=torch.float32)
    _, (A, Bt), state = train(A, Bt, full_gradients(24, 33, 2), update=update)
    before, everyone = (SpectralState(*(moment.clone() for moment in state)) for _ in range(2))
    gradients = full_gradients(24, 33, 1, seed=50)
    _, whole, _ = train(A, Bt, gradients, state=everyone, update=update)
    gradients[:, 1] = float("nan")
    active = torch.tensor([True, False, True])
    _, step, _ = train(A, Bt, gradients, state=state, update=update, active=active)
    for k in range(3):
        same_factors, same_state = (whole, everyone) if k != 1 else ((A, Bt), before)
        assert all(torch.equal(now[k], then[k]) for now, then in zip(step, same_factors, strict=True))
        assert all(torch.equal(now[k], then[k]) for now, then in zip(state, same_state, strict=True))


@pytest.mark.parametrize("shape", [(20, 5), (5, 20)])
def test_the_intended_direction_of_a_narrow_weight_is_the_step(shape):
    """One side of the momentum has fewer directions than the other."""
    m, n = shape
    model = get_peft_model(nn.Sequential(nn.Linear(n, m, bias=False)), LoraConfig(r=4, target_modules=["0"]))
    optimizer = create_lorapro_optimizer(model.double(), lr=1e-7, mode="spectral", trust_region=0)
    (pair,) = optimizer.pairs
    nn.init.normal_(pair.B)
    gradient = normal(m, n, seed=0)
    pair.A.grad, pair.B.grad = pair.scaling * pair.B.mT @ gradient, pair.scaling * gradient @ pair.A.mT
    before, group = pair.B.detach() @ pair.A.detach(), optimizer.param_groups[0]
    direction = optimizer.rule.intended_direction(
        lambda rows: gradient[rows].clone(), pair.A.detach(), pair.B.detach(), ({}, {}), group
    )(slice(0, m))
    optimizer.step()
    moved = pair.scaling * (pair.B.detach() @ pair.A.detach() - before) / -1e-7
    assert_near(moved, direction, 1e-5)
