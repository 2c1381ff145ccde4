"""AdamW with moments of the size of the factors, against a dense float64 oracle."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dense_gradients import assert_near, full_gradients, normal, pairs
from grids import few_of, rest_slow
from lorapro_hf.functional import reference
from lorapro_hf.functional.bases import Bases, gradient_coordinates, row_bases
from lorapro_hf.functional.factored import (
    FactoredState,
    adam_direction,
    factored_step,
    mean_squares,
    transport,
)
from lorapro_hf.functional.step_options import Rates, StepOptions

pytestmark = pytest.mark.filterwarnings("error")

LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.99), 1e-8, 0.5
KEEP = (1 - LR * DECAY) ** 0.5
LIMIT = 0.1  # of the step of a weight
RATES = Rates(LR, LR, KEEP, KEEP)
SCALINGS = (2.0, 0.5, 1.0)


def new_factored_state(A, Bt):
    column, row = A.new_zeros(len(A), A.shape[-1]), A.new_zeros(len(Bt), Bt.shape[-1])
    return FactoredState(torch.zeros_like(A), torch.zeros_like(Bt), column, row, torch.zeros(len(A)))


def train(
    A,
    Bt,
    gradients,
    s=SCALINGS,
    state=None,
    rates=RATES,
    betas=BETAS,
    eps=EPS,
    handed_on=None,
    update="linear",
    **options,
):
    """Take a step for each of the gradients; gives the trajectory of `s B A`, the last factors and the state."""
    s = torch.tensor(s[: len(A)], dtype=A.dtype)[:, None, None]
    options = StepOptions(rates, betas, eps, update == "sequential", longest=LIMIT / s.flatten().double(), **options)
    state = new_factored_state(A, Bt) if state is None else state
    weights = []
    for g in gradients.to(A.dtype):
        grad_A, grad_Bt = s * Bt @ g, s * A @ g.mT
        bases = handed_on or Bases(*row_bases([A, Bt]))
        gradient = gradient_coordinates(*bases, grad_A, grad_Bt, s)
        step = factored_step(A, Bt, bases, gradient, s.flatten(), state, options)
        A, Bt = step.A, step.Bt
        weights.append(s * Bt.mT @ A)
    return torch.stack(weights), step, state


def train_oracle(A, Bt, gradients, s=SCALINGS, eps=EPS, **options):
    trajectories = []
    for k in range(len(A)):
        setting = {"lr": LR, "betas": BETAS, "eps": eps, "weight_decay": DECAY, "longest": LIMIT, **options}
        oracle = reference.DenseFactoredAdamW(A[k], Bt[k].T, s[k], **setting)
        weights = []
        for g in gradients[:, k]:
            oracle.step(g)
            weights.append(s[k] * oracle.B @ oracle.A)
        trajectories.append(torch.stack(weights))
    return torch.stack(trajectories, dim=1)


TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
SHAPES = [(24, 33, 4), (20, 13, 1), (6, 9, 11), (40, 6, 8)]


@few_of(shape=SHAPES, start=["zero", "random"], update=["sequential", "linear"], dtype=list(TOLERANCE))
def test_follows_the_dense_oracle(shape, start, update, dtype):
    m, n, r = shape
    A, Bt = pairs(m, n, r, start, dtype)
    gradients = full_gradients(m, n, 8).to(dtype)
    weights, _, state = train(A, Bt, gradients, update=update)
    assert_near(weights, train_oracle(A, Bt, gradients, update=update), TOLERANCE[dtype])
    assert state.steps.tolist() == [8, 8, 8]


@pytest.mark.parametrize("dtype", rest_slow(TOLERANCE))
@pytest.mark.parametrize("start", ["zero", "random"])
def test_follows_the_oracle_when_a_batch_has_fewer_tokens_than_the_rank(start, dtype):
    A, Bt = pairs(24, 33, 6, start, dtype)
    gradients = full_gradients(24, 33, 8, rank=2)  # of that rank exactly only where they are not rounded
    weights, _, _ = train(A, Bt, gradients)
    assert_near(weights, train_oracle(A, Bt, gradients), TOLERANCE[dtype])


@pytest.mark.parametrize("x_mode", ["sylvester", "zero", "symmetric"])
def test_linear_step_takes_each_x_mode(x_mode):
    A, Bt = pairs(24, 33, 4)
    gradients = full_gradients(24, 33, 6)
    weights, _, _ = train(A, Bt, gradients, update="linear", x_mode=x_mode)
    assert_near(weights, train_oracle(A, Bt, gradients, update="linear", x_mode=x_mode), 1e-8)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
def test_rows_and_columns_without_gradient(eps):
    A, Bt = pairs(24, 33, 4)
    A[..., 5:9], Bt[..., :3] = 0, 0
    gradients = full_gradients(24, 33, 7)
    gradients[..., 5:9] = 0
    gradients[..., :3, :] = 0
    gradients[0] = 0
    weights, _, state = train(A, Bt, gradients, eps=eps)
    assert weights.isfinite().all() and all(moment.isfinite().all() for moment in state)
    assert not weights[..., 5:9].any() and not weights[..., :3, :].any()
    assert_near(weights, train_oracle(A, Bt, gradients, eps=eps), 1e-8)


def with_bases(m, n, r, seed=0, start="random", dtype=torch.float64):
    A, Bt = pairs(m, n, r, start, dtype, seed=seed)
    return A, Bt, Bases(*row_bases([A, Bt]))


def means(grad_A, grad_Bt, bases):
    return mean_squares(gradient_coordinates(*bases, grad_A, grad_Bt), bases)


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_mean_squares_are_exact(m, n, r, start):
    A, Bt, bases = with_bases(m, n, r, start=start)
    g = full_gradients(m, n, 1)[0]
    column, row = means(Bt @ g, A @ g.mT, bases)
    for k in range(3):
        squares = reference.projected_gradient(g[k], A[k], Bt[k].T) ** 2
        torch.testing.assert_close(column[k], squares.mean(0), rtol=1e-10, atol=1e-16)
        torch.testing.assert_close(row[k], squares.mean(1), rtol=1e-10, atol=1e-16)


def test_mean_squares_keep_small_rows_apart_in_float32():
    A, Bt, bases = with_bases(24, 33, 4, dtype=torch.float32)
    g = full_gradients(24, 33, 1)[0].float()
    g[:, 3] *= 1e-3
    Bt[..., 3] *= 1e-3
    bases = Bases(*row_bases([A, Bt]))
    column, row = means(Bt @ g, A @ g.mT, bases)
    for k in range(3):
        squares = reference.projected_gradient(g[k], A[k], Bt[k].T) ** 2
        torch.testing.assert_close(column[k].double(), squares.mean(0), rtol=1e-4, atol=0)
        torch.testing.assert_close(row[k].double(), squares.mean(1), rtol=1e-4, atol=0)


def dense_moment(M_a, M_b, bases):
    return bases.B.rows.mT @ M_a + M_b.mT @ bases.A.rows


def tangent_moment(A, Bt, bases, seed):
    """A random first moment in the tangent space: coordinates in the bases, and the dense matrices."""
    m, n = Bt.shape[-1], A.shape[-1]
    g = normal(len(A), m, n, seed=seed).to(A.dtype)
    M_a, M_b = gradient_coordinates(*bases, Bt @ g, A @ g.mT)
    return M_a, M_b, dense_moment(M_a, M_b, bases).double()


@pytest.mark.parametrize("start", ["zero", "random"])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_transport_is_the_projection_on_the_new_tangent_space(m, n, r, start):
    A, Bt, old = with_bases(m, n, r, start=start)
    new_A, new_Bt, new = with_bases(m, n, r, seed=20)
    M_a, M_b, dense = tangent_moment(A, Bt, old, seed=30)
    left, right = torch.cat([old.B.rows, M_b], dim=1), torch.cat([M_a, old.A.rows], dim=1)
    new_M_a, new_M_b = transport(left, right, new)
    polar_A, polar_B = new.A.vectors @ new.A.rows, new.B.vectors @ new.B.rows
    expected = torch.stack([reference.projected_gradient(dense[k], new_A[k], new_Bt[k].T) for k in range(3)])
    found = polar_B.mT @ new_M_a + new_M_b.mT @ polar_A
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(new_M_b @ polar_B.mT, torch.zeros(3, r, r, dtype=torch.float64), rtol=0, atol=1e-12)
    same_M_a, same_M_b = transport(left, right, old)
    torch.testing.assert_close(same_M_a, old.B.vectors @ M_a)
    torch.testing.assert_close(same_M_b, old.A.vectors @ M_b)


def test_direction_is_the_quotient_of_the_moments():
    A, Bt, bases = with_bases(24, 33, 4)
    M_a, M_b, dense = tangent_moment(A, Bt, bases, seed=30)
    row, steps = normal(3, 24, seed=1) ** 2, torch.tensor([1.0, 2.0, 30.0])
    column = normal(3, 33, seed=2) ** 2
    column *= row.mean(-1, keepdim=True) / column.mean(-1, keepdim=True)
    u = adam_direction(FactoredState(M_a, M_b, column, row, steps), bases, BETAS, 0.0)
    t = steps.double()[:, None, None]
    V = row[..., None] * column[:, None] / row.mean(-1)[:, None, None] / (1 - BETAS[1] ** t)
    expected = dense / (1 - BETAS[0] ** t) / V.sqrt()
    found = (u.left * u.row).mT @ (u.right * u.column)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights, (_, _, others) = normal(3, 4, 4, seed=3), with_bases(24, 33, 4, seed=20)
    through_A = weights @ (expected @ bases.A.rows.mT).mT
    torch.testing.assert_close(u.through_A(weights), through_A, rtol=1e-9, atol=1e-9)
    rest = expected - expected @ bases.A.rows.mT @ bases.A.rows
    through_B = weights @ others.B.rows @ rest
    torch.testing.assert_close(u.rest_through_B(weights, others.B), through_B, rtol=1e-9, atol=1e-9)


def polar(F):
    """The closest partial isometry to a matrix."""
    U, S, Vh = torch.linalg.svd(F, full_matrices=False)
    present = 1e-6 * S[0] < S
    return U[:, present] @ Vh[present]


@pytest.mark.parametrize("rank", [1, 6])
def test_state_is_kept_in_the_coordinates_of_the_polar_factors(rank):
    A, Bt = pairs(24, 33, 6, "zero", K=1)
    gradients = full_gradients(24, 33, 3, rank=rank, K=1)
    _, step, state = train(A, Bt, gradients)
    hyper = {"lr": LR, "betas": BETAS, "weight_decay": DECAY, "longest": LIMIT}
    oracle = reference.DenseFactoredAdamW(A[0], Bt[0].T, 2.0, **hyper)
    for g in gradients[:, 0]:
        oracle.step(g)
    polar_A, polar_B = polar(step.A[0]), polar(step.Bt[0].T)
    torch.testing.assert_close(state.M_a[0], polar_B.T @ oracle.M, rtol=1e-7, atol=1e-9)
    rest = oracle.M - polar_B @ polar_B.T @ oracle.M
    torch.testing.assert_close(state.M_b[0].T, rest @ polar_A.T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(state.column[0], oracle.column, rtol=1e-8, atol=0)
    torch.testing.assert_close(state.row[0], oracle.row, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("orthogonal", "step"),
    [
        (True, {}),
        (False, {"x_mode": "zero"}),
        (False, {"x_mode": "symmetric"}),
        (False, {"update": "sequential"}),
    ],
)
def test_trajectory_does_not_depend_on_how_the_product_is_split(orthogonal, step):
    A, Bt = pairs(24, 33, 4)
    gradients = full_gradients(24, 33, 8)
    R = normal(3, 4, 4, seed=40)
    R = torch.linalg.qr(R).Q if orthogonal else R + 3 * torch.eye(4, dtype=R.dtype)
    weights, _, _ = train(A, Bt, gradients, **step)
    others, _, _ = train(R @ A, torch.linalg.inv(R).mT @ Bt, gradients, **step)
    torch.testing.assert_close(others, weights, rtol=1e-8, atol=1e-9)


def test_trajectory_does_not_depend_on_the_scale_of_the_gradient():
    A, Bt = pairs(24, 33, 4, "zero")
    gradients = full_gradients(24, 33, 8)
    weights, _, _ = train(A, Bt, gradients, eps=0.0)
    others, _, _ = train(A, Bt, 1e-6 * gradients, eps=0.0)
    torch.testing.assert_close(others, weights, rtol=1e-9, atol=1e-11)


def copy_of(state):
    return FactoredState(*(moment.clone() for moment in state))


@pytest.mark.parametrize("update", ["sequential", "linear"])
@pytest.mark.parametrize("taken_before", [0, 3])
@pytest.mark.parametrize("broken", rest_slow([float("nan"), float("inf")]))
def test_a_step_that_is_off_changes_nothing(broken, taken_before, update):
    A, Bt = pairs(24, 33, 4, "zero" if taken_before == 0 else "random", torch.float32)
    state = new_factored_state(A, Bt)
    if taken_before:
        _, (A, Bt, _), state = train(A, Bt, full_gradients(24, 33, taken_before), state=state)
    before = copy_of(state)
    gradients = full_gradients(24, 33, 1)
    gradients[..., 2, 3] = broken
    _, step, _ = train(A, Bt, gradients, state=state, update=update, active=torch.tensor(False).expand(3))
    assert torch.equal(step.A, A) and torch.equal(step.Bt, Bt)
    assert all(torch.equal(now, then) for now, then in zip(state, before, strict=True))


@pytest.mark.parametrize("update", ["sequential", "linear"])
def test_pairs_that_do_not_take_part_stay_and_the_others_do_not_notice(update):
    A, Bt = pairs(24, 33, 4, dtype=torch.float32)
    _, (A, Bt, _), state = train(A, Bt, full_gradients(24, 33, 2), update=update)
    before, everyone = copy_of(state), copy_of(state)
    gradients = full_gradients(24, 33, 1, seed=50)
    _, whole, _ = train(A, Bt, gradients, state=everyone, update=update)
    gradients[:, 1] = float("nan")
    active = torch.tensor([True, False, True])
    _, step, _ = train(A, Bt, gradients, state=state, update=update, active=active)
    assert torch.equal(step.A[1], A[1]) and torch.equal(step.Bt[1], Bt[1])
    assert all(torch.equal(now[1], then[1]) for now, then in zip(state, before, strict=True))
    for k in (0, 2):
        assert torch.equal(step.A[k], whole.A[k]) and torch.equal(step.Bt[k], whole.Bt[k])
        assert all(torch.equal(now[k], other[k]) for now, other in zip(state, everyone, strict=True))


def test_bases_handed_on_are_those_of_the_new_factors():
    A, Bt = pairs(24, 33, 4)
    gradients = full_gradients(24, 33, 2)
    _, first, state = train(A, Bt, gradients[:1])
    alike = copy_of(state)
    fresh, _, _ = train(first.A, first.Bt, gradients[1:], state=state)
    handed_on, _, _ = train(first.A, first.Bt, gradients[1:], state=alike, handed_on=first.bases)
    torch.testing.assert_close(handed_on, fresh, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("update", ["sequential", "linear"])
def test_moment_belongs_to_the_factors_as_they_are_stored(update):
    A, Bt = (factor.bfloat16().float() for factor in pairs(24, 33, 4, dtype=torch.float32))
    stored = {"factor_dtypes": (torch.bfloat16, torch.bfloat16)}
    _, step, state = train(A, Bt, full_gradients(24, 33, 3), update=update, **stored)
    assert torch.equal(step.A, step.A.bfloat16().float()) and torch.equal(step.Bt, step.Bt.bfloat16().float())
    overlap = state.M_b @ step.Bt.mT
    assert overlap.norm() < 1e-5 * state.M_b.norm() * step.Bt.norm()


class Watch(TorchDispatchMode):
    """Records the shapes of all results, and refuses what would wait for a value."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.WAITS, function
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.shapes.append(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("update", ["sequential", "linear"])
def test_forms_nothing_of_the_size_of_the_weight_and_waits_for_nothing(update):
    m, n, r = 61, 73, 3
    counts = []
    for K in (2, 5):
        A, Bt = pairs(m, n, r, K=K)
        state = new_factored_state(A, Bt)
        grad_A, grad_Bt = normal(K, r, n, seed=1), normal(K, r, m, seed=2)
        active = torch.ones(K, dtype=torch.bool)
        options = StepOptions(RATES, BETAS, EPS, update == "sequential", active=active)
        with Watch() as watch:
            bases = Bases(*row_bases([A, Bt]))
            gradient = gradient_coordinates(*bases, grad_A, grad_Bt)
            factored_step(A, Bt, bases, gradient, torch.ones(K), state, options)
        assert all(sum(size in (m, n) for size in shape) <= 1 for shape in watch.shapes)
        assert max(torch.Size(shape).numel() for shape in watch.shapes) <= K * 2 * r * n
        counts.append(len(watch.shapes))
    assert counts[0] == counts[1] > 20
    with Watch() as watch:
        _ = Bt.mT @ A
    assert (K, m, n) in watch.shapes  # what the test looks for it would see
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watch():
        A[0, 0, 0].item()
