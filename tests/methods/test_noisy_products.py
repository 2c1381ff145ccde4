"""A perturbed model computes with W + noise in both passes, and holds W alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_layers import ROWS, Net
from lorapro_hf import find_lora_pairs, perturbed_weights
from lorapro_hf.kernels.noise import NoiseKey, standard_normal
from lorapro_hf.methods import noisy_layers
from weight_oracle import own_weight

SEED, SIGMA = 5, 0.3
REFUSED = {
    "linear with aLoRA": "changes it for some tokens only",
    "Conv2d with groups": "connect groups that the convolution does not",
    "MultiheadAttention": "PEFT merges the factors",
}
BY_NAME = {row.name: row for row in ROWS}
IN_DEFAULT_RUN = ("linear", "Conv1D of GPT-2", "embedding", "Conv2d", "linear with DoRA", "experts (in, out)")
EXACT = [row.name for row in ROWS if row.name not in REFUSED and row.dtype == torch.float64]


def some_slow(names):
    return [name if name in IN_DEFAULT_RUN else pytest.param(name, marks=pytest.mark.slow) for name in names]


def built(name, **settings):
    torch.manual_seed(0)
    return BY_NAME[name].build(**settings)


def stored(pair):
    """The weight as it is stored, as a batch of matrices."""
    weight = own_weight(pair)
    return weight.view(-1, *weight.shape[-2:]) if pair.layout == "experts" else weight.flatten(1)[None]


def dense_noise(model, sigma=SIGMA, window=0):
    """The noise of each weight, shaped as it is stored, from the dense merged weight."""
    noises = {}
    for index, pair in enumerate(find_lora_pairs(model)):
        weight = stored(pair).detach()
        delta = pair.layer.get_delta_weight(pair.adapter_name).detach().reshape(weight.shape)
        batch, rows, columns = weight.shape
        z = standard_normal(torch.arange(batch * rows), columns, NoiseKey(SEED, index, window)).view(weight.shape)
        axis = -2 if is_turned(pair) else -1
        norms = (weight + delta).norm(dim=axis, keepdim=True)
        noises[pair.name] = (z.to(weight) * sigma * norms / math.sqrt(weight.shape[axis])).view(own_weight(pair).shape)
    return noises


def is_turned(pair):
    """Whether the weight is stored as the transpose of `B A`."""
    base = pair.layer.get_base_layer()
    if pair.layout == "experts":
        return base.is_transposed
    return isinstance(base, nn.Embedding) or getattr(pair.layer, "fan_in_fan_out", False)


def with_dense_noise(model):
    """A copy of the model whose frozen weights hold the noise."""
    noises, noisy = dense_noise(model), copy.deepcopy(model)
    for pair in find_lora_pairs(noisy):
        own_weight(pair).data += noises[pair.name]
    return noisy


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", some_slow([name for name in EXACT if "DoRA" not in name]))
def test_outputs_and_gradients_are_those_of_the_dense_weight(name):
    row, model = BY_NAME[name], built(name)
    noisy = with_dense_noise(model)
    plain, before = row.output(model), copy.deepcopy(model.state_dict())
    expected = row.output(noisy)
    row.loss(noisy).backward()
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        out = row.output(model)
        row.loss(model).backward()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)  # z is rounded to float32
    assert (out - plain).abs().max() > 1e-3
    torch.testing.assert_close(gradients(model), gradients(noisy), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(row.output(model), plain)


def test_dora_perturbs_the_scaled_weight():
    row, model = BY_NAME["linear with DoRA"], built("linear with DoRA")
    (pair,) = find_lora_pairs(model)
    layer, x = pair.layer, torch.randn(9, 6, dtype=torch.float64)
    merged = copy.deepcopy(model).merge_and_unload().body
    z = standard_normal(torch.arange(5), 6, NoiseKey(SEED, 0, 0)).double()
    noise = SIGMA * z * merged.weight.detach().norm(dim=1, keepdim=True) / math.sqrt(6)
    expected = nn.functional.linear(x, merged.weight + noise, merged.bias)

    W, bias, magnitude = own_weight(pair).detach(), layer.base_layer.bias.detach(), layer.lora_magnitude_vector
    A, B, m = (p.detach().clone().requires_grad_() for p in (pair.A, pair.B, magnitude["default"].weight))
    V = W + pair.scaling * B @ A
    norms = V.detach().norm(dim=1, keepdim=True)
    formula = x @ ((V + SIGMA * z * norms / math.sqrt(6)) * (m[:, None] / norms)).T + bias
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out, formula, rtol=1e-6, atol=1e-7)
    for result in (out, formula):
        result.tanh().sum().backward()
    torch.testing.assert_close([pair.A.grad, pair.B.grad, magnitude["default"].weight.grad], [A.grad, B.grad, m.grad])
    assert row.output(model).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXACT if "DoRA" in name and "linear" not in name])
def test_dora_of_other_layers(name):
    row, model = BY_NAME[name], built(name)
    (pair,) = find_lora_pairs(model)
    merged = copy.deepcopy(model).merge_and_unload()
    weight = merged.body.weight.data
    rows, columns = weight.flatten(1).shape
    z = standard_normal(torch.arange(rows), columns, NoiseKey(SEED, 0, 0)).double()
    axis = 0 if isinstance(merged.body, nn.Embedding) else 1
    scale = SIGMA * weight.flatten(1).norm(dim=axis, keepdim=True) / math.sqrt(weight.flatten(1).shape[axis])
    weight += (z * scale).view_as(weight)
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        out = row.output(model)
    torch.testing.assert_close(out, row.output(merged), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_perturbed_are_named(name):
    with (
        pytest.raises(
            ValueError, match=f"the weight of .*body.* cannot be perturbed: .*{REFUSED[name]}.* Leave it out"
        ),
        perturbed_weights(built(name), sigma=SIGMA),
    ):
        pass


def of_linear(**settings):
    torch.manual_seed(0)
    return get_peft_model(Net(nn.Linear(6, 5)), LoraConfig(r=3, target_modules=["body"], **settings)).double()


def test_models_that_cannot_be_perturbed_are_told_why():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    trained, offloaded, merged, several = of_linear(), of_linear(), of_linear(), of_linear(use_dora=True)
    trained.base_model.model.body.base_layer.weight.requires_grad_(True)
    offloaded.base_model.model.body.base_layer.to("meta")
    merged.merge_adapter()
    several.add_adapter("other", LoraConfig(r=3, target_modules=["body"]))
    several.base_model.set_adapter(["default", "other"])
    own = get_peft_model(Net(Doubled(6, 5)), LoraConfig(r=3, target_modules=["body"]))
    compiled = of_linear()
    compiled.base_model.model.body.compile()
    cases = [
        (trained, "it is trained itself. Freeze it"),
        (offloaded, "it is offloaded"),
        (merged, r"Call model.unmerge_adapter\(\) first"),
        (several, r"Activate one, by model.set_adapter\(name\)"),
        (own, "the forward pass of Doubled is not known"),
        (of_linear(use_dora=True, lora_dropout=0.1), "Set lora_dropout=0"),
        (compiled, "is compiled, and would not see the noise"),
        (nn.Linear(2, 2), "has no LoRA layer"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message), perturbed_weights(model, sigma=SIGMA):
            pass


def test_two_adapters_count_in_one_weight():
    model = of_linear(init_lora_weights=False)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["body"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model = model.double()
    layer, x = model.base_model.model.body, torch.randn(4, 6).double()
    weight = layer.base_layer.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    z = standard_normal(torch.arange(5), 6, NoiseKey(SEED, 0, 0)).double()
    noise = SIGMA * z * weight.norm(dim=1, keepdim=True) / math.sqrt(6)
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        out = layer(x)
    torch.testing.assert_close(out, nn.functional.linear(x, weight + noise, layer.base_layer.bias))


@pytest.mark.parametrize("name", IN_DEFAULT_RUN)
def test_tiles_of_one_row_give_the_same(name, monkeypatch):
    row, model = BY_NAME[name], built(name)
    results = []
    for elements in (1, 2**20):
        monkeypatch.setitem(noisy_layers.TILE_ELEMENTS, "cpu", elements)
        model.zero_grad()
        with perturbed_weights(model, sigma=SIGMA, seed=SEED):
            results.append([row.output(model)])
            row.loss(model).backward()
        results[-1] += [gradient.clone() for gradient in gradients(model).values()]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", [False, "pissa"])  # the latter changes the base
def test_the_gradient_reaches_inputs_and_trained_biases(start):
    model, x = of_linear(init_lora_weights=start, bias="all"), torch.randn(4, 6).double().requires_grad_()
    layer = model.base_model.model.body
    noise = dense_noise(model)["base_model.model.body"]
    out = nn.functional.linear(
        x, layer.base_layer.weight + layer.get_delta_weight("default") + noise, layer.base_layer.bias
    )
    expected = torch.autograd.grad(out.tanh().sum(), [x, layer.base_layer.bias])
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        out = layer(x)
    torch.testing.assert_close(torch.autograd.grad(out.tanh().sum(), [x, layer.base_layer.bias]), expected)


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_padding_of_convolutions(padding):
    torch.manual_seed(0)
    settings = {"r": 3, "target_modules": ["body"], "init_lora_weights": False}
    model = get_peft_model(Net(nn.Conv2d(4, 6, 3, **padding)), LoraConfig(**settings)).double()
    noisy, x = with_dense_noise(model), torch.randn(2, 4, 6, 6).double().requires_grad_()
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        out = model(x)
    expected = noisy(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (out, expected)))


@pytest.mark.parametrize("name", ["linear", "Conv1D of GPT-2", "embedding"])
def test_no_tokens(name):
    """As for an expert that no token is sent to."""
    model, x = built(name), torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    layer, x = model.base_model.model.body, torch.zeros(0, 3, dtype=torch.long) if name == "embedding" else x
    plain = layer(x)
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        out = layer(x)
        out.sum().backward()
    assert out.shape == plain.shape


@pytest.mark.parametrize("name", ["linear", "experts (in, out)"])
def test_a_second_noise_is_refused(name):
    row, model = BY_NAME[name], built(name)
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        expected = row.output(model)
        with (
            pytest.raises(RuntimeError, match="perturbed already"),
            perturbed_weights(model, sigma=SIGMA, seed=SEED + 1),
        ):
            pass
        assert torch.equal(row.output(model), expected)


# ---- in low precision ----


def error(out, exact):
    return (out.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_the_product_and_not_the_noise(autocast):
    torch.manual_seed(0)
    model = get_peft_model(Net(nn.Linear(96, 80)), LoraConfig(r=3, target_modules=["body"])).bfloat16()
    exact = copy.deepcopy(model).double()
    if autocast:
        model = model.float()
    x = torch.randn(64, 96).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), perturbed_weights(model, sigma=0.05, seed=SEED):
        y = model.base_model.model.body(x.float() if autocast else x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = model.base_model.model.body(x.float() if autocast else x)
    layer = exact.base_model.model.body
    noise = dense_noise(exact, 0.05)["base_model.model.body"]
    of_noise = nn.functional.linear(x.double(), noise)
    assert error(y, layer(x.double()) + of_noise) < 2 * error(plain, layer(x.double()))
    rounded = (layer.base_layer.weight + noise).bfloat16().double() - layer.base_layer.weight
    from_sum = nn.functional.linear(x.double(), rounded)
    assert error(y.double() - plain.double(), of_noise) < 0.1 < 10 * error(from_sum, of_noise)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_quantised_bases(bits):
    pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_bnb_weight

    row, model = BY_NAME[f"{bits}-bit base"], built(f"{bits}-bit base")
    layer, x = model.base_model.model.body, torch.randn(9, 64, requires_grad=True)
    layer(x)  # 8-bit layers initialise their state
    codes = layer.base_layer.weight.data.clone()
    weight = dequantize_bnb_weight(layer.base_layer.weight, getattr(layer.base_layer, "state", None)).float()
    delta = layer.get_delta_weight("default").detach()
    z = standard_normal(torch.arange(32), 64, NoiseKey(SEED, 0, 0))
    noise = SIGMA * z * (weight + delta).norm(dim=1, keepdim=True) / 8
    plain = layer(x)
    with perturbed_weights(model, sigma=SIGMA, seed=SEED):
        out = layer(x)
    torch.testing.assert_close(out, plain + x @ noise.T, rtol=1e-4, atol=1e-5)
    of_plain, of_noisy = (torch.autograd.grad(y.sum(), x)[0] for y in (plain, out))
    torch.testing.assert_close(of_noisy, of_plain + noise.sum(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.base_layer.weight.data, codes) and row.output(model).isfinite().all()
