"""How far a step may go, against singular values of the dense step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapro_hf.functional import reference
from lorapro_hf.functional.bases import factor_gradients_, gradient_coordinates, row_bases
from lorapro_hf.functional.factor_steps import linear_step
from lorapro_hf.functional.step_limit import bulk_edge, kept_fraction
from lorapro_hf.functional.step_options import Rates, StepOptions


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(A, Bt, step_A, step_Bt):
    return step_Bt.mT @ A + (Bt + step_Bt).mT @ step_A


sizes = st.tuples(*[st.sampled_from([1.0, 1e-6, 1e9, 0.0])] * 4)


@given(
    m=st.integers(1, 9), n=st.integers(1, 9), r=st.integers(1, 5), sizes=sizes, limit=st.sampled_from([0.0, 1e-3, 1e30])
)
def test_the_kept_step_has_the_largest_norm_that_is_allowed(m, n, r, sizes, limit):
    factors = [size * random(2, r, k, seed=m + i) for i, (size, k) in enumerate(zip(sizes, (n, m, n, m), strict=True))]
    kept = kept_fraction(*factors, torch.tensor([limit, 1e30], dtype=torch.float64))
    assert kept.shape == (2, 1, 1) and kept[1] == 1
    D = moved(*factors)[0]
    torch.testing.assert_close(float(kept[0]), reference.kept_fraction(D, limit), rtol=1e-6, atol=0)
    if limit and kept[0] < 1:
        largest = float(kept[0]) * torch.linalg.matrix_norm(D, 2)
        assert limit * (2 * r) ** (-1 / 16) <= largest * (1 + 1e-6) and largest <= limit * (1 + 1e-6)


def test_the_kept_fraction_does_not_depend_on_how_the_weight_is_split():
    A, Bt, step_A, step_Bt = random(4, 3, 4, 12, seed=5)
    R = random(3, 4, 4, seed=6) + 2 * torch.eye(4)
    other = torch.linalg.solve(R, A), R.mT @ Bt, torch.linalg.solve(R, step_A), R.mT @ step_Bt
    limit = torch.tensor([0.1, 1.0, 1e4], dtype=torch.float64)
    kept = kept_fraction(A, Bt, step_A, step_Bt, limit)
    torch.testing.assert_close(kept_fraction(*other, limit), kept, rtol=1e-9, atol=0)
    assert kept[0] < kept[1] < 1 == kept[2]


@pytest.mark.parametrize("size", [1e-12, 1e-25, 1e-36])
def test_no_size_of_the_factors_overflows_or_vanishes(size):
    """Those of A and B, and a change of A that is as large as B is small."""
    A, Bt, step_A, step_Bt = random(4, 1, 3, 8, seed=3).float()
    limit = torch.tensor([0.1], dtype=torch.float64)
    expected = kept_fraction(A, Bt, step_A, step_Bt, limit)
    torch.testing.assert_close(kept_fraction(A / size, size * Bt, step_A / size, size * step_Bt, limit), expected)
    torch.testing.assert_close(kept_fraction(size * A, Bt / size, size * step_A, step_Bt / size, limit), expected)
    factors = A, size * Bt, step_A / size, step_Bt
    D = moved(*(x.double() for x in factors))[0]
    torch.testing.assert_close(
        float(kept_fraction(*factors, limit)), reference.kept_fraction(D, 0.1), rtol=1e-6, atol=0
    )


def test_a_step_is_limited_where_its_terms_all_but_cancel():
    A, g, B = (random(*shape, seed=i) for i, shape in enumerate([(8, 40), (48, 40), (48, 8)]))
    B *= torch.logspace(0, -2.5, 8, dtype=torch.float64)  # almost as small as a direction may be in float32
    A, Bt, g = A[None].float(), B.mT[None].float(), g.float()
    bases = row_bases([A, Bt])
    h_A, h_Bt = factor_gradients_(*bases, gradient_coordinates(*bases, Bt @ g, A @ g.mT), 1.0, "symmetric")
    shift = 1e3 * random(1, 8, 8, seed=4).float()
    h_A, h_Bt = h_A + shift @ A, h_Bt - shift.mT @ Bt  # which leaves the step as it is
    D = moved(*(x.double() for x in (A, Bt, h_A, h_Bt)))[0]
    limit = 0.1 * float(torch.linalg.matrix_norm(D, 2))
    kept = float(kept_fraction(A, Bt, h_A, h_Bt, torch.tensor([limit], dtype=torch.float64)))
    assert kept == pytest.approx(reference.kept_fraction(D, limit), rel=1e-4)


def test_the_edge_is_that_of_the_singular_values_of_a_random_weight():
    W = 0.3 * random(400, 300, seed=1)
    edge = bulk_edge(W.square().sum(), 400, 300)
    assert float(edge) == pytest.approx(0.3 * (400**0.5 + 300**0.5), rel=0.01)
    assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(float(edge), rel=0.03)


def test_pairs_that_are_not_active_stay_and_nan_does_not_spread():
    A, Bt, h_A, h_Bt = random(4, 3, 2, 8, seed=4)
    h_A[1] = float("nan")
    longest = torch.tensor([0.01, 0.01, 1e9], dtype=torch.float64)
    options = StepOptions(Rates(0.1, 0.1), active=torch.tensor([True, False, True]), longest=longest)
    new_A, new_Bt = linear_step(A, Bt, h_A.clone(), h_Bt.clone(), options)
    assert torch.equal(new_A[1], A[1]) and torch.equal(new_Bt[1], Bt[1])
    free = linear_step(A, Bt, h_A.clone(), h_Bt.clone(), StepOptions(Rates(0.1, 0.1)))
    assert torch.equal(new_A[2], free[0][2]) and torch.equal(new_Bt[2], free[1][2])
    D = moved(A, Bt, free[0] - A, free[1] - Bt)[0]
    length = float((torch.linalg.svdvals(D) ** 16).sum() ** (1 / 16))
    torch.testing.assert_close(new_A[0] - A[0], 0.01 / length * (free[0] - A)[0])
    torch.testing.assert_close(new_Bt[0] - Bt[0], 0.01 / length * (free[1] - Bt)[0])
    assert free[0][1].isnan().any()  # which the check of the gradients finds before
