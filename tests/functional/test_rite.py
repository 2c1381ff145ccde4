"""LoRA-RITE's steps, against the port in pytorch_optimizer."""

import pytest
import torch

from dense_gradients import assert_near, full_gradients, normal, pairs
from grids import few_of
from lorapro_hf.functional import reference
from lorapro_hf.functional.bases import Bases, coordinate_norms, gradient_coordinates, row_bases
from lorapro_hf.functional.rite import RiteGuards, RiteState, rite_step, unmagnified_norms
from lorapro_hf.functional.step_options import Rates, StepOptions

pytestmark = pytest.mark.filterwarnings("error")

LR, BETAS, EPS = 0.02, (0.9, 0.99), 1e-6
SCALINGS = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)


def zero_state(A, Bt, escape=False):
    K, r, _ = A.shape
    V = torch.zeros(2, K, r, r, dtype=torch.float64)
    rho = torch.zeros(2, K, dtype=torch.float64) if escape else (None, None)
    return RiteState(torch.zeros_like(A), torch.zeros_like(Bt), *V, torch.zeros(K), *rho)


def train(
    A, Bt, gradients, state=None, clip=1.0, skip=1.0, escape=False, active=None, first_step=1, eps=EPS, longest=None
):
    """Take a step for each of the gradients; gives the trajectory of `s B A`, the last factors and the state."""
    s = SCALINGS[: len(A)].to(A.dtype)
    scale, weights = s[:, None, None], []
    state = zero_state(A, Bt, escape) if state is None else state
    within = None if longest is None else longest / s.double()
    options = StepOptions(Rates(LR, LR), BETAS, eps, active=active, longest=within)
    for step, g in enumerate(gradients.to(A.dtype), first_step):
        bases = Bases(*row_bases([A, Bt]))
        gradient = gradient_coordinates(*bases, scale * Bt @ g, scale * A @ g.mT, scale)
        shape = (A.shape[1], Bt.shape[2], A.shape[2])
        norm = torch.cat(unmagnified_norms(coordinate_norms(bases, gradient), s, shape, skip)).norm()
        state.steps.fill_(step)
        A, Bt = rite_step(A, Bt, bases, gradient, s, state, RiteGuards(clip, skip, norm), options)
        weights.append(scale * Bt.mT @ A)
    return torch.stack(weights), (A, Bt), state


def train_peer(A, Bt, gradients, clip=1.0, skip=1.0, escape=False):
    LoRARite = pytest.importorskip("pytorch_optimizer").LoRARite
    factors = [torch.nn.Parameter(factor.clone()) for pair in zip(A, Bt.mT, strict=True) for factor in pair]
    guards = {"clip_unmagnified_grad": clip, "update_skipping": skip, "apply_escape": escape}
    optimizer = LoRARite(factors, lr=LR, betas=BETAS, eps=EPS, **guards)
    weights = []
    for g in gradients:
        for s, one_A, one_B, one_g in zip(SCALINGS, factors[::2], factors[1::2], g, strict=True):
            one_A.grad, one_B.grad = s * one_B.detach().T @ one_g, s * one_g @ one_A.detach().T
        optimizer.step()
        products = [s * B.detach() @ A.detach() for s, A, B in zip(SCALINGS, factors[::2], factors[1::2], strict=True)]
        weights.append(torch.stack(products))
    return torch.stack(weights)


def train_oracle(A, Bt, gradients, **guards):
    settings = {"lr": LR, "betas": BETAS, "eps": EPS, **guards}
    each = [reference.DenseRite(A[k], Bt[k].T, float(s), **settings) for k, s in enumerate(SCALINGS)]
    weights = []
    for g in gradients:
        unmagnified = [part for one, one_g in zip(each, g, strict=True) for part in one.unmagnified(one_g)]
        norm = sum(float(part.square().sum()) for part in unmagnified) ** 0.5
        for one, one_g in zip(each, g, strict=True):
            one.step(one_g, norm)
        weights.append(torch.stack([one.scaling * one.B @ one.A for one in each]))
    return torch.stack(weights)


GUARDS = [{}, {"clip": 0.0, "skip": 0.0}, {"clip": 0.3, "skip": 0.4}, {"escape": True}]


@few_of(shape=[(24, 33, 4), (20, 13, 1), (40, 6, 5)], start=["zero", "random"], guards=GUARDS)
def test_takes_the_steps_of_its_peer(shape, start, guards):
    m, n, r = shape
    A, Bt = pairs(m, n, r, start)
    gradients = full_gradients(m, n, 30)
    weights, expected = train(A, Bt, gradients, **guards)[0], train_peer(A, Bt, gradients, **guards)
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)


@few_of(shape=[(24, 33, 4), (6, 9, 8)], start=["zero", "random"], guards=[*GUARDS, {"longest": 0.05}])
def test_follows_the_dense_oracle_which_takes_the_steps_of_the_peer(shape, start, guards):
    """A rank above one side of the weight included, for which the peer has no inverse."""
    m, n, r = shape
    A, Bt = pairs(m, n, r, start)
    gradients = full_gradients(m, n, 30)
    expected = train_oracle(A, Bt, gradients, **guards)
    weights = train(A, Bt, gradients, **guards)[0]
    if guards.get("longest"):
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)
    elif r <= min(m, n):
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(train_peer(A, Bt, gradients, **guards), expected, rtol=1e-9, atol=1e-12)
    else:  # the roots of Gram matrices know absent directions to the root of the precision
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_pair_alone_is_clipped_at_its_own_norm():
    A, Bt = (factor[:1] for factor in pairs(24, 33, 4))
    gradients = full_gradients(24, 33, 5)[:, :1]
    oracle = reference.DenseRite(A[0], Bt[0].T, 2.0, clip=0.3, lr=LR, betas=BETAS, eps=EPS)
    for g in gradients[:, 0]:
        oracle.step(g)
    assert_near(train(A, Bt, gradients, clip=0.3)[0][-1], (2.0 * oracle.B @ oracle.A)[None], 1e-8)


def test_both_guards_act_in_the_tight_case():
    A, Bt = pairs(24, 33, 4)
    gradients = full_gradients(24, 33, 30)
    free, tight = (train(A, Bt, gradients, clip=clip, skip=skip)[0] for clip, skip in ((0.0, 0.0), (0.3, 0.0)))
    assert (free - tight).norm() > 1e-3 * free.norm()
    assert (train(A, Bt, gradients, clip=0.3, skip=0.4)[0] - tight).norm() > 1e-3 * free.norm()


@pytest.mark.parametrize("guards", GUARDS, ids=["default", "none", "tight", "escape"])
def test_trajectory_does_not_depend_on_how_the_product_is_split(guards):
    A, Bt = pairs(24, 33, 4)
    gradients = full_gradients(24, 33, 30)
    R = normal(3, 4, 4, seed=40) + 3 * torch.eye(4, dtype=torch.float64)
    weights, _, _ = train(A, Bt, gradients, **guards)
    others, _, _ = train(R @ A, torch.linalg.inv(R).mT @ Bt, gradients, **guards)
    assert_near(others, weights, 1e-10)


def test_float32_follows_float64():
    A, Bt = pairs(24, 33, 4, "zero")
    gradients = full_gradients(24, 33, 10)
    assert_near(train(A.float(), Bt.float(), gradients)[0], train(A, Bt, gradients)[0], 1e-4)


@pytest.mark.parametrize("r", [1, 2, 4, 8, 16, 64, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["zero", "deficient"])
def test_every_rank_gives_numbers(r, start):
    """Ranks above both sides of the weight included, and gradients of zeros."""
    A, Bt = pairs(12, 20, r, "zero" if start == "zero" else "random", torch.float32)
    Bt[:, r // 2 :] = 0
    gradients = full_gradients(12, 20, 4)
    gradients[0] = 0
    weights, factors, state = train(A, Bt, gradients, escape=True)
    assert all(x.isfinite().all() for x in (weights, *factors, *state))
    assert not torch.equal(weights[1], weights[0])


def test_pairs_that_do_not_take_part_stay_and_the_others_do_not_notice():
    A, Bt = pairs(24, 33, 4, dtype=torch.float32)
    _, (A, Bt), state = train(A, Bt, full_gradients(24, 33, 2), escape=True)
    before, everyone = (RiteState(*(moment.clone() for moment in state)) for _ in range(2))
    gradients = full_gradients(24, 33, 1, seed=50)
    _, whole, _ = train(A, Bt, gradients, state=everyone, clip=0.0, first_step=3)
    gradients[:, 1] = float("nan")
    active = torch.tensor([True, False, True])
    _, step, _ = train(A, Bt, gradients, state=state, clip=0.0, first_step=3, active=active)
    before.steps.fill_(3)  # the optimizer counts the steps
    for k in range(3):
        same_factors, same_state = (whole, everyone) if k != 1 else ((A, Bt), before)
        assert all(torch.equal(now[k], then[k]) for now, then in zip(step, same_factors, strict=True))
        assert all(torch.equal(now[k], then[k]) for now, then in zip(state, same_state, strict=True))
