"""The sequential step against dense projectors in float64."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grids import rest_slow
from lorapro_hf.functional import reference
from lorapro_hf.functional.bases import ALL_DIRECTIONS, Bases, RowBasis, row_basis
from lorapro_hf.functional.factor_steps import change_through, select, sequential_step, spend_direction
from lorapro_hf.functional.step_options import Rates, StepOptions
from lorapro_hf.kernels.dense import DirectionProducts

pytestmark = pytest.mark.filterwarnings("error")


def random_pairs(K, m, n, r, seed, rank_A=None, rank_B=None, dtype=torch.float64):
    """K pairs in rows layout with factors of the given ranks (full by default), and K dense directions."""
    generator = torch.Generator().manual_seed(seed)

    def rows(length, rank):
        rank = min(r, length) if rank is None else min(rank, r, length)
        left = torch.randn(K, r, rank, generator=generator, dtype=torch.float64)
        right = torch.randn(K, rank, length, generator=generator, dtype=torch.float64)
        return (torch.linalg.qr(left).Q @ torch.linalg.qr(right.mT).Q.mT if rank else left @ right).to(dtype)

    u = torch.randn(K, m, n, generator=generator, dtype=torch.float64)
    return rows(n, rank_A), rows(m, rank_B) * 1.5, u.to(dtype)


def from_products(A, Bt, u, s, rates, **options):
    bases = Bases(row_basis(A), row_basis(Bt, ALL_DIRECTIONS))
    K = u @ bases.A.rows.mT
    products = DirectionProducts(K.mT, bases.B.rows @ u, K.mT @ u)
    return sequential_step(A, Bt, products, s, bases, StepOptions(rates, **options))


class DenseDirection(NamedTuple):
    u: torch.Tensor
    basis_A: RowBasis

    def through_A(self, weights):
        return weights @ (self.u @ self.basis_A.rows.mT).mT

    def rest_through_B(self, weights, basis_B):
        rest = self.u - self.u @ self.basis_A.rows.mT @ self.basis_A.rows
        return weights @ basis_B.rows @ rest


def from_direction(A, Bt, u, s, rates, **options):
    basis_A = row_basis(A)
    return spend_direction(A, Bt, DenseDirection(u, basis_A), s, basis_A, StepOptions(rates, **options))


ROUTES = pytest.mark.parametrize("take", [from_products, from_direction])


def realised(A, Bt, s, rates, step):
    """How far `s B A` has moved from the decayed factors, in float64."""
    of_old = s * (rates.keep_B * Bt.double()).mT @ (rates.keep_A * A.double())
    return s * step.Bt.double().mT @ step.A.double() - of_old


def promised(A, u, rates, new_Bt, rtol=1e-6):
    """`−[lr_B u P_A + lr_A P_B' u (I − P_A)]` by dense projectors, pair by pair."""
    moves = []
    for A_k, u_k, Bt_k in zip(A.double(), u.double(), new_Bt.double(), strict=True):
        inside = u_k @ torch.linalg.pinv(A_k, rtol=1e-6) @ A_k
        P_B = torch.linalg.pinv(Bt_k, rtol=rtol) @ Bt_k
        moves.append(-rates.lr_B * inside - rates.lr_A * P_B @ (u_k - inside))
    return torch.stack(moves)


def assert_close(found, expected, scale, tolerance):
    assert ((found - expected).norm() / scale).item() < tolerance


shapes = st.fixed_dictionaries(
    {
        "K": st.integers(1, 3),
        "m": st.integers(1, 20),
        "n": st.integers(1, 20),
        "r": st.integers(1, 8),
        "seed": st.integers(0, 2**31),
        "rank_A": st.one_of(st.none(), st.integers(0, 5)),
        "rank_B": st.one_of(st.none(), st.integers(0, 5)),
    }
)


@ROUTES
@given(shape=shapes, s=st.floats(0.1, 10), lr=st.floats(0.05, 2))
def test_moves_the_weight_exactly_as_promised_and_never_too_far(take, shape, s, lr):
    A, Bt, u = random_pairs(**shape)
    rates = Rates(lr, lr)
    step = take(A, Bt, u, s, rates)
    moved = realised(A, Bt, s, rates, step)
    assert_close(moved, promised(A, u, rates, step.Bt), lr * u.norm(), 1e-10 * (1 + s / lr))
    lengths, limits = moved.flatten(1).norm(dim=1), lr * u.flatten(1).norm(dim=1)
    assert (lengths <= limits * (1 + 1e-9 * (1 + s / lr))).all()


@ROUTES
@given(shape=shapes, s=st.floats(0.1, 10))
def test_factors_are_those_of_the_dense_formula(take, shape, s):
    A, Bt, u = random_pairs(**shape)
    rates = Rates(0.3, 0.2, keep_A=0.9, keep_B=0.8)
    step = take(A, Bt, u, s, rates)
    for k in range(len(A)):
        new_A, new_B = reference.sequential_step(u[k], 0.9 * A[k], 0.8 * Bt[k].T, s, 0.3, 0.2)
        torch.testing.assert_close(step.A[k], new_A, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(step.Bt[k], new_B.T, rtol=1e-9, atol=1e-9)


@ROUTES
@pytest.mark.parametrize("size_of_B", rest_slow([1e-6, 0.0, 1.0, 1e-3, 1e-12, 1e-20], fast=2))
def test_float32_holds_for_factors_of_any_size(take, size_of_B):
    A, Bt, u = random_pairs(3, 40, 56, 8, seed=1, dtype=torch.float32)
    Bt = Bt * size_of_B
    rates = Rates(0.1, 0.1)
    step = take(A, Bt, u, 2.0, rates)
    moved = realised(A, Bt, 2.0, rates, step)
    assert_close(moved, promised(A, u, rates, step.Bt), 0.1 * u.norm(), 1e-5)


@ROUTES
@pytest.mark.parametrize("decades", rest_slow([4, 3, 2]))
@pytest.mark.parametrize("lr", rest_slow([1e-3, 1e-2, 1e-4]))
def test_float32_holds_where_some_directions_of_B_are_small(take, decades, lr):
    A, Bt, u = random_pairs(2, 256, 192, 8, seed=4)
    left, _, right = torch.linalg.svd(Bt, full_matrices=False)
    Bt = left @ torch.diag(10.0 ** -torch.linspace(0, decades, 8, dtype=torch.float64)) @ right
    A, Bt, u = A.float(), Bt.float(), u.float()
    rates = Rates(lr, lr)
    step = take(A, Bt, u, 2.0, rates)
    absent = (8 * torch.finfo(torch.float32).eps) ** 0.5
    expected = promised(A, u, rates, step.Bt, absent)
    assert_close(realised(A, Bt, 2.0, rates, step), expected, expected.norm(), 1e-6 + 5e-9 / lr)  # roundings of A and B


@ROUTES
def test_from_zero_B_the_weight_takes_the_best_part_of_u_in_the_columns_of_uAt(take):
    A, _, u = random_pairs(2, 12, 17, 3, seed=2)
    step = take(A, torch.zeros(2, 3, 12, dtype=torch.float64), u, 2.0, Rates(0.1, 0.1))
    for k in range(2):
        columns = torch.linalg.qr(u[k] @ A[k].T).Q
        torch.testing.assert_close(2.0 * step.Bt[k].T @ step.A[k], -0.1 * columns @ (columns.T @ u[k]))
    # B alone moves as in the paper, whose A stays where it is.
    _, h_B = reference.factor_gradients(u[0], A[0], torch.zeros(12, 3), 2.0)
    torch.testing.assert_close(step.Bt[0], -0.1 * h_B.T)


@ROUTES
@pytest.mark.parametrize("limit", [None, 0.05])
def test_the_weight_moves_alike_however_the_factors_are_balanced(take, limit):
    A, Bt, u = random_pairs(2, 12, 17, 4, seed=9)
    R = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 2 * torch.eye(4)
    balanced = R @ A, torch.linalg.solve(R.mT, Bt)
    rates, longest = Rates(0.1, 0.1), None if limit is None else torch.full((2,), limit, dtype=torch.float64)
    steps = [take(*factors, u, 2.0, rates, longest=longest) for factors in ((A, Bt), balanced)]
    moved, other = (
        realised(*factors, 2.0, rates, step) for factors, step in zip(((A, Bt), balanced), steps, strict=True)
    )
    torch.testing.assert_close(other, moved, rtol=1e-8, atol=1e-10)


@ROUTES
def test_a_limit_shortens_the_changes_of_both_factors(take):
    A, Bt, u = random_pairs(4, 12, 17, 4, seed=8)
    Bt, A[2], Bt[3] = 1e-2 * Bt, 0, 0
    rates = Rates(0.1, 0.1, 0.9, 0.8)
    limits = [0.05, 1e3, 0.05, 0.05]
    step = take(A, Bt, u, 2.0, rates, longest=torch.tensor(limits, dtype=torch.float64))
    free = take(A, Bt, u, 2.0, rates)
    for k in range(4):
        new_A, new_B = reference.sequential_step(
            u[k], A[k], Bt[k].T, 2.0, 0.1, keep=(0.9, 0.8), longest=2.0 * limits[k]
        )
        torch.testing.assert_close(step.A[k], new_A, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(step.Bt[k].T, new_B, rtol=1e-7, atol=1e-7)
        is_free = torch.equal(step.A[k], free.A[k]) and torch.equal(step.Bt[k], free.Bt[k])
        assert is_free == (limits[k] > 1)
    for found, factor in zip(step.bases(None), (step.A, step.Bt), strict=True):
        assert torch.equal(found.rows, row_basis(factor).rows)


@given(shape=shapes, size_of_B=st.sampled_from([1.0, 1e-3, 0.0]))
def test_a_change_acts_through_the_new_B_without_a_cross_term(shape, size_of_B):
    A, Bt, _ = random_pairs(**shape)
    Bt = size_of_B * Bt
    generator = torch.Generator().manual_seed(shape["seed"] + 1)
    change, change_B = (torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in (A, Bt))
    new_Bt = Bt + 0.1 * change_B
    new_A = A + change_through(change, Bt, row_basis(new_Bt))
    for k in range(len(A)):
        P_B = torch.linalg.pinv(new_Bt[k], rtol=1e-6) @ new_Bt[k]
        promised = P_B @ Bt[k].mT @ change[k] + 0.1 * change_B[k].mT @ A[k]
        found = new_Bt[k].mT @ new_A[k] - Bt[k].mT @ A[k]
        torch.testing.assert_close(found, promised, rtol=1e-8, atol=1e-9)


def test_zero_A_leaves_the_step_to_A():
    _, Bt, u = random_pairs(1, 12, 17, 3, seed=3)
    step = from_products(torch.zeros(1, 3, 17, dtype=torch.float64), Bt, u, 2.0, Rates(0.1, 0.1))
    assert torch.equal(step.Bt, Bt)
    torch.testing.assert_close(step.A[0], -0.05 * torch.linalg.pinv(Bt[0].T) @ u[0])


@ROUTES
def test_rates_and_scalings_may_differ_between_pairs(take):
    A, Bt, u = random_pairs(3, 12, 17, 4, seed=4)
    s, lr_A, lr_B = (torch.tensor(values) for values in ([2.0, 0.5, 1.0], [0.1, 0.2, 0.0], [0.3, 0.1, 0.2]))
    keep_A, keep_B = torch.tensor([1.0, 0.9, 0.8]), torch.tensor(0.7)
    step = take(A, Bt, u, s, Rates(lr_A, lr_B, keep_A, keep_B))
    for k in range(3):
        rates = Rates(*(float(rate) for rate in (lr_A[k], lr_B[k], keep_A[k], keep_B)))
        alone = take(A[k : k + 1], Bt[k : k + 1], u[k : k + 1], float(s[k]), rates)
        torch.testing.assert_close(step.A[k], alone.A[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(step.Bt[k], alone.Bt[0], rtol=1e-9, atol=1e-12)


def test_a_decay_to_nothing_stays_finite():
    A, Bt, u = random_pairs(1, 12, 17, 4, seed=5)
    for keep in (0.0, torch.tensor(0.0)):
        step = from_products(A, Bt, u, 2.0, Rates(0.1, 0.1, keep, keep))
        assert step.A.isfinite().all() and not step.Bt.any()


def test_pairs_that_do_not_take_part_stay_to_the_bit():
    A, Bt, u = random_pairs(3, 12, 17, 4, seed=6, dtype=torch.float32)
    rates = Rates(0.1, 0.1, 0.9, 0.9)
    everyone = from_products(A, Bt, u, 2.0, rates)
    u[1] = float("nan")
    some = from_products(A, Bt, u, 2.0, rates, active=torch.tensor([True, False, True]))
    assert torch.equal(some.A[1], A[1]) and torch.equal(some.Bt[1], Bt[1])
    for k in (0, 2):
        assert torch.equal(some.A[k], everyone.A[k]) and torch.equal(some.Bt[k], everyone.Bt[k])
    torch.testing.assert_close(some.bases(None).B.rows[1], row_basis(Bt).rows[1])


@pytest.mark.parametrize("narrow", ["AB", "A", "B"])
def test_A_follows_the_B_that_is_stored(narrow):
    A, Bt, u = random_pairs(2, 30, 40, 4, seed=7, dtype=torch.float32)
    A, Bt = A.bfloat16().float(), Bt.bfloat16().float()
    rates = Rates(0.1, 0.1)
    dtypes = tuple(torch.bfloat16 if factor in narrow else None for factor in "AB")
    step = from_direction(A, Bt, u, 2.0, rates, factor_dtypes=dtypes)
    assert torch.equal(step.Bt, step.Bt.bfloat16().float()) == ("B" in narrow)
    assert torch.equal(step.A, step.A.bfloat16().float()) == ("A" in narrow)
    for k in range(2):
        rest = u[k] - u[k] @ torch.linalg.pinv(A[k]) @ A[k]
        expected = A[k] - 0.05 * torch.linalg.pinv(step.Bt[k].T) @ rest
        rtol, atol = (2**-8, 1e-5) if "A" in narrow else (1e-5, 1e-6)
        torch.testing.assert_close(step.A[k], expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "offset"), [((3, 4, 6), 0), ((3, 1, 5), 0), ((3, 4, 6), 1), ((3, 7), 0)])
def test_select_copies_bits(dtype, shape, offset):
    count = torch.Size(shape).numel()
    new, old = (torch.randn(count + 1, dtype=dtype)[offset : count + offset].view(shape) for _ in range(2))
    new[1] = float("nan")
    old[2] = -0.0
    found = select(torch.tensor([True, False, False]), new, old)
    assert torch.equal(found[0], new[0]) and torch.equal(found[1], old[1])
    assert found[2].signbit().all() and not found[2].any()
    assert select(None, new, old) is new
    transposed = torch.randn(3, 6, 4, dtype=dtype).mT
    if shape == (3, 4, 6):
        assert torch.equal(select(torch.tensor([False, False, False]), new, transposed), transposed)
