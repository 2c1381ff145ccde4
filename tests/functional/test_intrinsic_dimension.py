"""TwoNN against scikit-dimension's values and a dense formula in NumPy, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorapro_hf import intrinsic_dimension
from two_nn import cloud, dense

# (seed, points, dimension, width, discard_fraction): skdim.id.TwoNN(discard_fraction=...).fit(cloud(...)).dimension_ of
# scikit-dimension 0.5.0, which is no dependency, since it needs numba. Releases before 0.3.7 have F = (i - 1) / N.
SCIKIT_DIMENSION = {
    (0, 60, 2, 2, 0.1): 1.8630829104112716,
    (1, 200, 3, 3, 0.1): 3.040114219793187,
    (2, 400, 5, 12, 0.1): 5.427418158368927,
    (3, 500, 8, 8, 0.1): 7.468815200789278,
    (3, 500, 8, 8, 0.25): 7.137432547332914,
    (4, 500, 10, 40, 0.1): 9.29460459812184,
    (5, 300, 14, 14, 0.1): 11.272633496034441,
    (6, 500, 20, 20, 0.1): 14.928289369597316,
    (7, 400, 20, 64, 0.1): 16.16426690546099,
}


@pytest.mark.parametrize("case", SCIKIT_DIMENSION, ids=str)
def test_it_equals_scikit_dimension(case: tuple[int, int, int, int, float]):
    points = torch.from_numpy(cloud(*case[:4]))
    assert intrinsic_dimension(points, case[4]) == pytest.approx(SCIKIT_DIMENSION[case], rel=0, abs=1e-8)


def test_equal_points_count_once():
    points = cloud(0, 90, 4, 9)
    repeated = torch.from_numpy(np.concatenate([points[:40], points, points[:5]]))
    assert intrinsic_dimension(repeated) == pytest.approx(dense(points), abs=1e-10)


def test_two_groups_far_from_each_other_keep_their_digits():
    points = cloud(2, 300, 5, 12)
    points[::2] += 1e6
    assert intrinsic_dimension(torch.from_numpy(points)) == pytest.approx(dense(points), abs=1e-9)


def test_distances_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch):
    shapes, topk = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, *a, **k: (shapes.append(tuple(self.shape)), topk(self, *a, **k))[1]
    )
    points = cloud(0, 1100, 3, 3)
    assert intrinsic_dimension(torch.from_numpy(points)) == pytest.approx(dense(points), abs=1e-9)
    assert shapes == [(512, 1100), (512, 1100), (76, 1100)]


@pytest.mark.parametrize(
    ("points", "fraction", "said"),
    [
        (torch.randn(19, 4), 0.1, "19 distinct points.*at least 20 distinct points"),
        (torch.randn(19, 4).repeat(3, 1), 0.1, "19 distinct points"),
        (torch.randn(30, 4), 0.95, "of which 1 are kept.*lower discard_fraction"),
        (torch.randn(30, 4), 0.0, "between 0 and 1, such as 0.1"),
        (torch.randn(30, 4, 2), 0.1, r"must be real and of shape \(N, width\).*\(30, 4, 2\)"),
        (torch.full((30, 4), torch.nan), 0.1, "hold NaN or Inf: compute them in a wider dtype"),
        (torch.eye(30), 0.1, "two nearest neighbours at the same distance.*continuous coordinates"),
    ],
    ids=["few", "few distinct", "few kept", "fraction", "shape", "nan", "one-hot"],
)
def test_points_without_a_dimension_are_refused(points: torch.Tensor, fraction: float, said: str):
    with pytest.raises(ValueError, match=said):
        intrinsic_dimension(points, fraction)
