"""Every layer kind: the factors' adjusted gradients move the weight, as PEFT computes it, by the projected gradient."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_layers import ROWS, needs_weight_tying, peft_ties_adapters, tied_llama
from lorapro_hf import LoRAProConfig, create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.factors.stacks import stacks_of
from lorapro_hf.optim.projected_gradients import project_pair_gradients_

LINEAR = ROWS[0]
by_name = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def two_linears():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4))


def delta_weight(pair):
    """The pair's share of the adapted weight, from PEFT's own code where that is right."""
    if pair.layer.get_base_layer().__class__.__name__ == "Conv2d" and pair.layer.get_base_layer().groups > 1:
        # PEFT cannot merge grouped convolutions; each group has its own slice of the factors.
        slices = zip(pair.A.chunk(2, dim=0), pair.B.chunk(2, dim=0), strict=True)
        return pair.scaling * torch.cat([B.flatten(1) @ A.flatten(1) for A, B in slices])
    return pair.layer.get_delta_weight(pair.adapter_name)


@torch.no_grad()
def first_order_map(pair):
    """The matrix from (vec of a step of A, vec of a step of B) to the change of the weight, which is bilinear."""
    columns = []
    for factor in (pair.A, pair.B):
        kept = factor.clone()
        for index in range(factor.numel()):
            unit = torch.zeros(factor.numel(), dtype=factor.dtype)
            unit[index] = 1
            factor.copy_(unit.view_as(factor))
            columns.append(delta_weight(pair).flatten().double())
            factor.copy_(kept)
    return torch.stack(columns, dim=1)


def stacked(tensors):
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def assert_moves_by_the_projection(pair, raw, adjusted, tolerance):
    jacobian = first_order_map(pair)
    # Factor gradients are Jᵀ g: the closest reachable change to g is J (JᵀJ)⁺ Jᵀ g.
    expected = jacobian @ torch.linalg.pinv(jacobian.T @ jacobian, hermitian=True, rtol=1e-9) @ raw
    assert (jacobian @ adjusted - expected).norm() <= tolerance * expected.norm()
    assert expected.norm() > 0
    assert (jacobian @ raw - expected).norm() > 0.1 * expected.norm()  # plain LoRA's gradient does not pass


@by_name
def test_realised_change_is_the_projected_gradient(row):
    model = row.build()
    pairs = find_lora_pairs(model)
    assert len(pairs) == row.pairs
    row.loss(model).backward()
    raw = [stacked([pair.A.grad, pair.B.grad]) for pair in pairs]
    norm = project_pair_gradients_(pairs, LoRAProConfig())
    adjusted = [stacked([pair.A.grad, pair.B.grad]) for pair in pairs]
    for pair, before, after in zip(pairs, raw, adjusted, strict=True):
        assert_moves_by_the_projection(pair, before, after, 1e-7 if row.dtype == torch.float64 else 1e-4)
    moves = [first_order_map(pair) @ after.double() for pair, after in zip(pairs, adjusted, strict=True)]
    torch.testing.assert_close(norm.double(), torch.cat(moves).norm(), rtol=1e-4, atol=0)


def test_channels_last_convolution_is_written_in_place():
    row = next(row for row in ROWS if row.name == "Conv2d")
    one, two = row.build(), row.build()
    two.load_state_dict(one.state_dict())
    two.to(memory_format=torch.channels_last)
    for model in (one, two):
        optimizer = create_lorapro_optimizer(model, lr=1e-2)
        row.loss(model).backward()
        optimizer.step()
    assert find_lora_pairs(two)[0].A.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(find_lora_pairs(two)[0].A, find_lora_pairs(one)[0].A)


def test_experts_are_projected_one_by_one():
    row = next(row for row in ROWS if row.name.startswith("experts"))
    model = row.build()
    (pair,) = find_lora_pairs(model)
    assert (pair.layout, pair.batch) == ("experts", 3)
    as_experts = pair.matrix_B(pair.B) @ pair.matrix_A(pair.A) * pair.scaling
    torch.testing.assert_close(as_experts.mT, pair.layer.get_delta_weight("default"))
    assert torch.equal(pair.factor_A(pair.matrix_A(pair.A)), pair.A)
    assert torch.equal(pair.factor_B(pair.matrix_B(pair.B)), pair.B)


@needs_weight_tying
def test_tied_embeddings_make_one_pair_with_both_gradients():
    model = tied_llama().double()
    # `.double()` parts the memory of tied parameters, as PEFT ties them by memory: build them tied again.
    embed, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    head.lora_A["default"].weight = nn.Parameter(embed.lora_embedding_B["default"].data.t())
    head.lora_B["default"].weight = nn.Parameter(embed.lora_embedding_A["default"].data.t())
    (pair,) = find_lora_pairs(model)
    assert {id(p) for p in pair.tied_parameters} == {
        id(head.lora_A["default"].weight),
        id(head.lora_B["default"].weight),
    }
    tokens = torch.arange(24).view(2, 12) * 5 % 23
    model(input_ids=tokens, labels=tokens).loss.backward()
    total_A = pair.A.grad + head.lora_B["default"].weight.grad.T
    total_B = pair.B.grad + head.lora_A["default"].weight.grad.T
    assert head.lora_A["default"].weight.grad.norm() > 0 and pair.A.grad.norm() > 0
    project_pair_gradients_([pair], LoRAProConfig())
    assert_moves_by_the_projection(pair, stacked([total_A, total_B]), stacked([pair.A.grad, pair.B.grad]), 1e-7)
    assert all(parameter.grad is None for parameter in pair.tied_parameters)


@needs_weight_tying
def test_tied_embeddings_are_stepped_once():
    model = tied_llama()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": "efficient"})
    (pair,) = optimizer.pairs
    before = pair.A.detach().clone()
    tokens = torch.arange(24).view(2, 12) * 5 % 23
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    # Adam's first step has size lr in each element, a little more while B is small; two steps would show as 2 lr.
    assert (pair.A - before).abs().max() <= 1.5e-2
    assert all(list(optimizer.state[parameter]) == ["step"] for parameter in pair.tied_parameters)


@needs_weight_tying
def test_tied_embeddings_parted_by_a_move_are_refused():
    model = tied_llama()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    model.to(torch.float64)  # gives every parameter memory of its own
    tokens = torch.arange(24).view(2, 12) * 5 % 23
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(RuntimeError, match=r"no longer share their factors in memory.*Build the optimizer"):
        optimizer.step()


def test_only_active_adapters_count():
    model = LINEAR.build()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=7, target_modules=["body"]))
    assert [pair.adapter_name for pair in find_lora_pairs(model)] == ["default"]
    model.set_adapter("other")
    (pair,) = find_lora_pairs(model)
    assert (pair.adapter_name, pair.scaling, tuple(pair.A.shape)) == ("other", 3.5, (2, 6))


def test_patterns_and_rslora_give_each_layer_its_own_scaling():
    settings = {"rank_pattern": {"0": 2}, "alpha_pattern": {"2": 9}, "use_rslora": True}
    model = get_peft_model(two_linears(), LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], **settings))
    first, second = find_lora_pairs(model)
    assert first.scaling == pytest.approx(6 / 2**0.5) and len(first.A) == 2
    assert second.scaling == pytest.approx(9 / 2) and len(second.A) == 4


@pytest.mark.parametrize(
    "change", [lambda layer: layer.set_scale("default", 3.0), lambda layer: layer.scale_layer(0.25)]
)
def test_scaling_is_read_at_step_time(change):
    model = LINEAR.build()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    (pair,) = optimizer.pairs
    change(pair.layer)
    fresh = LINEAR.build()
    fresh.load_state_dict(model.state_dict())
    change(find_lora_pairs(fresh)[0].layer)
    for one in (model, fresh):
        LINEAR.loss(one).backward()
    optimizer.step()
    create_lorapro_optimizer(fresh, lr=1e-2).step()
    assert torch.equal(pair.A, find_lora_pairs(fresh)[0].A) and torch.equal(pair.B, find_lora_pairs(fresh)[0].B)


@pytest.mark.parametrize("mode", ["full", "factored", "spectral"])
def test_same_steps_whatever_the_split_into_scaling_and_factors(mode):
    """ΔW is what counts: scaling s with factors (A, B) and scaling 4 s with (A/2, B/2) are the same weight."""
    changes = []
    for alpha, shrink in ((5, 1), (20, 2)):
        torch.manual_seed(0)
        model = LINEAR.build(lora_alpha=alpha)
        (pair,) = find_lora_pairs(model)
        with torch.no_grad():
            torch.manual_seed(3)
            pair.A.copy_(torch.randn(3, 6) / shrink)
            pair.B.copy_(torch.randn(5, 3) / shrink)
        before = delta_weight(pair).detach().clone()
        LINEAR.loss(model).backward()
        create_lorapro_optimizer(model, lr=1e-5, config={"mode": mode, "x_mode": "symmetric"}).step()
        changes.append(delta_weight(pair).detach() - before)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-4, atol=0)


def test_layers_of_one_shape_keep_their_own_scaling_in_the_batch():
    """Two layers that are projected in one batch, with scalings 1 and 10: each moves as it would alone."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    settings = {"target_modules": ["0", "2"], "alpha_pattern": {"2": 20}, "init_lora_weights": False}
    model = get_peft_model(body, LoraConfig(r=2, lora_alpha=2, **settings)).double()
    pairs = find_lora_pairs(model)
    assert [pair.scaling for pair in pairs] == [1, 10]
    model(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
    raw = [stacked([pair.A.grad, pair.B.grad]) for pair in pairs]
    project_pair_gradients_(pairs, LoRAProConfig())
    for pair, before in zip(pairs, raw, strict=True):
        jacobian = first_order_map(pair)
        expected = jacobian @ torch.linalg.pinv(jacobian.T @ jacobian, hermitian=True, rtol=1e-9) @ before
        torch.testing.assert_close(jacobian @ stacked([pair.A.grad, pair.B.grad]), expected)


def test_rtol_reaches_the_projection():
    model = LINEAR.build()
    (pair,) = find_lora_pairs(model)
    with torch.no_grad():
        pair.B[:, 1:] *= 1e-3
    adjusted = []
    for rtol in (None, 1e-2):
        model.zero_grad()
        LINEAR.loss(model).backward()
        project_pair_gradients_([pair], LoRAProConfig(rtol=rtol))
        adjusted.append(pair.A.grad.norm())
    assert adjusted[1] < 1e-2 * adjusted[0]  # the weak directions, which ask for large steps of A, are left out


def test_adapters_of_mixed_dtypes_are_kept_apart():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0", "2"])
    )
    first, second = find_lora_pairs(model)
    assert len(stacks_of([first, second])) == 1
    second.layer.double()
    assert len(stacks_of([first, second])) == 2
    model.base_model.model[2].forward = lambda x, own=model.base_model.model[2].forward: own(x.double())
    model(torch.randn(5, 6)).square().sum().backward()
    project_pair_gradients_([first, second], LoRAProConfig())
    assert (first.B.grad.dtype, second.B.grad.dtype) == (torch.float32, torch.float64)


def test_names_are_those_of_the_model():
    model = LINEAR.build()
    (pair,) = find_lora_pairs(model)
    assert model.get_submodule(pair.name) is pair.layer
    assert "default" in repr(pair) and pair.name in repr(pair)


def test_wrapped_and_injected_models_are_found():
    from peft import inject_adapter_in_model

    injected = inject_adapter_in_model(LoraConfig(target_modules=["0", "2"]), two_linears())
    assert len(find_lora_pairs(injected)) == 2
    assert len(find_lora_pairs(nn.Sequential(LINEAR.build()))) == 1


def freeze(model, letter):
    for name, parameter in model.named_parameters():
        if f"lora_{letter}" in name:
            parameter.requires_grad_(False)
    return model


def scaled(factor):
    model = LINEAR.build()
    find_lora_pairs(model)[0].layer.set_scale("default", factor)
    return model


def tied_with_two_scalings():
    if not peft_ties_adapters():
        pytest.skip("this PEFT does not tie adapters")
    model = tied_llama()
    model.base_model.model.lm_head.set_scale("default", 2.0)
    return model


def half_shared():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0", "1"])
    ).base_model.model
    model[1].lora_A["default"].weight = model[0].lora_A["default"].weight
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (two_linears, r"Sequential has no LoRA layer; wrap it first: .*get_peft_model"),
        (lambda: freeze(LINEAR.build(), "B"), r"body: lora_B of adapter 'default' is frozen"),
        (lambda: scaled(float("nan")), r"body: the scaling of adapter 'default' is nan.*lora_alpha"),
        (tied_with_two_scalings, r"lm_head \(Linear\): .*with another scaling"),
        (half_shared, r"1 \(Linear\): LoRA-Pro does not support this layer, because it shares only one"),
    ],
)
def test_what_cannot_be_right_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        find_lora_pairs(build())


def test_parameters_instead_of_the_model_are_refused():
    with pytest.raises(TypeError, match="expected the model itself, got a generator; pass model"):
        find_lora_pairs(LINEAR.build().parameters())


def test_missing_gradient_of_one_factor_is_refused():
    model = LINEAR.build()
    pairs = find_lora_pairs(model)
    LINEAR.loss(model).backward()
    pairs[0].A.grad = None
    with pytest.raises(RuntimeError, match="body: lora_A has no gradient but the other factor has one"):
        project_pair_gradients_(pairs, LoRAProConfig())
