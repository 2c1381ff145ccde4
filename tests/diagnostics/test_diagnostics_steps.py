"""The gradient gap in steps that are out of the ordinary: left out, with scaled gradients, with few tokens."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from test_diagnostics import slow_but
from torch import nn

from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.diagnostics import GradientGapMeter


def two_layers(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 64))
    return get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["0", "2"], **settings}))


def loss_of(model, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(tokens, size, generator=generator) for size in (96, 64))
    return (model(x) - y).square().mean()


@pytest.mark.parametrize("tokens", slow_but((2,), [1, 2, 4]))
def test_sequential_step_is_exact_with_fewer_tokens_than_the_rank(tokens):
    model = two_layers()
    config = {"mode": "full", "update": "sequential", "trust_region": 0}
    optimizer, meter = create_lorapro_optimizer(model, lr=1e-3, config=config), GradientGapMeter(model)
    for step in range(8):
        meter.start()
        loss_of(model, tokens, step).backward()
        meter.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        gaps = meter.after_step(optimizer)
        # In the first one Adam divides elements of g̃ that are nothing but roundings by themselves.
        assert max(gap.step_error for gap in gaps) < (2e-5 if step else 1e-4)
        assert max(gap.step_length for gap in gaps) < 1 + 1e-5


@pytest.mark.parametrize("mode", slow_but(("full", "sgd"), ["full", "factored", "efficient", "sgd"]))
def test_a_step_that_is_left_out_has_no_error(mode):
    model = two_layers(modules_to_save=["1"] if mode == "sgd" else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {"mode": mode}
    optimizer = (
        torch.optim.SGD(trained, lr=0.1) if mode == "sgd" else create_lorapro_optimizer(model, lr=1e-3, config=config)
    )
    meter = GradientGapMeter(model)
    for left_out in (True, False, True):
        meter.start()
        loss_of(model, 16).backward()
        meter.before_step(optimizer)
        if mode == "sgd":
            if not left_out:  # as a scaler does it
                optimizer.step()
        else:
            if left_out:
                optimizer.pairs[0].A.grad.fill_(float("nan"))
            optimizer.step()
        optimizer.zero_grad()
        gaps = meter.after_step(optimizer)
        assert len(gaps) == 2 and [gap.step_error is None for gap in gaps] == [left_out] * 2


@pytest.mark.parametrize("unscaled", [False, True])
def test_loss_scaling_of_accelerate_is_taken_out(unscaled):
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    model = two_layers()
    inner = create_lorapro_optimizer(model, lr=1e-3, config={"update": "sequential", "trust_region": 0})
    try:
        Accelerator(cpu=True)
        optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
        meter = GradientGapMeter(model)
        for step in range(3):
            norms = torch.autograd.grad(loss_of(model, 16, step), [pair.B for pair in inner.pairs])
            meter.start()
            loss = loss_of(model, 16, step)
            scaler.scale(loss).backward()
            if unscaled:  # as clipping does
                scaler.unscale_(inner)
            meter.before_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            gaps = meter.after_step(optimizer)
            assert max(gap.step_error for gap in gaps) < 1e-4
            for gap, of_B in zip(gaps, norms, strict=True):
                assert float(of_B.norm()) / 100 < gap.grad_norm < 100 * float(of_B.norm())
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


class Overwriting(nn.Module):
    """Writes over the input of a layer that, being frozen in bfloat16, does not need it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x):
        hidden = x * 1.0
        answer = self.query(hidden)
        hidden += 1.0
        return self.out(answer.to(hidden.dtype) + hidden)


def test_an_input_that_is_written_over_is_no_end_of_the_training():
    torch.manual_seed(0)
    model = get_peft_model(Overwriting().bfloat16(), LoraConfig(r=2, target_modules=["query"]))
    optimizer, meter = create_lorapro_optimizer(model, lr=1e-3), GradientGapMeter(model)
    meter.start()
    model(torch.randn(4, 24, dtype=torch.bfloat16)).float().sum().backward()
    meter.before_step(optimizer)
    optimizer.step()
    assert meter.after_step(optimizer) == []
    assert meter.unseen == ["base_model.model.query"]
