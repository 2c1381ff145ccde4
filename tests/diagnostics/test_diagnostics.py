"""The gradient gap: every figure against dense float64 matrices, for every kind of layer that is measured."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_layers import ALL_ROWS, Row, needs_weight_tying, tied_llama
from lorapro_hf import create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.diagnostics import GradientGapMeter
from lorapro_hf.functional.reference import (
    DenseFactoredAdamW,
    factor_gradients,
    kept_fraction,
    projected_gradient,
    sequential_step,
)
from optimizer_helpers import longest_step

ROWS = {row.name: row for row in ALL_ROWS}
MEASURED = (
    "linear",
    "linear with rsLoRA",
    "linear with r above the size of the weight",
    "linear with r = 1",
    "linear with a bias on lora_B",
    "Conv1D of GPT-2",
    "embedding",
)


def slow_but(names, grid):
    """A grid of which only the named cases are in the default run."""
    return [pytest.param(name, marks=[] if name in names else [pytest.mark.slow]) for name in grid]


class Deep(nn.Module):
    """Two layers of different shapes, so that gradients depend on what comes before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x):
        return torch.tanh(self.two(torch.tanh(self.one(x))))


def deep(**settings):
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 5, "target_modules": ["one", "two"], "init_lora_weights": False, **settings}
    return get_peft_model(Deep(), LoraConfig(**settings)).double()


def loss_of(model, step=0):
    generator = torch.Generator().manual_seed(step)
    out = model(torch.randn(3, 7, generator=generator, dtype=torch.float64))
    return (out * torch.linspace(-1, 2, 15, dtype=out.dtype).view(3, 5)).sum()


def true_gradients(model, loss):
    """`(m, n)` gradients of the adapted weights: autograd's own, on a copy with the factors merged into them."""
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    loss(merged).backward()
    layers = dict(merged.named_modules())
    found = {}
    for pair in find_lora_pairs(model):
        layer = layers[pair.name.removeprefix("base_model.model.")]
        turned = isinstance(layer, Conv1D | nn.Embedding)
        found[pair.name] = layer.weight.grad.mT if turned else layer.weight.grad
    return found


def dense(pair):
    """A, B and their gradients as matrices, copied."""
    gradients = pair.gradients()
    A, B = pair.matrix_A(pair.A.detach()).clone(), pair.matrix_B(pair.B.detach()).clone()
    return A, B, pair.matrix_A(gradients[0]).clone(), pair.matrix_B(gradients[1]).clone()


def expected_gaps(pair, g):
    """The figures by their definitions."""
    A, B, grad_A, grad_B = dense(pair)
    own = pair.scaling * (B @ grad_A + grad_B @ A)
    adjusted = projected_gradient(g, A, B)
    cosine = float((g * own).sum() / g.norm() / own.norm())
    return {
        "grad_norm": float(g.norm()),
        "lora_gap": float((g - own).norm() / g.norm()),
        "lora_scaled_gap": (1 - cosine**2) ** 0.5,
        "lora_cosine": cosine,
        "lora_pro_gap": float((g - adjusted).norm() / g.norm()),
        "lora_pro_cosine": float((g * adjusted).sum() / g.norm() / adjusted.norm()),
    }


def assert_figures(gap, expected, tolerance=1e-8):
    for name, value in expected.items():
        assert getattr(gap, name) == pytest.approx(value, rel=tolerance, abs=tolerance), name


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("starts_at_zero", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", slow_but(("Conv1D of GPT-2", "embedding"), [name for name in MEASURED if name in ROWS])
)
def test_gaps_are_those_of_dense_matrices(name, starts_at_zero):
    row = ROWS[name]
    model = row.build(init_lora_weights=starts_at_zero)
    meter, optimizer = GradientGapMeter(model), sgd(model)
    true = true_gradients(model, lambda merged: 3 * row.loss(merged))
    meter.start()
    row.loss(model).backward()
    (2 * row.loss(model)).backward()  # accumulated
    (pair,) = find_lora_pairs(model)
    g = true[pair.name]
    expected = expected_gaps(pair, g)
    meter.before_step(optimizer)
    optimizer.step()
    (gap,) = meter.after_step(optimizer)
    assert_figures(gap, expected)
    assert gap.residual < 1e-10
    assert gap.lora_pro_gap <= gap.lora_scaled_gap + 1e-12 <= gap.lora_gap + 2e-12


def test_a_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 6)

        def forward(self, x):
            return self.body(torch.tanh(self.body(x)))

    row = Row("twice", Twice)
    model = row.build()
    meter, optimizer = GradientGapMeter(model), sgd(model)
    true = true_gradients(model, row.loss)
    meter.start()
    row.loss(model).backward()
    (pair,) = find_lora_pairs(model)
    expected = expected_gaps(pair, true[pair.name])
    meter.before_step(optimizer)
    (gap,) = meter.after_step(optimizer)
    assert_figures(gap, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4-bit base", "8-bit base"])
def test_quantised_bases(name):
    row: Row = ROWS[name]
    model = row.build()
    meter, optimizer = GradientGapMeter(model), sgd(model)
    seen = {}

    def keep(layer, args, output):
        seen["x"], seen["out"] = args[0], output
        output.retain_grad()

    (pair,) = find_lora_pairs(model)
    hook = pair.layer.register_forward_hook(keep)
    meter.start()
    row.loss(model).backward()
    hook.remove()
    expected = expected_gaps(pair, seen["out"].grad.mT @ seen["x"])
    meter.before_step(optimizer)
    (gap,) = meter.after_step(optimizer)
    assert_figures(gap, expected, 1e-4)
    assert gap.residual < 1e-5


@pytest.mark.parametrize("reentrant", slow_but((True,), [True, False]))
def test_checkpointing_counts_each_pass_once(reentrant):
    model = deep()
    meter, optimizer = GradientGapMeter(model), sgd(model)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    pairs = find_lora_pairs(model)
    true = true_gradients(model, lambda merged: merged(x.detach()).square().sum())
    meter.start()
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    expected = [expected_gaps(pair, true[pair.name]) for pair in pairs]
    meter.before_step(optimizer)
    for gap, figures in zip(meter.after_step(optimizer), expected, strict=True):
        assert_figures(gap, figures)
        assert gap.residual < 1e-10


def test_scale_of_the_gradients_is_found():
    """Whatever the loss is divided by and however gradients are clipped."""
    model = deep()
    meter, optimizer = GradientGapMeter(model), sgd(model)
    true = true_gradients(model, loss_of)
    meter.start()
    (loss_of(model) * 1024).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 3 / 1024
    expected = [expected_gaps(pair, 3 * true[pair.name]) for pair in find_lora_pairs(model)]
    meter.before_step(optimizer)
    for gap, figures in zip(meter.after_step(optimizer), expected, strict=True):
        assert_figures(gap, figures)


def test_an_unmeasured_step_leaves_no_trace():
    model = deep()
    meter, optimizer = GradientGapMeter(model), sgd(model)
    meter.start()
    meter.stop()
    assert all(not module._forward_hooks for module in model.modules())
    loss_of(model).backward()
    meter.before_step(optimizer)
    assert meter.after_step(optimizer) == []


def test_gradients_that_are_not_finite_are_not_measured():
    model = deep()
    meter, optimizer = GradientGapMeter(model), sgd(model)
    meter.start()
    (loss_of(model) * float("inf")).backward()
    meter.before_step(optimizer)
    assert meter.after_step(optimizer) == []


MODES = {
    "full, linear": {"mode": "full", "update": "linear", "trust_region": 0},
    "full, linear, X = 0": {"mode": "full", "update": "linear", "x_mode": "zero", "trust_region": 0},
    "full, linear, limited": {"mode": "full", "update": "linear", "trust_region": 0.005},
    "full, sequential": {"mode": "full", "update": "sequential", "trust_region": 0},
    "full, sequential, limited": {"mode": "full", "update": "sequential", "trust_region": 0.005},
    "factored, sequential": {"mode": "factored", "update": "sequential", "trust_region": 0},
    "factored, sequential, limited": {"mode": "factored", "update": "sequential", "trust_region": 0.005},
    "factored, linear": {"mode": "factored", "update": "linear", "trust_region": 0},
    "factored, linear, limited": {"mode": "factored", "update": "linear", "trust_region": 0.005},
}
LR, DECAY = 0.02, 0.5


def dense_directions(model, update):
    """Each step's u of the named pairs, as the dense reference optimizers have it, and how to step them."""

    class Full(DenseFactoredAdamW):
        def direction(self, g):
            beta1, beta2 = self.betas
            self.t += 1
            self.M = beta1 * self.M + (1 - beta1) * projected_gradient(g, self.A, self.B)
            self.V = beta2 * self.V + (1 - beta2) * projected_gradient(g, self.A, self.B) ** 2
            return self.M / (1 - beta1**self.t) / ((self.V / (1 - beta2**self.t)).sqrt() + self.eps)

    kind = DenseFactoredAdamW if update["mode"] == "factored" else Full
    return {pair.name: (kind, pair) for pair in find_lora_pairs(model)}


@pytest.mark.parametrize("name", slow_but(("full, sequential, limited", "factored, linear, limited"), MODES))
@pytest.mark.parametrize("starts_at_zero", [pytest.param(False, marks=pytest.mark.slow), True])
def test_step_is_compared_with_adams_direction(name, starts_at_zero):
    config = MODES[name]
    model = deep(init_lora_weights=starts_at_zero)
    optimizer = create_lorapro_optimizer(model, lr=LR, weight_decay=DECAY, config=config)
    meter = GradientGapMeter(model)
    oracles = {}
    for name_of, (kind, pair) in dense_directions(model, config).items():
        A, B = (factor.detach() for factor in (pair.A, pair.B))
        oracles[name_of] = kind(A, B, pair.scaling, lr=LR)
    keep, shares = (1 - LR * DECAY) ** 0.5, []
    for step in range(3):
        optimizer.zero_grad()
        true = true_gradients(model, lambda merged, step=step: loss_of(merged, step))
        meter.start()
        loss_of(model, step).backward()
        meter.before_step(optimizer)
        before = {pair.name: (pair.A.detach().clone(), pair.B.detach().clone()) for pair in optimizer.pairs}
        optimizer.step()
        gaps = {gap.layer: gap for gap in meter.after_step(optimizer)}
        for pair in optimizer.pairs:
            A, B = before[pair.name]
            oracle, s = oracles[pair.name], pair.scaling
            oracle.A, oracle.B = A, B
            u = oracle.direction(true[pair.name])
            longest = longest_step(pair, optimizer.rule.trust_region)
            if optimizer.rule.is_sequential:
                kept = {"keep": (keep, keep)}
                new_A, new_B = sequential_step(u, A, B, s, LR, longest=longest, **kept)
                free_A, _ = sequential_step(u, A, B, s, LR, **kept)
                intended = s * (new_B @ new_A - keep**2 * B @ A)
                share = float((new_A - keep * A).norm() / (free_A - keep * A).norm())
            else:
                h_A, h_B = factor_gradients(u, A, B, s, optimizer.config.x_mode)
                share = kept_fraction(s * ((B - LR * h_B) @ (A - LR * h_A) - B @ A), longest)
                intended = -LR * share * s * (B @ h_A + h_B @ A)
            if config["mode"] == "factored":
                oracle.M = projected_gradient(oracle.M, pair.A.detach(), pair.B.detach())
            realised = s * (pair.B.detach() @ pair.A.detach() - keep**2 * B @ A)
            error = float((realised - intended).norm() / intended.norm())
            assert gaps[pair.name].step_error == pytest.approx(error, rel=1e-6, abs=1e-8)
            assert gaps[pair.name].step_share == pytest.approx(float(share), rel=1e-6)
            assert gaps[pair.name].step_length == pytest.approx(float(realised.norm() / (LR * u).norm()), rel=1e-6)
            assert (gaps[pair.name].step_error < 1e-8) == optimizer.rule.is_sequential
            assert not optimizer.rule.is_sequential or gaps[pair.name].step_length <= 1 + 1e-9
            shares.append(share)
    assert (min(shares) < 1) == ("limited" in name)


@pytest.mark.parametrize("settings", [{"mode": "full_8bit", "update": "sequential"}, {"moments_dtype": "bfloat16"}])
def test_step_with_rounded_moments(settings):
    """Their rounding does not count: the direction is that of the step, before it is stored."""
    model = deep().float()
    optimizer = create_lorapro_optimizer(model, lr=LR, config={"mode": "full", "update": "sequential", **settings})
    meter = GradientGapMeter(model)
    for step in range(3):
        optimizer.zero_grad()
        meter.start()
        torch.manual_seed(step)
        model(torch.randn(3, 7)).square().sum().backward()
        meter.before_step(optimizer)
        optimizer.step()
        for gap in meter.after_step(optimizer):
            assert gap.step_error < 1e-4


def test_step_that_went_astray_shows():
    model = deep()
    optimizer = create_lorapro_optimizer(model, lr=LR, config={"mode": "full", "update": "sequential"})
    meter = GradientGapMeter(model)
    meter.start()
    loss_of(model).backward()
    meter.before_step(optimizer)
    old = optimizer.pairs[0].B.detach().clone()
    optimizer.step()
    with torch.no_grad():
        optimizer.pairs[0].B.lerp_(old, 0.5)
    first, second = meter.after_step(optimizer)
    assert first.step_error > 0.1
    assert second.step_error < 1e-8


@pytest.mark.parametrize("kind", slow_but(("sgd", "efficient"), ["adamw", "sgd", "efficient"]))
def test_step_of_other_optimizers_is_compared_with_its_first_order(kind):
    model = deep()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY)
    elif kind == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY)
    else:
        optimizer = create_lorapro_optimizer(model, lr=LR, weight_decay=DECAY, config={"mode": "efficient"})
    keep = 1.0 if kind == "sgd" else 1 - LR * DECAY
    meter, pairs = GradientGapMeter(model), find_lora_pairs(model)
    meter.start()
    loss_of(model).backward()
    meter.before_step(optimizer)
    before = [(keep * pair.A.detach(), keep * pair.B.detach()) for pair in pairs]
    optimizer.step()
    for gap, pair, (A, B) in zip(meter.after_step(optimizer), pairs, before, strict=True):
        step_A, step_B = pair.A.detach() - A, pair.B.detach() - B
        error = (step_B @ step_A).norm() / (B @ step_A + step_B @ A).norm()
        assert gap.step_error == pytest.approx(float(error), rel=1e-7)
        assert gap.step_length is None and gap.step_share is None


def test_layers_take_turns_where_they_do_not_fit():
    model = deep()
    names = [pair.name for pair in find_lora_pairs(model)]
    assert GradientGapMeter(model, max_bytes=8 * (42 + 30)).turns == [names]
    meter, optimizer = GradientGapMeter(model, max_bytes=8 * 42), sgd(model)
    assert meter.turns == [[names[0]], [names[1]]]
    measured = []
    for _ in range(3):
        meter.start()
        loss_of(model).backward()
        meter.before_step(optimizer)
        measured += [gap.layer for gap in meter.after_step(optimizer)]
    assert measured == [names[0], names[1], names[0]]
    small = GradientGapMeter(model, max_bytes=8 * 30)
    assert small.turns == [[names[1]]]
    assert small.left_out == [
        (names[0], "its gradient takes 336 bytes, more than max_bytes=240 (--lora_pro_gap_max_bytes)")
    ]


@pytest.mark.parametrize(
    ("layers", "found"),
    [(["two"], ["two"]), (["*.one"], ["one"]), (["base_model.model.two", "one"], ["one", "two"]), (["*"], "all")],
)
def test_layers_are_chosen_by_name(layers, found):
    meter = GradientGapMeter(deep(), layers=layers)
    names = ["one", "two"] if found == "all" else found
    assert meter.turns == [[f"base_model.model.{name}" for name in names]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layers": ["three"]},
            r"layers \(--lora_pro_gap_layers\): 'three' matches no adapted layer.* are here: one, two",
        ),
        ({"layers": "one"}, "layers='one' must be a list of names"),
        ({"layers": [1]}, "must be a list of names"),
        ({"max_bytes": 0}, "max_bytes=0 must be a positive whole number"),
        ({"max_bytes": "1GB"}, "max_bytes='1GB' must be a positive whole number"),
        ({"max_bytes": 10}, "no layer is left whose gradient can be measured; .*max_bytes=10"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        GradientGapMeter(deep(), **settings)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Conv2d", "it is a convolution"),
        ("Conv2d with groups", "it packs several weights"),
        ("experts (in, out)", "adapts a bare parameter"),
        ("MultiheadAttention", "PEFT merges the factors"),
        pytest.param(
            "linear with aLoRA",
            "some of the tokens only",
            marks=pytest.mark.skipif(
                "alora_invocation_tokens" not in LoraConfig.__dataclass_fields__, reason="this PEFT has no aLoRA"
            ),
        ),
    ],
)
def test_other_kinds_are_listed(name, reason):
    with pytest.raises(ValueError, match=f"no layer is left whose gradient can be measured; .*{reason}"):
        GradientGapMeter(ROWS[name].build())


@needs_weight_tying
def test_shared_factors_are_listed():
    with pytest.raises(ValueError, match="shared with another layer"):
        GradientGapMeter(tied_llama())


def test_dora_has_a_residual():
    row = ROWS["linear with DoRA"]
    model = row.build()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 2, len(parameter), dtype=parameter.dtype)
    meter, optimizer = GradientGapMeter(model), sgd(model)
    meter.start()
    row.loss(model).backward()
    meter.before_step(optimizer)
    (gap,) = meter.after_step(optimizer)
    assert gap.residual > 0.05


def test_layers_that_nobody_calls_are_named():
    model = deep()
    meter, optimizer = GradientGapMeter(model), sgd(model)
    meter.start()
    for pair in find_lora_pairs(model):
        pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
    meter.before_step(optimizer)
    assert meter.after_step(optimizer) == []
    assert meter.unseen == ["base_model.model.one", "base_model.model.two"]
