"""Weights of slots, the slots that are replaced, and the weights that they share with their sources."""

from __future__ import annotations

import math

import pytest
import torch

from lorapro_hf.functional.rank_gates import (
    averaged,
    gate_gradients,
    gate_weights,
    kept_share,
    replacements,
    squared_change,
)


def test_weights_and_their_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    q = (0.05 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    B, G = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    weights = gate_weights(q, 0.05)
    torch.testing.assert_close(weights.mean(-1), torch.ones(3, dtype=torch.float64))
    ((B * weights[:, None]) * G).sum().backward()
    inner = (B * weights[:, None] * G).sum(-2).detach()  # of B diag(g) with its gradient
    torch.testing.assert_close(gate_gradients(inner, q.detach(), 0.05), q.grad)
    assert (gate_weights(torch.tensor([0.0, 100.0]), 0.05) > 0).all()


def test_the_kept_share_follows_a_cosine_to_one():
    assert kept_share(0, 8, 0.9) == pytest.approx(0.9) and kept_share(4, 8, 0.9) == pytest.approx(0.95)
    assert kept_share(2, 8, 0.9) == pytest.approx(1 - 0.05 * (1 + math.sqrt(0.5)))
    assert kept_share(8, 8, 0.9) == kept_share(9, 8, 0.9) == 1


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        # the sum is 10: 4, 2, 1.5, 1, 0.9 and 0.6 from the first on
        (1.0, [set(), set()]),
        (0.94, [set(), {2}]),
        (0.93, [set(), {2, 3}]),
        (0.84, [{1}, {2, 3}]),
        (0.5, [{1}, {2, 3}]),  # at most half of the slots of a matrix
    ],
)
def test_the_largest_prefix_is_kept_and_half_of_each_matrix(share, expected):
    weights = [torch.tensor([4.0, 1.0]), torch.tensor([2.0, 1.5, 0.6, 0.9])]
    found = replacements(weights, share, seed=1)
    assert [set(replaced) for replaced, _ in found] == expected
    for own, (replaced, sources) in zip(weights, found, strict=True):
        best = own.argsort(descending=True)[: len(replaced)].tolist()
        assert sorted(sources) == sorted(best) and not set(sources) & set(replaced)


def test_the_order_of_the_sources_is_the_seed_s():
    weights = [torch.arange(1.0, 21.0)]
    orders = [replacements(weights, 0.5, seed)[0][1] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[1]) == sorted(orders[2])


def test_a_slot_and_its_source_share_their_weights_and_the_others_keep_theirs():
    q = torch.tensor([0.3, 0.1, 0.25, -0.2, 0.0], dtype=torch.float64)
    before = gate_weights(q, 0.05)
    after = gate_weights(averaged(q, [3, 1], [0, 2], 0.05), 0.05)
    expected = before.clone()
    expected[[3, 0]], expected[[1, 2]] = before[[3, 0]].mean(), before[[1, 2]].mean()
    torch.testing.assert_close(after, expected)


def test_the_change_of_a_product_is_that_of_the_matrices():
    torch.manual_seed(0)
    A, new_A = torch.randn(2, 3, 2, 6)
    Bt, new_Bt = torch.randn(2, 3, 2, 7)
    expected = (new_Bt.mT @ new_A - Bt.mT @ A).double().square().sum((-2, -1))
    torch.testing.assert_close(squared_change(A, Bt, new_A, new_Bt), expected, rtol=1e-5, atol=0)
