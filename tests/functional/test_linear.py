"""A linear step, with and without a limit, against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapro_hf.functional.bases import factor_gradients_, gradient_coordinates, row_bases
from lorapro_hf.functional.factor_steps import linear_step
from lorapro_hf.functional.reference import kept_fraction
from lorapro_hf.functional.step_options import Rates, StepOptions


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    r=st.integers(1, 5),
    limit=st.sampled_from([None, 1e-3, 0.1, 1e4]),
    sizes=st.tuples(st.sampled_from([1.0, 1e-4, 0.0]), st.sampled_from([1.0, 1e-4, 0.0])),
    seed=st.integers(0, 2**20),
)
def test_step_is_the_longest_that_is_allowed(m, n, r, limit, sizes, seed):
    A, Bt = sizes[0] * random(2, r, n, seed=seed), sizes[1] * random(2, r, m, seed=seed + 1)
    h_A, h_Bt = random(2, r, n, seed=seed + 2), random(2, r, m, seed=seed + 3)
    longest = None if limit is None else torch.tensor([limit, 2 * limit], dtype=torch.float64)
    options = StepOptions(Rates(0.1, 0.2, 0.9, 0.8), longest=longest)
    new_A, new_Bt = linear_step(A, Bt, h_A.clone(), h_Bt.clone(), options)
    for k in range(2):
        step_A, step_B = -0.1 * h_A[k], -0.2 * h_Bt[k].T
        D = (Bt[k].T + step_B) @ (A[k] + step_A) - Bt[k].T @ A[k]
        kept = kept_fraction(D, None if limit is None else (k + 1) * limit)
        torch.testing.assert_close(new_A[k], 0.9 * A[k] + kept * step_A, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(new_Bt[k].T, 0.8 * Bt[k].T + kept * step_B, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size_of_B", [1e-6, 1e-12])
def test_a_tiny_B_does_not_throw_the_weight_away(size_of_B):
    """Without a limit the change of A would be as large as B is small."""
    A, B = torch.eye(3, 8)[None], size_of_B * random(8, 3, seed=7).float()
    Bt, limit = B.mT[None], torch.tensor([0.05], dtype=torch.float64)
    lengths = []
    for g in random(10, 8, 8, seed=8).float():
        bases = row_bases([A, Bt])
        seen = gradient_coordinates(*bases, Bt @ g, A @ g.mT)
        old = Bt.mT @ A
        A, Bt = linear_step(A, Bt, *factor_gradients_(*bases, seen), StepOptions(Rates(0.1, 0.1), longest=limit))
        lengths.append(float(torch.linalg.matrix_norm(Bt.mT @ A - old, 2)))
    assert max(lengths) < 0.06
