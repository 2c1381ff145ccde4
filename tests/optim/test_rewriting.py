"""State follows factors that something else has written: what it says of the weight does not depend on their split."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorapro_hf import create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.optim.rules.tangent import first_moment
from optimizer_helpers import backward, small_model


def build(mode: str, **settings: Any) -> tuple[Any, Any, Any]:
    model = small_model(torch.float64, modules_to_save=None)
    return model, create_lorapro_optimizer(model, lr=1e-2, mode=mode, **settings), find_lora_pairs(model)


def steps(model: Any, optimizer: Any, which: range) -> None:
    for step in which:
        backward(model, step)
        optimizer.step()


def split_anew(pairs: Any) -> None:
    """The same B A from other factors, within any context."""
    with torch.no_grad():
        for pair in pairs:
            d = torch.linspace(0.3, 2, pair.A.shape[0], dtype=torch.float64)
            pair.A.div_(d[:, None])
            pair.B.mul_(d)


def products(pairs: Any) -> list[torch.Tensor]:
    return [(pair.B @ pair.A).detach() for pair in pairs]


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        *((mode, {"update": "sequential"}) for mode in ("full", "factored", "spectral")),
        ("rite", {}),
        ("rite", {"rite_escape": True}),
    ],
)
def test_another_split_takes_the_same_steps(mode, settings):
    found = []
    for splits in (False, True):
        model, optimizer, pairs = build(mode, **settings)
        steps(model, optimizer, range(3))
        with optimizer.rewriting():
            split_anew(pairs if splits else [])
        steps(model, optimizer, range(3, 6))
        found.append(products(pairs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["factored", "spectral"])
def test_the_first_moment_is_projected_where_the_spaces_of_the_factors_change(mode):
    model, optimizer, (pair, *_) = build(mode)
    steps(model, optimizer, range(3))

    def moment() -> torch.Tensor:
        state = (optimizer.state[pair.A], optimizer.state[pair.B])
        left, right = first_moment(pair.A.detach(), pair.B.detach(), state, None)
        return left @ right

    before = moment()
    with optimizer.rewriting():
        pair.B[:, 0], pair.A[1] = torch.linspace(-1, 1, len(pair.B)), pair.A[0] + 0.1 * pair.A[1]
    A, B = pair.A.detach(), pair.B.detach()
    P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
    expected = P_B @ before + (before - P_B @ before) @ P_A
    torch.testing.assert_close(moment(), expected, rtol=1e-8, atol=1e-12)
    assert (expected - before).norm() > 0.01 * before.norm()


def test_efficient_keeps_its_moments_and_an_engine_is_refused():
    model, optimizer, (pair, *_) = build("efficient")
    steps(model, optimizer, range(2))
    before = {name: value.clone() for name, value in optimizer.state[pair.A].items()}
    with optimizer.rewriting():
        split_anew([pair])
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[pair.A].items())
    optimizer.attach_engine(None, lambda: None)
    with pytest.raises(RuntimeError, match="DeepSpeed keeps the factors itself"), optimizer.rewriting():
        pass
