"""The gradient gap of layers whose factors see another gradient than the weight, of many layers, and its memory."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_diagnostics import assert_figures, deep, loss_of, sgd, slow_but
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lorapro_hf import create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.diagnostics import GradientGapMeter
from lorapro_hf.diagnostics.figures import shared_scale
from lorapro_hf.factors import recording
from lorapro_hf.functional.reference import projected_gradient
from lorapro_hf.optim.rules import factored


class Words(nn.Module):
    """An embedding, whose factors PEFT drops nothing for, and two linear layers."""

    def __init__(self, padding_idx=None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=padding_idx)
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, tokens):
        return self.two(torch.tanh(self.one(self.embed(tokens))))


def words(padding_idx=None, targets=("embed", "one", "two"), **settings):
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 5, "target_modules": list(targets), "init_lora_weights": False, **settings}
    return get_peft_model(Words(padding_idx), LoraConfig(**settings)).double()


def measured_beside_truth(model, tokens, factor=1.0):
    """The figures after a backward pass, and `dYᵀ X` of each layer from autograd's own `dY`, times the factor."""
    seen, hooks, truth = {}, [], {}
    meter, optimizer = GradientGapMeter(model), sgd(model)
    pairs = find_lora_pairs(model)

    def keep(name):
        def hook(layer, args, output):
            output.retain_grad()
            seen[name] = args[0], output

        return hook

    for pair in pairs:
        hooks.append(pair.layer.register_forward_hook(keep(pair.name)))
    meter.start()
    (factor * model(tokens).tanh().square().sum()).backward()
    for hook in hooks:
        hook.remove()
    for pair in pairs:
        x, output = seen[pair.name]
        dy = output.grad.flatten(0, -2)
        if x.is_floating_point():
            truth[pair.name] = dy.mT @ x.flatten(0, -2)
        else:
            one_hot = nn.functional.one_hot(x.flatten(), 11).to(dy)
            padding = pair.layer.get_base_layer().padding_idx
            one_hot[:, padding if padding is not None else []] = 0
            truth[pair.name] = dy.mT @ one_hot
    meter.before_step(optimizer)
    return {gap.layer: gap for gap in meter.after_step(optimizer)}, pairs, truth


def gaps_of(pair, g):
    """The figures by their definitions for the gradients that g gives the factors."""
    A, B = pair.matrix_A(pair.A.detach()), pair.matrix_B(pair.B.detach())
    own, adjusted = pair.scaling**2 * (B @ B.mT @ g + g @ A.mT @ A), projected_gradient(g, A, B)
    cosine = float((g * own).sum() / g.norm() / own.norm())
    return {
        "lora_gap": float((g - own).norm() / g.norm()),
        "lora_scaled_gap": (1 - cosine**2) ** 0.5,
        "lora_pro_gap": float((g - adjusted).norm() / g.norm()),
    }


TOKENS = torch.arange(40).reshape(4, 10) % 11


def test_dropout_leaves_the_gaps_those_of_g():
    gaps, pairs, truth = measured_beside_truth(words(lora_dropout=0.3), TOKENS, factor=1024.0)
    for pair in pairs:
        gap = gaps[pair.name]
        assert_figures(gap, gaps_of(pair, truth[pair.name]))
        assert (gap.residual > 0.05) == (not pair.name.endswith("embed"))
        # the embedding, whose factors saw g, tells the scale
        assert gap.grad_norm == pytest.approx(float(truth[pair.name].norm()), rel=1e-8)


def test_dropout_everywhere_has_one_scale():
    gaps, pairs, truth = measured_beside_truth(words(targets=("one", "two"), lora_dropout=0.1), TOKENS)
    scales = [gaps[pair.name].grad_norm / float(truth[pair.name].norm()) for pair in pairs]
    assert scales[0] == pytest.approx(scales[1], rel=1e-9)
    assert scales[0] == pytest.approx(1, rel=0.2)


def test_dora_leaves_the_gaps_those_of_g():
    model = words(targets=("one", "two"), use_dora=True)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 2, len(parameter), dtype=parameter.dtype)
    gaps, pairs, truth = measured_beside_truth(model, TOKENS)
    for pair in pairs:
        assert_figures(gaps[pair.name], gaps_of(pair, truth[pair.name]))
        assert gaps[pair.name].residual > 0.05


def test_padded_batches_leave_the_gaps_of_an_embedding_those_of_g():
    """PEFT passes no gradient to A's column of the padding token, but one to B."""
    gaps, pairs, truth = measured_beside_truth(words(padding_idx=0), TOKENS)
    for pair in pairs:
        assert_figures(gaps[pair.name], gaps_of(pair, truth[pair.name]))
    assert gaps["base_model.model.embed"].residual > 0.01


def test_shared_scale_is_that_of_those_who_know_it():
    assert shared_scale([2.0, 5.0], [1e-12, 0.5]) == pytest.approx(2.0)
    assert shared_scale([2.0, 4.0], [0.1, 0.1]) == pytest.approx(3.0)


@pytest.mark.parametrize("factor", slow_but((1e30,), [1e-25, 1e20, 1e30]))
def test_loss_scales_of_any_size(factor):
    found = []
    for scale in (1.0, factor):
        gaps, _, _ = measured_beside_truth(words().float(), TOKENS, scale)
        found.append(gaps)
    for name, gap in found[0].items():
        for figure in ("lora_gap", "lora_scaled_gap", "lora_cosine", "lora_pro_gap", "lora_pro_cosine"):
            assert getattr(found[1][name], figure) == pytest.approx(getattr(gap, figure), rel=1e-5)
        assert found[1][name].grad_norm == pytest.approx(factor * gap.grad_norm, rel=1e-5)


@pytest.mark.parametrize("whole_module", [False, True])
def test_one_parameter_in_two_layers_is_not_measured(whole_module):
    model = words()
    one, two = (getattr(model.base_model.model, name) for name in ("one", "two"))
    model.base_model.model.third = third = copy.deepcopy(one)
    for mine, theirs in ((third.lora_A, one.lora_A), (third.lora_B, one.lora_B)):
        if whole_module:
            mine["default"] = theirs["default"]
        else:
            mine["default"].weight = theirs["default"].weight
    meter = GradientGapMeter(model)
    assert meter.turns == [["base_model.model.embed", "base_model.model.two"]]
    assert meter.left_out == [("base_model.model.one", "its factors are shared with another layer")]
    assert two is not third


def test_a_pass_without_the_adapter_does_not_count():
    model = deep()
    found = []
    for reference_too in (False, True):
        meter, optimizer = GradientGapMeter(model), sgd(model)
        optimizer.zero_grad()
        meter.start()
        loss_of(model).backward()
        if reference_too:
            x = torch.ones(2, 7, dtype=torch.float64, requires_grad=True)
            with model.disable_adapter():
                model(x).square().sum().backward()
        meter.before_step(optimizer)
        found.append(meter.after_step(optimizer))
    assert found[0] == found[1]


class Blocks(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({kind: nn.Linear(4, 4) for kind in "qkv"}) for _ in range(depth))


def test_each_turn_is_a_sample_of_all_kinds_and_depths():
    model = get_peft_model(Blocks(12), LoraConfig(r=1, target_modules=["q", "k", "v"]))
    turns = GradientGapMeter(model, max_bytes=9 * 4 * 4 * 4).turns
    assert len(turns) == 4 and sorted(map(len, turns)) == [9] * 4
    assert len({name for turn in turns for name in turn}) == 36
    for turn in turns:
        assert sorted(name[-1] for name in turn) == list("kkkqqqvvv")
        for kind in "qkv":
            depths = [int(name.split(".")[-2]) // 4 for name in turn if name.endswith(kind)]
            assert depths == [0, 1, 2]


class Allocations(TorchDispatchMode):
    """The most bytes of new tensors that are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {_storage(x) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in old | set(self.alive):
                key, storage = _storage(tensor), tensor.untyped_storage()
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._drop, key)
        return out

    def _drop(self, key):
        self.now -= self.alive.pop(key, 0)


def _storage(tensor):
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("mode", slow_but(("full_8bit",), ["full", "full_8bit", "factored", "adamw"]))
def test_a_measured_step_needs_no_second_matrix(mode, monkeypatch):
    monkeypatch.setattr(recording, "BLOCK_ELEMENTS", 2**13)
    monkeypatch.setattr(factored, "_BLOCK_ELEMENTS", 2**13)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(512, 512)), LoraConfig(r=2, target_modules=["0"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.AdamW(trained)
        if mode == "adamw"
        else create_lorapro_optimizer(model, lr=1e-3, config={"mode": mode})
    )
    weight = 4 * 512 * 512
    for _ in range(2):  # the second one with moments
        optimizer.zero_grad()
        meter = GradientGapMeter(model)
        meter.start()
        model(torch.randn(4, 512)).square().mean().backward()
        gc.collect()
        with Allocations() as before:
            meter.before_step(optimizer)
        optimizer.step()
        with Allocations() as after:
            (gap,) = meter.after_step(optimizer)
        assert gap.step_error is not None
        assert max(before.most, after.most) < 0.35 * weight


def test_inputs_are_cast_some_tokens_at_a_time(monkeypatch):
    monkeypatch.setattr(recording, "BLOCK_ELEMENTS", 2**10)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 12)).bfloat16(), LoraConfig(r=2, target_modules=["0"]))
    sum_of_passes = recording.Recording(find_lora_pairs(model)[0])
    x, dy = torch.randn(4096, 16).bfloat16(), torch.randn(4096, 12).bfloat16()
    with Allocations() as allocated:
        sum_of_passes.add(x, dy)
    assert allocated.most < 0.1 * 4 * (x.numel() + dy.numel())
    torch.testing.assert_close(sum_of_passes.gradient.double(), dy.double().mT @ x.double(), rtol=1e-5, atol=1e-3)
