"""A linear step, with and without a trust region, against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapro_hf.functional.bases import factor_gradients_, gradient_coordinates, row_bases
from lorapro_hf.functional.factor_steps import linear_step
from lorapro_hf.functional.reference import kept_fractions
from lorapro_hf.functional.step_options import Rates, StepOptions


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    r=st.integers(1, 5),
    limit=st.sampled_from([None, 1e-3, 0.1, 1.0, 1e4]),
    sizes=st.tuples(st.sampled_from([1.0, 1e-4, 0.0]), st.sampled_from([1.0, 1e-4, 0.0])),
    seed=st.integers(0, 2**20),
)
def test_step_is_the_longest_that_the_trust_region_allows(m, n, r, limit, sizes, seed):
    A, Bt = sizes[0] * random(2, r, n, seed=seed), sizes[1] * random(2, r, m, seed=seed + 1)
    h_A, h_Bt = random(2, r, n, seed=seed + 2), random(2, r, m, seed=seed + 3)
    options = StepOptions(Rates(0.1, 0.2, 0.9, 0.8, limit))
    new_A, new_Bt = linear_step(A, Bt, h_A.clone(), h_Bt.clone(), options)
    for k in range(2):
        old_A, old_B = 0.9 * A[k], 0.8 * Bt[k].T
        step_A, step_B = -0.1 * h_A[k], -0.2 * h_Bt[k].T
        of_A, of_B = (1.0, 1.0) if limit is None else kept_fractions(old_A, old_B, step_A, step_B, limit)
        torch.testing.assert_close(new_A[k], old_A + of_A * step_A, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(new_Bt[k].T, old_B + of_B * step_B, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_trust_region_does_not_depend_on_how_the_factors_share_their_size(scale):
    A, Bt, h_A, h_Bt = random(4, 1, 3, 8, seed=5)
    options = StepOptions(Rates(0.1, 0.1, trust_region=0.05))
    plain = linear_step(A, 1e-2 * Bt, h_A.clone(), h_Bt.clone(), options)
    other = linear_step(scale * A, 1e-2 / scale * Bt, scale * h_A, h_Bt / scale, options)
    torch.testing.assert_close(other[0] / scale, plain[0])
    torch.testing.assert_close(other[1] * scale, plain[1])
    assert not torch.allclose(plain[0], linear_step(A, 1e-2 * Bt, h_A, h_Bt, StepOptions(Rates(0.1, 0.1)))[0])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_trust_region_holds_where_the_terms_of_first_order_all_but_cancel(seed):
    A, g, left, right = (random(*shape, seed=seed + i) for i, shape in enumerate([(8, 40), (48, 40), (48, 3), (3, 8)]))
    A, B, g = (x.float() for x in (0.1 * A, left @ right, g))
    Bt = B.mT[None].contiguous()
    bases = row_bases([A[None], Bt], 0.0)  # keeps the directions of B that are nothing but roundings
    seen = gradient_coordinates(*bases, (B.mT @ g)[None], (A @ g.mT)[None])
    new_A, new_Bt = linear_step(
        A[None], Bt, *factor_gradients_(*bases, seen), StepOptions(Rates(1e-3, 1e-3, trust_region=0.03))
    )
    step_A, step_B = (new_A[0] - A).double(), (new_Bt - Bt)[0].double().T
    assert (step_B @ step_A).norm() <= 0.031 * (step_B @ A.double() + B.double() @ step_A).norm()


def stepped(B, gradients, rates):
    """A and B after a linear step along each gradient, from an A of ones on the diagonal."""
    A = torch.eye(3, 8, dtype=B.dtype)[None]
    Bt = B.mT[None]
    for g, lr in zip(gradients, rates, strict=True):
        bases = row_bases([A, Bt])
        seen = gradient_coordinates(*bases, (Bt[0] @ g)[None], (A[0] @ g.mT)[None])
        A, Bt = linear_step(
            A, Bt, *factor_gradients_(*bases, seen, 1.0, "sylvester"), StepOptions(Rates(lr, lr, trust_region=0.03))
        )
    return A[0], Bt[0].mT


@pytest.mark.parametrize("size_of_B", [1e-8, 1e-12, 1e-25, 1e-36])
def test_a_tiny_B_counts_as_zero(size_of_B):
    B, gradients = random(8, 3, seed=7).float(), random(12, 8, 8, seed=8).float()
    tiny, zero = (stepped(x, gradients, [0.1] * 12) for x in (size_of_B * B, 0 * B))
    for one, other in zip(tiny, zero, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_first_step_at_a_tiny_rate_does_not_hold_up_those_that_follow():
    gradients = random(13, 8, 8, seed=8)
    held_up = stepped(torch.zeros(8, 3, dtype=torch.float64), gradients, [1e-9] + [0.1] * 12)
    for one, other in zip(
        held_up, stepped(torch.zeros(8, 3, dtype=torch.float64), gradients[1:], [0.1] * 12), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_step_that_asks_for_nothing_is_no_division_by_zero():
    A, Bt = random(2, 3, 8, seed=1)[:, None]
    new = linear_step(A, Bt, torch.zeros_like(A), torch.zeros_like(Bt), StepOptions(Rates(0.1, 0.1, trust_region=0.1)))
    assert torch.equal(new[0], A) and torch.equal(new[1], Bt)


@pytest.mark.parametrize("limit", [0.03, 0.5, 0.99, 1.5])
def test_only_a_limit_below_1_keeps_the_step_on_the_side_that_was_meant(limit):
    """A = B = 1, and both are asked to change by -3: the product of the changes outweighs the rest."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    new_A, new_Bt = linear_step(one, one, 3 * one, 3 * one, StepOptions(Rates(1.0, 1.0, trust_region=limit)))
    assert (new_A * new_Bt < 1) == (limit < 1)
