"""A small model with factor pairs and ordinary parameters, and comparisons to the bit, for the optimizer's tests."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_layers import ROWS
from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.config import MODES

LINEAR = ROWS[0]
both_modes = pytest.mark.parametrize("mode", MODES)


def small_model(dtype=torch.float32, **settings):
    """Two adapted linear layers with ordinary trainable parameters around them."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 3))
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["0", "3"], "modules_to_save": ["1", "4"], **settings}
    model = get_peft_model(body, LoraConfig(**settings))
    return model.to(dtype)


def backward(model, step=0):
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 6, generator=generator).to(next(model.parameters()).dtype)
    target = torch.randn(8, 3, generator=generator).to(inputs.dtype)
    model.zero_grad()
    loss = ((model(inputs) - target) ** 2).mean()
    loss.backward()
    return loss.item()


def trained(steps=1, dtype=torch.float32, **options):
    """A small model and its optimizer after some steps."""
    model = small_model(dtype)
    optimizer = create_lorapro_optimizer(model, **{"lr": 1e-2, **options})
    take(range(steps), (model, optimizer))
    return model, optimizer


def take(steps, *trainings):
    """Take steps of models with their optimizers."""
    for step in steps:
        for model, optimizer in trainings:
            backward(model, step)
            optimizer.step()


def reloaded(state):
    """A state as it comes back from a file that is read without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def ordinary(optimizer):
    factors = {id(factor) for pair in optimizer.pairs for factor in (pair.A, pair.B)}
    return [p for group in optimizer.param_groups for p in group["params"] if id(p) not in factors]


def snapshot(optimizer):
    parameters = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return parameters, copy.deepcopy(optimizer.state_dict())


def assert_same(one, two):
    for first, second in zip(one[0], two[0], strict=True):
        assert torch.equal(first, second)
    assert one[1]["state"].keys() == two[1]["state"].keys()
    for key, state in one[1]["state"].items():
        assert all(torch.equal(value, two[1]["state"][key][name]) for name, value in state.items())


def longest_step(pair, trust_region):
    """The largest norm of a step of a pair's weight, from its base weight; `None` for no limit."""
    weight = pair.layer.get_base_layer().weight.detach().double().flatten(1)
    return (
        trust_region * float(weight.norm()) * (weight.shape[0] ** -0.5 + weight.shape[1] ** -0.5)
        if trust_region
        else None
    )
