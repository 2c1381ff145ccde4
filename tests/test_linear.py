"""A linear step, with and without a trust region, against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapro_hf.linear import linear_step
from lorapro_hf.reference import largest_share
from lorapro_hf.sequential import Rates


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
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
    rates = Rates(0.1, 0.2, 0.9, 0.8, limit)
    new_A, new_Bt = linear_step(A, Bt, h_A.clone(), h_Bt.clone(), rates)
    for k in range(2):
        old_A, old_B = 0.9 * A[k], 0.8 * Bt[k].T
        step_A, step_B = -0.1 * h_A[k], -0.2 * h_Bt[k].T
        share = 1.0
        if limit is not None:
            share = largest_share(old_A, old_B, lambda x, a=step_A, b=step_B: (x * a, x * b), limit)
        torch.testing.assert_close(new_A[k], old_A + share * step_A, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(new_Bt[k].T, old_B + share * step_B, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_trust_region_does_not_depend_on_how_the_factors_share_their_size(scale):
    A, Bt, h_A, h_Bt = random(4, 1, 3, 8, seed=5)
    rates = Rates(0.1, 0.1, trust_region=0.05)
    plain = linear_step(A, 1e-2 * Bt, h_A.clone(), h_Bt.clone(), rates)
    other = linear_step(scale * A, 1e-2 / scale * Bt, scale * h_A, h_Bt / scale, rates)
    torch.testing.assert_close(other[0] / scale, plain[0])
    torch.testing.assert_close(other[1] * scale, plain[1])
    assert not torch.allclose(plain[0], linear_step(A, 1e-2 * Bt, h_A, h_Bt, Rates(0.1, 0.1))[0])


@pytest.mark.parametrize("size_of_B", [1e-3, 1e-15, 1e-25, 1e-30])
def test_a_trust_region_holds_in_float32_whatever_the_size_of_B(size_of_B):
    A, Bt, h_A, h_Bt = (x.float() for x in random(4, 1, 3, 8, seed=6))
    Bt, h_A = size_of_B * Bt, h_A / size_of_B
    new_A, new_Bt = linear_step(A, Bt, h_A.clone(), h_Bt, Rates(1e-3, 1e-3, trust_region=0.1))
    step_A, step_B = (new_A - A)[0].double(), (new_Bt - Bt)[0].double().T
    first_order = step_B @ A[0].double() + Bt[0].double().T @ step_A
    torch.testing.assert_close((step_B @ step_A).norm(), 0.1 * first_order.norm(), rtol=1e-4, atol=0)


def test_a_step_that_asks_for_nothing_is_no_division_by_zero():
    A, Bt = random(2, 3, 8, seed=1)[:, None]
    new = linear_step(A, Bt, torch.zeros_like(A), torch.zeros_like(Bt), Rates(0.1, 0.1, trust_region=0.1))
    assert torch.equal(new[0], A) and torch.equal(new[1], Bt)
