"""LoRAProAdamW against a dense float64 run, against torch.optim.AdamW, and through its checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorapro_hf.optimizer
from lora_layers import ROWS, Net, Row
from lorapro_hf import (
    LoRAProAdamW,
    LoRAProConfig,
    LoRAProOptimizerFactory,
    create_lorapro_optimizer,
    find_lora_pairs,
    project_lora_gradients,
)
from lorapro_hf.config import MODES, X_MODES
from lorapro_hf.pair_gradients import PairBatch
from lorapro_hf.reference import DenseFullAdamW

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


@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize("zero_B", [True, False])
def test_full_mode_equals_the_dense_run(x_mode, zero_B):
    """Six steps from B = 0 or from random factors, for a loss whose full gradient depends on the weight."""
    model = Row("", lambda: Net(nn.Linear(12, 9, bias=False)), {"r": 3}).build(init_lora_weights=zero_B)
    hyper = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = create_lorapro_optimizer(model, config={"x_mode": x_mode}, **hyper)
    (pair,) = optimizer.pairs
    dense = DenseFullAdamW(pair.A, pair.B, pair.scaling, x_mode=x_mode, **hyper)
    inputs, target = torch.randn(20, 12, dtype=torch.float64), torch.randn(20, 9, dtype=torch.float64)
    weight = pair.layer.base_layer.weight.detach()
    for _ in range(6):
        model.zero_grad()
        ((model(inputs) - target) ** 2).sum().backward()
        full = (weight + pair.scaling * dense.B @ dense.A).requires_grad_()
        (g,) = torch.autograd.grad(((torch.tanh(inputs @ full.T) - target) ** 2).sum(), full)
        optimizer.step()
        dense.step(g)
        for found, expected in ((pair.A, dense.A), (pair.B, dense.B)):
            assert (found - expected).norm() <= 1e-7 * expected.norm()
    torch.testing.assert_close(optimizer.state[pair.A]["exp_avg"], dense.M, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(optimizer.state[pair.A]["exp_avg_sq"], dense.V, rtol=1e-7, atol=1e-10)


def test_full_mode_in_several_row_blocks(monkeypatch):
    runs = []
    for block in (2**16, 30):
        monkeypatch.setitem(lorapro_hf.moments._BLOCK_ELEMENTS, "cpu", block)
        model = small_model(torch.float64)
        optimizer = create_lorapro_optimizer(model, lr=1e-2)
        for step in range(3):
            backward(model, step)
            optimizer.step()
        runs.append(torch.cat([p.detach().flatten() for pair in optimizer.pairs for p in (pair.A, pair.B)]))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)


@both_modes
def test_parameters_of_no_pair_get_torch_adamw_to_the_bit(mode):
    model = small_model(bias="lora_only", use_dora=True)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), config={"mode": mode})
    others = ordinary(optimizer)
    assert len(others) == 2 * 2 + 2 + 2  # two saved modules, two biases, two DoRA magnitudes
    mirror = [nn.Parameter(p.detach().clone()) for p in others]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    groups = [{"params": [twin], "weight_decay": decay[id(p)]} for p, twin in zip(others, mirror, strict=True)]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    stock = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9))
    for step in range(4):
        backward(model, step)
        for p, twin in zip(others, mirror, strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        stock.step()
        assert all(torch.equal(p, twin) for p, twin in zip(others, mirror, strict=True))


def test_efficient_mode_without_projection_is_torch_adamw_to_the_bit(monkeypatch):
    monkeypatch.setattr(PairBatch, "project", lambda self, grad_A, grad_B, config: (grad_A, grad_B))
    model = small_model()
    mirror = copy.deepcopy(model)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.1, config={"mode": "efficient"})
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    by_name = dict(mirror.named_parameters())
    groups = [
        {"params": [by_name[n] for n in group], "weight_decay": own["weight_decay"]}
        for group, own in zip(names, optimizer.param_groups, strict=True)
    ]
    stock = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(4):
        backward(model, step)
        backward(mirror, step)
        optimizer.step()
        stock.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, by_name[name]), name


def test_efficient_mode_is_torch_adamw_on_adjusted_gradients():
    model = small_model()
    mirror = copy.deepcopy(model)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": "efficient"})
    stock = torch.optim.AdamW([p for p in mirror.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(4):
        backward(model, step)
        backward(mirror, step)
        for pair in find_lora_pairs(mirror):
            pair.A.grad, pair.B.grad = project_lora_gradients(
                pair.A, pair.B, pair.A.grad, pair.B.grad, pair.scaling, x_mode="sylvester"
            )
        optimizer.step()
        stock.step()
    for one, two in zip(model.parameters(), mirror.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_full_mode_decays_the_product_of_the_factors():
    model = LINEAR.build()
    optimizer = create_lorapro_optimizer(model, lr=0.1, weight_decay=0.5)
    (pair,) = optimizer.pairs
    before = (pair.B @ pair.A).detach()
    pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    optimizer.step()
    torch.testing.assert_close((pair.B @ pair.A).detach(), (1 - 0.1 * 0.5) * before)


@both_modes
def test_factors_may_have_learning_rates_of_their_own(mode):
    model = LINEAR.build()
    (pair,) = find_lora_pairs(model)
    groups = [{"params": [pair.A], "lr": 0.0}, {"params": [pair.B], "lr": 1e-2}]
    optimizer = LoRAProAdamW(groups, [pair], config=LoRAProConfig(mode=mode))
    before = pair.A.detach().clone(), pair.B.detach().clone()
    LINEAR.loss(model).backward()
    optimizer.step()
    assert torch.equal(pair.A, before[0]) and not torch.equal(pair.B, before[1])


@both_modes
def test_moments_of_bf16_factors_are_fp32_and_stay_so(mode):
    model = small_model(torch.bfloat16)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    backward(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = create_lorapro_optimizer(small_model(torch.bfloat16), lr=1e-2, config={"mode": mode})
    fresh.load_state_dict(saved)
    for loaded in (optimizer, fresh):
        for pair in loaded.pairs:
            kept = [value for p in (pair.A, pair.B) for k, value in loaded.state.get(p, {}).items() if k != "step"]
            assert kept and all(value.dtype == torch.float32 for value in kept)
    assert_same(([], saved), ([], fresh.state_dict()))
    # The moments hold what bf16 cannot: they were not rounded on the way.
    pair = fresh.pairs[0]
    moment = fresh.state[pair.A if mode == "full" else pair.B]["exp_avg"]
    assert not torch.equal(moment.bfloat16().float(), moment)


@both_modes
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["pair", "other"])
def test_non_finite_gradients_leave_everything_as_it_was(mode, poison, where):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.1, config={"mode": mode})
    backward(model)
    optimizer.step()
    before = snapshot(optimizer)
    backward(model, 1)
    victim = optimizer.pairs[1].B if where == "pair" else ordinary(optimizer)[0]
    victim.grad.view(-1)[3] = poison
    optimizer.step()
    assert_same(before, snapshot(optimizer))
    assert optimizer.skipped_steps == 1
    backward(model, 1)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not torch.equal(before[0][0], snapshot(optimizer)[0][0])


def test_huge_finite_gradients_are_no_reason_to_skip():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    backward(model)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(1e18)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(p.isfinite().all() for p in model.parameters())


@both_modes
def test_pairs_without_gradient_wait(mode):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    backward(model)
    first, second = optimizer.pairs
    first.A.grad = first.B.grad = None
    before = first.A.detach().clone(), second.B.detach().clone()
    optimizer.step()
    assert torch.equal(first.A, before[0]) and not optimizer.state[first.A]
    assert not torch.equal(second.B, before[1])


@both_modes
def test_a_step_on_zero_gradients_at_lr_zero_is_harmless(mode):
    """torch.distributed.checkpoint makes such a step to create the state."""
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=0.0, weight_decay=0.1, config={"mode": mode})
    before = snapshot(optimizer)[0]
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, snapshot(optimizer)[0], strict=True))
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@both_modes
def test_resume_equals_uninterrupted_to_the_bit(mode):
    straight = small_model()
    optimizer = create_lorapro_optimizer(straight, lr=1e-2, config={"mode": mode})
    for step in range(3):
        backward(straight, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = small_model()
    resumed.load_state_dict(saved["model"])
    again = create_lorapro_optimizer(resumed, lr=1e-2, config={"mode": mode})
    again.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        for model, own in ((straight, optimizer), (resumed, again)):
            backward(model, step)
            own.step()
    assert_same(snapshot(optimizer), snapshot(again))


def test_skipped_steps_survive_a_resume():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    backward(model)
    optimizer.pairs[0].A.grad.fill_(float("nan"))
    optimizer.step()
    again = create_lorapro_optimizer(small_model(), lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.skipped_steps == 1


@both_modes
def test_state_is_tensors_and_its_size_is_estimated(mode):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    backward(model)
    optimizer.step()
    tensors = [(name, value) for state in optimizer.state.values() for name, value in state.items()]
    assert all(isinstance(value, torch.Tensor) for _, value in tensors)
    measured = sum(value.numel() * value.element_size() for name, value in tensors if name != "step")
    assert measured == optimizer.estimated_state_bytes()


@both_modes
def test_optimizer_can_be_copied_and_pickled(mode):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    backward(model)
    optimizer.step()
    model2, optimizer2 = pickle.loads(pickle.dumps((model, optimizer)))
    for one, own in ((model, optimizer), (model2, optimizer2)):
        backward(one, 1)
        own.step()
    assert_same(snapshot(optimizer), snapshot(optimizer2))


def test_groups_decay_as_in_trainer():
    model = small_model(bias="lora_only")
    decaying, others = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.3).param_groups
    assert decaying["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert all("bias" in name or name.startswith("base_model.model.1.") for name in others["param_names"])
    assert len(decaying["params"]) == 5 and len(others["params"]) == 5


def test_norm_is_that_of_the_adjusted_gradients():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    backward(model)
    squares = 0.0
    for pair in optimizer.pairs:
        h = project_lora_gradients(pair.A, pair.B, pair.A.grad, pair.B.grad, pair.scaling)
        squares += sum(float(one.norm()) ** 2 for one in h)
    optimizer.step()
    assert float(optimizer.last_grad_norm) == pytest.approx(squares**0.5, rel=1e-5)


def test_schedulers_drive_it():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = snapshot(optimizer)[0]
    backward(model)
    optimizer.step()
    scheduler.step()
    assert all(torch.equal(one, two) for one, two in zip(before, snapshot(optimizer)[0], strict=True))


def test_factors_of_one_pair_may_decay_differently():
    model = LINEAR.build()
    (pair,) = find_lora_pairs(model)
    groups = [{"params": [pair.A], "weight_decay": 0.5}, {"params": [pair.B], "weight_decay": 0.0}]
    optimizer = LoRAProAdamW(groups, [pair], lr=0.1)
    before = pair.A.detach().clone(), pair.B.detach().clone()
    pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    optimizer.step()
    torch.testing.assert_close(pair.A.detach(), (1 - 0.1 * 0.5) ** 0.5 * before[0])
    assert torch.equal(pair.B, before[1])


def test_decay_of_more_than_everything_stops_at_zero():
    model = LINEAR.build()
    optimizer = create_lorapro_optimizer(model, lr=1.0, weight_decay=2.0)
    (pair,) = optimizer.pairs
    pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    optimizer.step()
    assert not pair.A.any() and not pair.B.any()


def test_efficient_mode_rounds_a_bf16_factor_once():
    narrow, wide = small_model(torch.bfloat16), small_model(torch.bfloat16).float()
    for model in (narrow, wide):
        optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": "efficient"})
        generator = torch.Generator().manual_seed(2)
        for pair in optimizer.pairs:
            for factor in (pair.A, pair.B):
                factor.grad = torch.randn(factor.shape, generator=generator).bfloat16().to(factor.dtype)
        optimizer.step()
    for one, two in zip(find_lora_pairs(narrow), find_lora_pairs(wide), strict=True):
        assert torch.equal(one.A, two.A.bfloat16()) and torch.equal(one.B, two.B.bfloat16())


@both_modes
def test_distributed_checkpoint_functions_carry_the_state(mode):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, fresh = small_model(), small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    for step in range(2):
        backward(model, step)
        optimizer.step()
    again = create_lorapro_optimizer(fresh, lr=1e-2, config={"mode": mode})
    set_optimizer_state_dict(fresh, again, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    fresh.load_state_dict(model.state_dict())
    for one, own in ((model, optimizer), (fresh, again)):
        backward(one, 2)
        own.step()
    assert_same(snapshot(optimizer), snapshot(again))


@both_modes
def test_state_of_float64_factors_loads_into_float32_ones(mode):
    wide = small_model(torch.float64)
    optimizer = create_lorapro_optimizer(wide, lr=1e-2, config={"mode": mode})
    backward(wide)
    optimizer.step()
    narrow = small_model()
    again = create_lorapro_optimizer(narrow, lr=1e-2, config={"mode": mode})
    again.load_state_dict(optimizer.state_dict())
    backward(narrow, 1)
    again.step()
    assert all(value.dtype == torch.float32 for state in again.state.values() for value in state.values())


def test_gradients_that_overflow_in_the_projection_count_as_not_finite():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": "efficient"})
    backward(model)
    with torch.no_grad():
        for pair in optimizer.pairs:
            pair.B.copy_(torch.randn_like(pair.B) * 1e-25)
            pair.A.grad.fill_(1e20)
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(one, two) for one, two in zip(before[0], snapshot(optimizer)[0], strict=True))


def test_step_without_any_gradient_is_refused():
    optimizer = create_lorapro_optimizer(small_model(), lr=1e-2)
    other = small_model()
    backward(other)
    with pytest.raises(RuntimeError, match=r"none of the 2 LoRA pairs has a gradient\..*the model that is trained"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    backward(model)
    weight = ordinary(optimizer)[0]
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()


def trained_state(**options):
    settings = {key: options.pop(key) for key in ("r", "target_modules", "modules_to_save") if key in options}
    model = small_model(**settings)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, **options)
    backward(model)
    optimizer.step()
    return optimizer.state_dict()


def plain_adamw_state():
    model = small_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    return optimizer.state_dict()


def renamed_state():
    state = trained_state()
    state["param_groups"][0]["param_names"][1] = "other.layer.weight"
    return state


def damaged_state():
    state = trained_state()
    state["state"][0]["exp_avg"] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: trained_state(config={"mode": "efficient"}),
            "of LoRA-Pro mode 'efficient'.* has LoRA-Pro mode 'full'",
        ),
        (plain_adamw_state, "checkpoint is of another optimizer"),
        (lambda: trained_state(r=3), r"has shape \[2, 6\], but \[3, 6\] in the checkpoint"),
        (lambda: trained_state(target_modules=["0"]), "2 parameters|param groups|parameters in a group"),
        (renamed_state, "state of 'other.layer.weight' where this optimizer has 'base_model"),
        (lambda: (state := trained_state(), state["state"][0].pop("exp_avg"))[0], "lacks the moments of base_model"),
        (damaged_state, r"has moments of shape \(7, 6\), but \(3,\) in the checkpoint"),
    ],
)
def test_foreign_checkpoints_are_refused_and_change_nothing(make, message):
    optimizer = create_lorapro_optimizer(small_model(), lr=1e-2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make())
    assert_same(before, snapshot(optimizer))


def construct(**changes):
    model = LINEAR.build()
    pairs = changes.pop("pairs", None)
    pairs = find_lora_pairs(model) if pairs is None else pairs
    return LoRAProAdamW(changes.pop("params", model.parameters()), pairs, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": []}, r"no LoRA pairs to optimize; pass find_lora_pairs\(model\)"),
        ({"params": [nn.Parameter(torch.ones(2))]}, r"body: its factors are not in the optimizer's param_groups"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": None}, "lr=None must be a finite number"),
        ({"betas": 0.9}, "betas=0.9 must be two numbers"),
        ({"config": {"mode": "slow"}}, "mode='slow' is unknown"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": -1e-8}, "eps="),
        ({"weight_decay": -0.1}, "weight_decay="),
    ],
)
def test_bad_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        construct(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "mode='fast' is unknown; valid values are 'full', 'efficient'"),
        ({"x_mode": "one"}, "x_mode='one' is unknown; valid values are 'sylvester', 'zero', 'symmetric'"),
        ({"update": "one"}, "update='one' is unknown; valid values are 'linear'"),
        ({"rtol": 2.0}, r"rtol=2.0 must be a number in \[0, 1\)"),
        ({"rtol": "1e-6"}, r"rtol='1e-6' must be a number in \[0, 1\)"),
        ({"modus": "full"}, r"\['modus'\] are no LoRA-Pro settings; the settings are \['mode'"),
    ],
)
def test_bad_config(settings, message):
    with pytest.raises(ValueError, match=message):
        create_lorapro_optimizer(LINEAR.build(), lr=1e-2, config=settings)


def test_config_round_trip():
    config = LoRAProConfig(mode="efficient", x_mode="zero", rtol=1e-3)
    assert LoRAProConfig.from_dict(config.to_dict()) == config


def test_different_moments_settings_for_one_pair_are_refused_in_full_mode():
    model = LINEAR.build()
    (pair,) = find_lora_pairs(model)
    groups = [{"params": [pair.A], "betas": (0.8, 0.9)}, {"params": [pair.B]}]
    with pytest.raises(ValueError, match=r"body: lora_A and lora_B have different betas or eps.*mode 'efficient'"):
        LoRAProAdamW(groups, [pair])
    LoRAProAdamW(groups, [pair], config=LoRAProConfig(mode="efficient"))


def test_closure_is_refused():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"takes no closure.*loss\.backward\(\) before step\(\)"):
        optimizer.step(lambda: backward(model))
    assert_same(before, snapshot(optimizer))


@both_modes
def test_scaling_zero_at_step_time_is_refused_and_changes_nothing(mode):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    backward(model)
    optimizer.pairs[1].layer.set_scale("default", 0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="scaling of adapter 'default' is 0"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


def test_parameters_swapped_under_the_optimizer_are_refused():
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    layer = optimizer.pairs[0].layer
    layer.lora_A["default"].weight = nn.Parameter(layer.lora_A["default"].weight.detach().clone())
    backward(model)
    with pytest.raises(ValueError, match="its factors are not in the optimizer's param_groups"):
        optimizer.step()


def test_factory():
    model = LINEAR.build()
    optimizer = LoRAProOptimizerFactory()(model, lr=3e-3, config={"mode": "efficient"})
    assert isinstance(optimizer, LoRAProAdamW) and optimizer.config.mode == "efficient"
    with pytest.raises(ValueError, match="needs the learning rate"):
        LoRAProOptimizerFactory()(model)
