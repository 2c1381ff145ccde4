"""Steps in the C++ kernels are those of torch, which other tests hold against dense oracles."""

import shutil
import sys
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grids import rest_slow
from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.kernels import native
from lorapro_hf.kernels.native_steps import MAX_RANK, NativePairs
from lorapro_hf.optim.rules import RULES

SHAPES = [(20, 13), (20, 13), (33, 40), (11, 64)]  # (m, n), two of them a stack
NATIVE = [name for name, rule in RULES.items() if rule.steps_natively]
LIMIT = {"trust_region": 0.03}
CONFIGS = [
    *({"mode": mode, **LIMIT} for mode in NATIVE),
    *({"mode": mode, "update": "sequential", **LIMIT} for mode in NATIVE if mode != "rite"),
    *(
        {"mode": mode, "update": "linear", "x_mode": "symmetric", **LIMIT}
        for mode in NATIVE
        if mode not in ("rite", "efficient")
    ),
    {"mode": "efficient", "x_mode": "symmetric", "efficient_projected": True, **LIMIT},
    {"mode": "efficient", "update": "sequential", "efficient_projected": True},
    {"mode": "spectral", "update": "linear", "trust_region": 0, "spectral_iterations": 3},
    {"mode": "factored", "update": "linear", "trust_region": 0},
    {"mode": "efficient"},
    {"mode": "rite", "rite_escape": True, "rite_skip": 1.5, "rite_clip": 0.5},
]

needs_compiler = pytest.mark.skipif(native.native_kernels() is None, reason="no C++ kernels can be built here")


def trained(config, dtype, rank=4, steps=5, from_zero=False, size=1.0, **options):
    """A model after some steps on random gradients; the second pair has none in the third. B starts at a size."""
    torch.manual_seed(rank)
    layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in SHAPES)
    targets = [str(index) for index in range(len(layers))]
    settings = LoraConfig(r=rank, lora_alpha=6, target_modules=targets, init_lora_weights=from_zero)
    model = get_peft_model(layers, settings).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.data *= size if "lora_B" in name else 1
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config=config, weight_decay=0.1, **options)
    for step in range(steps):
        for index, pair in enumerate(optimizer.pairs):
            gradient = min(1.0, 1e12 * size) * torch.randn(pair.B.shape[0], pair.A.shape[1]).to(dtype)
            pair.A.grad, pair.B.grad = pair.scaling * pair.B.mT @ gradient, pair.scaling * gradient @ pair.A.mT
            if step == 2 and index == 1:
                pair.A.grad = pair.B.grad = None
        optimizer.step()
    return optimizer


def values(optimizer):
    """Each product of factors, and each tensor of the state."""
    products = [pair.scaling * pair.B.detach() @ pair.A.detach() for pair in optimizer.pairs]
    return [*products, *(tensor for state in optimizer.state.values() for tensor in state.values())]


@pytest.mark.skipif(shutil.which("g++") is None or not sys.platform.startswith("linux"), reason="needs g++ on Linux")
def test_the_kernels_are_built_where_there_is_a_compiler():
    assert native.native_kernels() is not None


@needs_compiler
@pytest.mark.parametrize("from_zero", rest_slow([False, True]))
@pytest.mark.parametrize("rank", rest_slow([4, 1, 9]))
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
def test_a_step_is_that_of_torch(config, rank, from_zero, monkeypatch):
    # In float32 a moment in 8 bits may be rounded to the next code.
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-2 if config["mode"] == "full_8bit" else 1e-4)):
        with mock.patch.object(NativePairs, "step", autospec=True, side_effect=NativePairs.step) as kernel:
            of_native = values(trained(config, dtype, rank, from_zero=from_zero))
        assert kernel.called
        with monkeypatch.context() as patch:
            patch.setattr(native, "native_kernels", lambda: None)
            of_torch = values(trained(config, dtype, rank, from_zero=from_zero))
        for got, expected in zip(of_native, of_torch, strict=True):
            allowed = 1 if got.dtype == torch.uint8 else max(tolerance * float(expected.abs().max()), 1e-9)  # one code
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=allowed)


@needs_compiler
@pytest.mark.parametrize("size", [1.0, 1e-20])
@pytest.mark.parametrize("update", ["linear", "sequential"])
def test_efficient_steps_keep_the_precision_of_float32(size, update, monkeypatch):
    """Also with a B whose squared inverse is beyond float32."""
    config = {"mode": "efficient", "update": update}
    of_native = values(trained(config, torch.float32, size=size))
    monkeypatch.setattr(native, "native_kernels", lambda: None)
    exact = values(trained(config, torch.float64, size=size))
    for got, expected in zip(of_native[: len(SHAPES)], exact, strict=False):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


@needs_compiler
@pytest.mark.parametrize("mode", NATIVE)
def test_threads_change_no_bit(mode):
    alone = values(trained({"mode": mode}, torch.float32))
    torch.set_num_threads(2)
    try:
        together = values(trained({"mode": mode}, torch.float32))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@needs_compiler
@pytest.mark.parametrize("mode", NATIVE)
def test_nan_in_a_gradient_changes_no_bit(mode):
    optimizer = trained({"mode": mode}, torch.float32)
    before = [tensor.clone() for tensor in values(optimizer)]
    optimizer.pairs[2].A.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(one, other) for one, other in zip(before, values(optimizer), strict=True))


@needs_compiler
def test_a_pair_without_gradients_keeps_its_bits():
    optimizer = trained({"mode": "factored"}, torch.float32)
    pair = optimizer.pairs[1]
    before = [tensor.clone() for tensor in (pair.A, pair.B, *optimizer.state[pair.A].values())]
    pair.A.grad = pair.B.grad = None
    optimizer.step()
    after = (pair.A, pair.B, *optimizer.state[pair.A].values())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@needs_compiler
def test_autograd_knows_that_factors_have_changed():
    optimizer = trained({"mode": "efficient"}, torch.float32)
    pair = optimizer.pairs[0]
    loss = (pair.B @ pair.A).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_other_factors_step_in_torch(monkeypatch):
    """Factors in bfloat16 and large ranks; a transposed factor."""
    monkeypatch.setattr(native, "native_kernels", lambda: pytest.fail("the kernels do not serve these"))
    trained({"mode": "factored"}, torch.bfloat16)
    trained({"mode": "factored"}, torch.float32, rank=MAX_RANK + 1, steps=1)


@needs_compiler
@pytest.mark.parametrize("mode", ["factored", "full", "full_8bit"])
def test_the_default_device_is_none_of_the_addresses(mode):
    optimizer = trained({"mode": mode}, torch.float32)
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert all(bool(pair.A.isfinite().all()) for pair in optimizer.pairs)


@needs_compiler
@pytest.mark.parametrize("of_gradient", [False, True])
def test_other_shapes_than_at_first_are_refused(of_gradient):
    optimizer = trained({"mode": "efficient"}, torch.float32)
    factor = optimizer.pairs[0].A
    (factor.grad if of_gradient else factor).data = torch.ones(4, 5)
    with pytest.raises(RuntimeError, match=r"shapes .* was built for \(4, 13\) and \(20, 4\)"):
        optimizer.step()


@needs_compiler
def test_autograd_knows_that_a_pair_without_gradients_is_unchanged():
    optimizer = trained({"mode": "efficient"}, torch.float32)
    pair = optimizer.pairs[0]
    loss = (pair.B @ pair.A).square().sum()
    pair.A.grad = pair.B.grad = None
    optimizer.step()
    loss.backward()
