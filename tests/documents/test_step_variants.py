"""The ways of spending a step in benchmarks/step_variants.py do as their names say."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lora_layers import ROWS
from lorapro_hf import create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.commands.common import optimizers
from lorapro_hf.commands.compare import methods
from lorapro_hf.commands.compare.settings import read_settings

FOLDER = Path(__file__).parents[2] / "benchmarks"
LR = 0.02


@pytest.fixture(scope="module")
def program():
    specification = importlib.util.spec_from_file_location("step_variants", FOLDER / "step_variants.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["step_variants"] = module
    specification.loader.exec_module(module)
    return module


def layer(starts_at_zero=False):
    model = next(row for row in ROWS if row.name == "linear").build()
    (pair,) = find_lora_pairs(model)
    if starts_at_zero:
        pair.B.data.zero_()
    return model


def stepped(optimizer, model, count=3):
    (pair,) = find_lora_pairs(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        g = torch.randn(len(pair.B), pair.A.shape[1], generator=generator, dtype=torch.float64)
        A, B = pair.A.detach().double(), pair.B.detach().double()
        pair.A.grad, pair.B.grad = ((pair.scaling * x).to(pair.A.dtype) for x in (B.mT @ g, g @ A.mT))
        optimizer.step()
    return pair.A.detach(), pair.B.detach()


@pytest.mark.parametrize(("way", "update"), [("linear", "linear"), ("B_first", "sequential")])
@pytest.mark.parametrize("starts_at_zero", [False, True])
def test_two_are_the_updates_of_the_package(program, way, update, starts_at_zero):
    ours, theirs = layer(starts_at_zero), layer(starts_at_zero)
    theirs.load_state_dict(ours.state_dict())
    found = stepped(program.build(ours, LR, spend=way), ours)
    config = {"mode": "full", "update": update, "trust_region": 0}
    expected = stepped(create_lorapro_optimizer(theirs, lr=LR, config=config), theirs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(1)
    shapes = (11, 17), (4, 17), (11, 4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def moved(A, B, step, s):
    return s * ((B + step[1]) @ (A + step[0]) - B @ A)


def test_A_first_is_the_mirror_image(program, operands):
    u, A, B = operands
    move = moved(A, B, program.A_first(u, A, B, 2.0, 0.1, 1), 2.0)
    mirrored = program.B_first(u.mT, B.mT, A.mT, 2.0, 0.1, 1)
    torch.testing.assert_close(move.mT, moved(B.mT, A.mT, mirrored, 2.0))
    P_B = B @ torch.linalg.pinv(B)
    torch.testing.assert_close(P_B @ move, -0.1 * P_B @ u)


def test_turns(program, operands):
    u, A, B = operands
    for step, way in ((1, program.B_first), (2, program.A_first)):
        for one, other in zip(program.in_turns(u, A, B, 2.0, 0.1, step), way(u, A, B, 2.0, 0.1, step), strict=True):
            assert torch.equal(one, other)
    for step, still in ((1, 0), (2, 1)):
        alone = program.one_a_step(u, A, B, 2.0, 0.1, step)
        assert not alone[still].any() and alone[1 - still].any()


def test_limits_and_damping_shorten_and_rescaling_restores_the_length(program, operands):
    u, A, B = operands
    B = 1e-3 * B
    for way in (program.linear, program.B_first):
        limited = getattr(program, f"{way.__name__}_limited")(u, A, B, 2.0, 0.1, 1)
        assert way(u, A, B, 2.0, 0.1, 1)[0].norm() > program.LIMIT * A.norm()
        torch.testing.assert_close(limited[0].norm(), program.LIMIT * A.norm())
    damped, plain = (way(u, A, B, 2.0, 0.1, 1)[0].norm() for way in (program.B_first_damped, program.B_first))
    assert damped < plain
    rescaled = moved(A, B, program.B_first_rescaled(u, A, B, 2.0, 1e-6, 1), 2.0)
    torch.testing.assert_close(rescaled.norm(), 1e-6 * u.norm(), rtol=0.05, atol=0.0)


def test_the_comparison_names_all_of_them(program, monkeypatch):
    monkeypatch.setattr(optimizers, "BUILDERS", optimizers.BUILDERS)
    monkeypatch.setattr(methods, "METHODS", methods.METHODS)
    program.register()
    settings = read_settings(FOLDER / "step_variants.yaml")
    assert {method.settings["spend"] for method in settings.methods if method.optimizer == "variant"} == {*program.WAYS}
    model = copy.deepcopy(layer())
    method = settings.methods[0]
    assert isinstance(optimizers.build(method.optimizer, model, LR, method.settings), program.Variant)
