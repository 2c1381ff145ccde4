"""`weight_gradients` of every kind of layer is autograd's own gradient of the frozen weight, and changes nothing."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_layers import ALL_ROWS, Row, needs_weight_tying, tied_llama
from lorapro_hf import find_lora_pairs, weight_gradients
from trainer_helpers import tiny_lora
from weight_oracle import of_autograd

ROWS = {row.name: row for row in ALL_ROWS if set(row.settings) <= set(LoraConfig.__dataclass_fields__)}
IN_DEFAULT_RUN = {"Conv1D of GPT-2", "embedding", "Conv2d", "experts (in, out)", "experts (out, in)"}
PLAIN = [
    pytest.param(name, marks=[] if name in IN_DEFAULT_RUN else [pytest.mark.slow])
    for name, row in ROWS.items()
    if "bit base" not in name and name not in ("MultiheadAttention", "Conv2d with groups", "a block used twice")
]


def gradients_of(model, batches, loss_fn=None, **options):
    return {pair.name: gradient for pair, gradient in weight_gradients(model, batches, loss_fn, **options)}


def assert_close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape and gradient.norm() > 0
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("name", PLAIN)
def test_gradient_is_that_of_autograd(name):
    row = ROWS[name]
    model = row.build()
    found = gradients_of(model, [1.0, 2.0], lambda model, factor: factor * row.loss(model))
    assert_close(found, of_autograd(model, lambda model: 1.5 * row.loss(model)))
    for pair in find_lora_pairs(model):
        product = pair.matrix_B(pair.B.detach()) @ pair.matrix_A(pair.A.detach())
        assert found[pair.name].shape == product.shape and found[pair.name].dtype == torch.float64


@pytest.mark.parametrize("name", ["linear with DoRA", "Conv2d with DoRA", "Conv1D of GPT-2"])
def test_dropout(name):
    """DoRA then computes with the weight itself, beside the layer."""
    row = ROWS[name]
    model = row.build(lora_dropout=0.4)
    for parameter_name, parameter in model.named_parameters():
        if "magnitude" in parameter_name:
            parameter.data *= torch.linspace(0.5, 2, parameter.numel()).view_as(parameter).double()
    found = gradients_of(model, [None], lambda model, _: row.loss(model))
    assert_close(found, of_autograd(model, row.loss))


def test_convolution_with_groups_is_that_of_one_without():
    row = ROWS["Conv2d with groups"]
    model = row.build()
    (pair,) = find_lora_pairs(model)
    grouped = pair.layer.get_base_layer()
    dense = nn.Conv2d(4, 6, 3).double()
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight[:3, :2], dense.weight[3:, 2:] = grouped.weight[:3], grouped.weight[3:]
        dense.bias.copy_(grouped.bias)
    delta = (pair.scaling * pair.matrix_B(pair.B.detach()) @ pair.matrix_A(pair.A.detach())).view(6, 4, 3, 3)
    effective = (dense.weight.detach() + delta).requires_grad_()
    torch.manual_seed(1)
    out = torch.tanh(nn.functional.conv2d(row.inputs().double(), effective, dense.bias))
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = gradients_of(model, [None], lambda model, _: row.loss(model))
    assert_close(found, {pair.name: effective.grad.view(2, 3, 36)})


@pytest.mark.parametrize("mode", ["circular", "same"])
def test_padding_of_convolutions(mode):
    settings = {"padding": "same"} if mode == "same" else {"padding": 2, "padding_mode": mode}
    row = Row("padded", lambda: Padded(settings), inputs=lambda: torch.randn(3, 4, 6, 6))
    model = row.build()
    assert_close(gradients_of(model, [0], lambda model, _: row.loss(model)), of_autograd(model, row.loss))


class Padded(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.body = nn.Conv2d(4, 6, 3, **settings)

    def forward(self, x):
        return torch.tanh(self.body(x))


def test_multihead_attention_is_refused():
    with pytest.raises(ValueError, match=r"body: .*PEFT merges the factors .* Leave it out of target_modules"):
        weight_gradients(ROWS["MultiheadAttention"].build(), [0])


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "dora"), [(4, False), (4, True), (8, False)])
def test_quantised_base(bits, dora):
    row = ROWS[f"{bits}-bit base"]
    model = row.build(use_dora=dora)
    (pair,) = find_lora_pairs(model)
    found = gradients_of(model, [0], lambda model, _: row.loss(model))
    assert found[pair.name].shape == (32, 64)
    scale = 1.0
    if dora:
        layer = pair.layer
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(layer.get_base_layer()).float()
        delta = pair.scaling * pair.B.detach() @ pair.A.detach()
        scale = (layer.lora_magnitude_vector["default"].weight.detach() / (weight + delta).norm(dim=1))[:, None]
    out = row.output(model)
    torch.manual_seed(1)
    x = row.inputs()
    dy = torch.linspace(-1, 2, out.numel()).view_as(out) * (1 - out.detach() ** 2)
    assert_close(found, {pair.name: scale * (dy.mT @ x)}, 2e-3 if bits == 8 else 1e-5)


def test_quantised_base_with_dora_and_dropout_is_refused():
    model = ROWS["linear with DoRA"].build(lora_dropout=0.1)
    (pair,) = find_lora_pairs(model)
    pair.layer.get_base_layer().weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"body: .*DoRA reads the quantised weight itself .* model.eval"):
        weight_gradients(model, [0])
    model.eval()
    weight_gradients(model, [0])


def test_quantised_experts_are_refused():
    model = ROWS["experts (in, out)"].build()
    (pair,) = find_lora_pairs(model)
    pair.layer.get_base_layer().weight = nn.Parameter(torch.zeros(3, 6, 5, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised, which autograd cannot .* Load the model unquantised"):
        weight_gradients(model, [0])


class Scaled(nn.Embedding):
    """As Gemma's embedding."""

    def forward(self, tokens):
        return 3 * super().forward(tokens)


def test_layers_of_classes_with_a_forward_of_their_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Scaled(11, 6, padding_idx=2)

        def forward(self, x):
            return torch.tanh(self.body(x))

    row = Row("scaled", Net, inputs=ROWS["embedding"].inputs)
    model = row.build()
    assert_close(gradients_of(model, [0], lambda model, _: row.loss(model)), of_autograd(model, row.loss))


def test_padding_token_gets_no_gradient():
    row = Row("padded embedding", lambda: Embedded(nn.Embedding(11, 6, padding_idx=2)), inputs=ROWS["embedding"].inputs)
    model = row.build()
    found = gradients_of(model, [0], lambda model, _: row.loss(model))
    assert_close(found, of_autograd(model, row.loss))
    assert not next(iter(found.values()))[:, 2].any()


class Embedded(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return torch.tanh(self.body(x))


class Shared(nn.Module):
    """One layer called twice, another with the same frozen weight, and a third with the first one's factors."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x):
        return torch.tanh(self.three(torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.one(x))))))))


def test_shared_weights_and_shared_factors():
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["one", "two", "three"], "init_lora_weights": False}
    model = get_peft_model(Shared(), LoraConfig(**settings)).double()
    one, two, three = (getattr(model.base_model.model, name) for name in ("one", "two", "three"))
    three.lora_A["default"].weight, three.lora_B["default"].weight = (
        one.lora_A["default"].weight,
        one.lora_B["default"].weight,
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    found = gradients_of(model, [x], lambda model, x: model(x).square().sum())
    parted = copy.deepcopy(model)
    one, two, three = (getattr(parted.base_model.model, name).get_base_layer() for name in ("one", "two", "three"))
    two.weight = nn.Parameter(one.weight.detach().clone())
    for layer in (one, two, three):
        layer.weight.requires_grad_(True)
    parted(x).square().sum().backward()
    expected = {"one": one.weight.grad + three.weight.grad, "two": two.weight.grad}
    assert_close(found, {f"base_model.model.{name}": gradient for name, gradient in expected.items()})


@needs_weight_tying
def test_tied_embedding_and_head():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # a cast would part the factors
    try:
        model = tied_llama()
    finally:
        torch.set_default_dtype(default)
    tokens = torch.arange(12).view(2, 6) * 5 % 23
    batch = {"input_ids": tokens, "labels": tokens}
    (pair,) = find_lora_pairs(model)
    model.requires_grad_(True)
    weight = model.base_model.model.model.embed_tokens.get_base_layer().weight
    expected = torch.autograd.grad(model(**batch).loss, weight)[0]
    weight.requires_grad_(False)
    found = gradients_of(model, [batch])
    expected = expected.mT if "embed" in pair.name else expected
    assert_close(found, {pair.name: expected})


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    row = ROWS["experts (in, out)"]
    expert, linear = row.build(), ROWS["linear"].build()
    for model, loss in ((expert, row.loss), (linear, ROWS["linear"].loss)):

        def checkpointed(model, _, loss=loss):
            return loss(lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant))

        assert_close(gradients_of(model, [0], checkpointed), of_autograd(model, loss))


@pytest.mark.parametrize("is_first", [True, False])
def test_a_pass_of_the_reference_model_leaves_the_factors_frozen(is_first):
    row = ROWS["linear"]
    model = row.build()

    def with_reference(model, _):
        loss = None if is_first else row.loss(lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=False))
        with torch.no_grad(), model.disable_adapter():
            row.loss(model)
        return row.loss(lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=False)) if is_first else loss

    assert_close(gradients_of(model, [0, 1], with_reference), of_autograd(model, row.loss))
    for pair in find_lora_pairs(model):
        assert pair.A.grad is None and pair.B.grad is None and pair.A.requires_grad and pair.B.requires_grad


def trained_llama(**settings):
    """With gradients and dropout."""
    model = tiny_lora(lora_dropout=0.3, **settings).double().train()
    tokens = torch.arange(24).view(4, 6) % 16 + 3
    batches = [{"input_ids": part, "labels": part} for part in tokens.split(2)]
    model(**batches[0]).loss.backward()
    return model, batches


def state_of(model):
    return {
        name: (p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone(), id(p))
        for name, p in model.named_parameters()
    }


def random_numbers():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("max_bytes", [0, 2**30])
def test_nothing_changes(max_bytes):
    model, batches = trained_llama()
    model.base_model.model.lm_head.eval()
    before, modes = state_of(model), {name: module.training for name, module in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), set(m._parameters)) for m in model.modules()]
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = random_numbers()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)

    def loss_fn(model, batch):
        random_numbers()
        return model(**batch).loss

    for _ in weight_gradients(model, batches, loss_fn, max_bytes=max_bytes):
        for name, (requires_grad, gradient, value, identity) in state_of(model).items():
            old = before[name]
            assert (requires_grad, identity) == (old[0], old[3])
            assert torch.equal(value, old[2]) and (gradient is old[1] or torch.equal(gradient, old[1]))
    assert random_numbers() == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), set(m._parameters)) for m in model.modules()]


def test_running_statistics_do_not_change():
    body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    model = get_peft_model(body, LoraConfig(r=2, target_modules=["0"]))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients_of(model, [torch.randn(6, 4)], lambda model, x: model(x).square().sum() + model(2 * x).sum())
    assert before and all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_loss_that_fails_leaves_the_model_as_it_was():
    model, batches = trained_llama()
    before = state_of(model)

    def failing(model, batch):
        model(**batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(weight_gradients(model, batches, failing))
    assert {name: (s[0], s[3]) for name, s in state_of(model).items()} == {n: (s[0], s[3]) for n, s in before.items()}
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_at_a_time_have_the_same_dropout_and_run_the_batches_again():
    model, batches = trained_llama()
    count = len(find_lora_pairs(model))
    passes = []

    def loss_fn(model, batch):
        passes.append(batch)
        return model(**batch).loss

    torch.manual_seed(7)
    together = gradients_of(model, batches, loss_fn)
    assert len(passes) == 2 and all(gradient.dtype == torch.float64 for gradient in together.values())
    torch.manual_seed(7)
    one_by_one = gradients_of(model, batches, loss_fn, max_bytes=0)
    assert len(passes) == 2 + 2 * count
    assert list(one_by_one) == [pair.name for pair in find_lora_pairs(model)]
    assert_close(one_by_one, together, 1e-12)


def test_dtypes():
    row = ROWS["linear"]
    model = row.build()
    expected = gradients_of(model, [0], lambda model, _: row.loss(model))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        found = gradients_of(model, [0], lambda model, _: row.loss(model), dtype=dtype)
        assert all(gradient.dtype == dtype for gradient in found.values())
        assert_close({name: g.double() for name, g in found.items()}, expected, tolerance)
    model.bfloat16()
    found = gradients_of(model, [0], lambda model, _: row.loss(lambda x: model(x.bfloat16())))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert_close({name: g.double() for name, g in found.items()}, expected, 3e-2)


def test_several_adapters_have_the_gradient_of_their_layer():
    row = ROWS["Conv1D of GPT-2"]
    model = row.build()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["body"], fan_in_fan_out=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model.double()
    found = list(weight_gradients(model, [0], lambda model, _: row.loss(model)))
    assert [pair.adapter_name for pair, _ in found] == ["default", "other"]
    expected = of_autograd(model, row.loss)
    for pair, gradient in found:
        assert_close({pair.name: gradient}, expected)


def test_compiled_layers_run_without_the_compiler():
    model, _ = trained_llama()
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="eager")
    tokens = torch.arange(6).view(1, 6)
    assert len(gradients_of(model, [{"input_ids": tokens, "labels": tokens}])) == len(find_lora_pairs(model))


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches is empty"),
        (iter([1]), {"max_bytes": 0}, r"batches is an iterator, .* in 2 passes \(max_bytes=0\). Give a list"),
        ([1], {"max_bytes": -1}, "max_bytes=-1 must be a whole number"),
        ([1], {}, "a batch is a int, not a dictionary of the model's arguments. Give loss_fn="),
        ([{"input": torch.ones(2, 6)}], {}, "the model returns no loss. Put labels into the batches"),
        ([1], {"loss_fn": lambda model, batch: torch.ones(3)}, r"must be a scalar tensor, but it is of shape \(3,\)"),
        ([1], {"loss_fn": lambda model, batch: 1.0}, "must be a scalar tensor, but it is a float"),
    ],
)
def test_refusals(batches, options, message):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match=message):
        list(weight_gradients(model, batches, **options))


def test_a_layer_without_a_backward_pass_is_refused():
    model = get_peft_model(
        nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)]), LoraConfig(r=2, target_modules=["0", "1"])
    )
    with pytest.raises(RuntimeError, match=r"model.1: its gradient cannot be computed, since no backward pass"):
        list(weight_gradients(model, [0], lambda model, _: model.base_model.model[0](torch.ones(2, 6)).sum()))


def test_a_gradient_that_is_not_finite_is_refused():
    row = ROWS["linear"]
    with pytest.raises(RuntimeError, match=r"body: its gradient is not finite"):
        list(weight_gradients(row.build(), [0], lambda model, _: float("inf") * row.loss(model)))


def test_sharded_parameters_are_refused():
    model = ROWS["linear"].build()
    model.base_model.model.body.get_base_layer().weight.ds_shape = (5, 6)
    with pytest.raises(RuntimeError, match=r"body.base_layer.weight is sharded .* Call it before the model is sharded"):
        weight_gradients(model, [0])
