"""Each mode keeps its steps to the size of the frozen weight, and takes all others as without a limit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grids import few_of
from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.config import MODES
from lorapro_hf.functional.reference import kept_fraction
from lorapro_hf.kernels import native
from optimizer_helpers import longest_step

LR, DECAY, LIMIT = 1e-2, 0.1, 0.04
SIZES = (1e-2, 1.0, 1e4)  # of the frozen weights: the limit acts on the first pair, and not on the last


def stepped(trust_region, dtype=torch.float64, steps=1, poisoned=False, **settings):
    """An optimizer of three pairs of one shape after some steps on random gradients."""
    torch.manual_seed(2)
    layers = nn.ModuleList(nn.Linear(12, 9, bias=False) for _ in SIZES)
    for layer, size in zip(layers, SIZES, strict=True):
        layer.weight.data *= size
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1", "2"], init_lora_weights=False)
    model = get_peft_model(layers, config).to(dtype)
    optimizer = create_lorapro_optimizer(
        model, lr=LR, weight_decay=DECAY, trust_region=trust_region, eps=1e-8, **settings
    )
    for _ in range(steps):
        for pair in optimizer.pairs:
            g = torch.randn(9, 12, dtype=torch.float64).to(dtype)
            pair.A.grad, pair.B.grad = pair.scaling * pair.B.mT @ g, pair.scaling * g @ pair.A.mT
        if poisoned:
            optimizer.pairs[1].B.grad[0, 0] = float("nan")
        optimizer.step()
    return optimizer


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "native_kernels", lambda: None)


CASES = [
    *({"mode": mode} for mode in MODES),
    *({"mode": mode, "update": "sequential"} for mode in MODES if mode != "rite"),
]
each_case = pytest.mark.parametrize("settings", CASES, ids=lambda case: "-".join(case.values()))


@each_case
@pytest.mark.usefixtures("kernels")
def test_a_step_is_shortened_to_the_limit_or_not_at_all(settings):
    if settings["mode"] == "rite":
        settings = {**settings, "rite_clip": 0.0, "rite_skip": 0.0}
    limited, free, start = stepped(LIMIT, **settings), stepped(0, **settings), stepped(0, steps=0, **settings)
    keep = 1 - LR * DECAY if settings["mode"] == "efficient" else (1 - LR * DECAY) ** 0.5
    kept = []
    for pair, other, before in zip(limited.pairs, free.pairs, start.pairs, strict=True):
        A, B = before.A.detach(), before.B.detach()
        step_A, step_B = other.A.detach() - keep * A, other.B.detach() - keep * B
        D = pair.scaling * ((B + step_B) @ (A + step_A) - B @ A)
        kept.append(kept_fraction(D, longest_step(pair, LIMIT)))
        torch.testing.assert_close(pair.A.detach() - keep * A, kept[-1] * step_A, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(pair.B.detach() - keep * B, kept[-1] * step_B, rtol=1e-6, atol=1e-12)
    assert kept[0] < 0.1 and kept[2] == 1


@few_of(settings=CASES, dtype=[torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("kernels")
def test_a_pair_without_long_steps_is_the_same_to_the_bit(settings, dtype):
    if settings["mode"] == "rite":
        settings = {**settings, "rite_clip": 0.0, "rite_skip": 0.0}
    limited, free = (stepped(region, dtype, steps=3, **settings) for region in (LIMIT, 0))
    for factor in "AB":
        first, _, last = (
            (getattr(one, factor), getattr(other, factor)) for one, other in zip(limited.pairs, free.pairs, strict=True)
        )
        assert not torch.equal(*first) and torch.equal(*last)
        states = limited.state[last[0]], free.state[last[1]]
        assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("kernels")
def test_a_step_that_is_not_finite_changes_nothing(mode):
    optimizer, start = stepped(LIMIT, mode=mode, poisoned=True), stepped(LIMIT, mode=mode, steps=0)
    assert optimizer.skipped_steps == 1
    for pair, before in zip(optimizer.pairs, start.pairs, strict=True):
        assert torch.equal(pair.A, before.A) and torch.equal(pair.B, before.B)
