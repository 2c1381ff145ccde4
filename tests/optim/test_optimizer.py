"""LoRAProAdamW's steps against a dense float64 run and against torch.optim.AdamW."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grids import rest_slow
from lora_layers import Net, Row
from lorapro_hf import (
    LoRAProAdamW,
    LoRAProConfig,
    create_lorapro_optimizer,
    equivalent_gradient,
    find_lora_pairs,
    project_lora_gradients,
)
from lorapro_hf.config import X_MODES
from lorapro_hf.functional import reference
from lorapro_hf.functional.bases import row_basis
from lorapro_hf.functional.factor_steps import REACH, lengthened
from lorapro_hf.functional.reference import DenseFullAdamW
from lorapro_hf.kernels import native
from lorapro_hf.optim.rules import efficient
from optimizer_helpers import (
    LINEAR,
    assert_same,
    backward,
    both_modes,
    longest_step,
    ordinary,
    small_model,
    snapshot,
    trained,
)


@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize("zero_B", rest_slow([True, False]))
def test_full_mode_equals_the_dense_run(x_mode, zero_B):
    """Six steps from B = 0 or from random factors, for a loss whose full gradient depends on the weight."""
    model = Row("", lambda: Net(nn.Linear(12, 9, bias=False)), {"r": 3}).build(init_lora_weights=zero_B)
    hyper = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    settings = {"x_mode": x_mode, "trust_region": 0.005}
    optimizer = create_lorapro_optimizer(model, config={"mode": "full", "update": "linear", **settings}, **hyper)
    (pair,) = optimizer.pairs
    dense = DenseFullAdamW(pair.A, pair.B, pair.scaling, x_mode=x_mode, longest=longest_step(pair, 0.005), **hyper)
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
    stock = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), fused=True)
    for step in range(4):
        backward(model, step)
        for p, twin in zip(others, mirror, strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        stock.step()
        assert all(torch.equal(p, twin) for p, twin in zip(others, mirror, strict=True))


@pytest.mark.usefixtures("torch_steps")
def test_efficient_mode_without_longer_steps_is_torch_adamw(monkeypatch):
    monkeypatch.setattr(efficient, "lengthened", lambda change, *_: change)
    model = small_model()
    mirror = copy.deepcopy(model)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.1, config={"mode": "efficient"})
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    by_name = dict(mirror.named_parameters())
    groups = [
        {"params": [by_name[n] for n in group], "weight_decay": own["weight_decay"]}
        for group, own in zip(names, optimizer.param_groups, strict=True)
    ]
    stock = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for step in range(4):
        backward(model, step)
        backward(mirror, step)
        optimizer.step()
        stock.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, by_name[name], rtol=1e-14, atol=0)


def test_efficient_projected_is_torch_adamw_on_projected_gradients():
    model = small_model()
    mirror = copy.deepcopy(model)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, mode="efficient", efficient_projected=True)
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


def test_a_change_of_A_is_longer_while_B_is_small():
    change = torch.full((1, 2, 9), 0.01, dtype=torch.float64)
    change[:, 1] *= -1
    B = torch.tensor([[3.0, 0.0], [0.0, 1e-3], [0.0, 0.0]], dtype=torch.float64)
    found = lengthened(change, row_basis(B.mT[None]), 0.01)
    torch.testing.assert_close(found[0], reference.lengthened(change[0], B, 0.01))
    # B's large direction is served as it is, the small one as at B = 0: to a row of length REACH at most
    torch.testing.assert_close(found[0, 0], change[0, 0], rtol=0.02, atol=0)
    torch.testing.assert_close(found[0, 1].norm().item(), REACH, rtol=0.01, atol=0)
    assert lengthened(change, row_basis(0 * B.mT[None]), 0.0).isfinite().all()


def test_full_mode_decays_the_product_of_the_factors():
    model = LINEAR.build()
    optimizer = create_lorapro_optimizer(model, lr=0.1, weight_decay=0.5, mode="full")
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
    limits = {"rite_skip": 0.0} if mode == "rite" else {}  # the gradient is a long one
    optimizer = LoRAProAdamW(groups, [pair], config=LoRAProConfig(mode=mode, **limits))
    before = pair.A.detach().clone(), pair.B.detach().clone()
    LINEAR.loss(model).backward()
    optimizer.step()
    assert torch.equal(pair.A, before[0]) and not torch.equal(pair.B, before[1])


@both_modes
@pytest.mark.parametrize(
    ("where", "poison"),
    [
        ("pair", float("nan")),
        ("other", float("inf")),
        pytest.param("pair", float("-inf"), marks=pytest.mark.slow),
        pytest.param("other", float("nan"), marks=pytest.mark.slow),
    ],
)
def test_non_finite_gradients_leave_everything_as_it_was(mode, poison, where):
    model, optimizer = trained(weight_decay=0.1, mode=mode)
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
    model, optimizer = trained(0, mode="full")
    backward(model)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(1e18)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(p.isfinite().all() for p in model.parameters())


@both_modes
def test_pairs_without_gradient_wait(mode):
    model, optimizer = trained(0, mode=mode)
    backward(model)
    first, second = optimizer.pairs
    first.A.grad = first.B.grad = None
    before = first.A.detach().clone(), second.B.detach().clone()
    optimizer.step()
    assert torch.equal(first.A, before[0]) and not optimizer.state[first.A]
    assert not torch.equal(second.B, before[1])


class Experts(nn.Module):
    """Three experts as one parameter; those without tokens have a gradient of 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, inputs, experts):
        return sum(inputs @ self.weight[each].mT for each in experts)


def test_an_expert_without_tokens_waits_in_mode_spectral():
    """Its momentum fades, but the polar factor of the momentum does not."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(Experts()), LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"]))
    optimizer = create_lorapro_optimizer(model, lr=1e-2, mode="spectral", weight_decay=0.1)
    (pair,) = optimizer.pairs
    for experts in ([0, 1, 2], [0, 2]):
        before = pair.matrix_A(pair.A).detach().clone(), pair.matrix_B(pair.B).detach().clone()
        model.base_model.model[0](torch.randn(8, 6), experts).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = pair.matrix_A(pair.A), pair.matrix_B(pair.B)
    for old, new in zip(before, after, strict=True):
        assert [torch.equal(*both) for both in zip(old, new, strict=True)] == [False, True, False]


@pytest.mark.parametrize("kernels", ["as found", "torch"])
def test_a_pair_with_a_gradient_of_0_waits_in_mode_spectral(kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr(native, "native_kernels", lambda: None)
    model, optimizer = trained(3, mode="spectral")
    backward(model)
    first, second = optimizer.pairs
    first.A.grad.zero_(), first.B.grad.zero_()
    moments = [optimizer.state[factor]["exp_avg"] for factor in (first.A, first.B)]
    before = [tensor.detach().clone() for tensor in (first.A, first.B, *moments, second.A)]
    optimizer.step()
    after = (first.A, first.B, *moments, second.A)
    assert [torch.equal(*both) for both in zip(before, after, strict=True)] == [True] * 4 + [False]


def test_groups_decay_as_in_trainer():
    model = small_model(bias="lora_only")
    factors, decaying, others = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.3).param_groups
    assert factors["weight_decay"] == decaying["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert all("lora_" in name for name in factors["param_names"])
    assert all("bias" in name or name.startswith("base_model.model.1.") for name in others["param_names"])
    assert [len(group["params"]) for group in (factors, decaying, others)] == [4, 1, 5]


@both_modes
def test_norm_is_that_of_the_equivalent_gradients(mode):
    model, optimizer = trained(mode=mode)
    backward(model, 1)
    squares = 0.0
    for pair in optimizer.pairs:
        h = project_lora_gradients(pair.A, pair.B, pair.A.grad, pair.B.grad, pair.scaling)
        squares += float(equivalent_gradient(pair.A, pair.B, *h, pair.scaling).norm()) ** 2
    optimizer.step()
    assert float(optimizer.last_grad_norm) == pytest.approx(squares**0.5, rel=1e-5)


def test_schedulers_drive_it():
    model, optimizer = trained(0, lr=1.0)
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
    optimizer = LoRAProAdamW(groups, [pair], lr=0.1, mode="factored")
    before = pair.A.detach().clone(), pair.B.detach().clone()
    pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    optimizer.step()
    torch.testing.assert_close(pair.A.detach(), (1 - 0.1 * 0.5) ** 0.5 * before[0])
    assert torch.equal(pair.B, before[1])


def test_decay_of_more_than_everything_stops_at_zero():
    model = LINEAR.build()
    optimizer = create_lorapro_optimizer(model, lr=1.0, weight_decay=2.0, mode="factored")
    (pair,) = optimizer.pairs
    pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    optimizer.step()
    assert not pair.A.any() and not pair.B.any()


def test_efficient_mode_rounds_a_bf16_factor_once():
    narrow, wide = (small_model(torch.bfloat16, init_lora_weights=False) for _ in range(2))
    wide.float()
    for model in (narrow, wide):
        optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.3, config={"mode": "efficient"})
        generator = torch.Generator().manual_seed(2)
        for pair in optimizer.pairs:
            for factor in (pair.A, pair.B):
                factor.grad = torch.randn(factor.shape, generator=generator).bfloat16().to(factor.dtype)
        optimizer.step()
    for one, two in zip(find_lora_pairs(narrow), find_lora_pairs(wide), strict=True):
        assert torch.equal(one.A, two.A.bfloat16()) and torch.equal(one.B, two.B.bfloat16())


def test_gradients_that_overflow_in_the_projection_count_as_not_finite():
    model, optimizer = trained(0, mode="efficient", efficient_projected=True)
    backward(model)
    with torch.no_grad():
        for pair in optimizer.pairs:
            pair.B.copy_(torch.randn_like(pair.B) * 1e-25)
            pair.A.grad.fill_(1e20)
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(one, two) for one, two in zip(before[0], snapshot(optimizer)[0], strict=True))


def test_factored_mode_skips_gradients_whose_squares_overflow():
    model, optimizer = trained(0, mode="factored")
    backward(model)
    for pair in optimizer.pairs:
        pair.B.grad.mul_(1e20)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_settings_of_a_group_are_checked_too():
    model = small_model()
    pairs = find_lora_pairs(model)
    with pytest.raises(ValueError, match="lr=-1 must be"):
        LoRAProAdamW([{"params": [p for p in model.parameters() if p.requires_grad], "lr": -1}], pairs)


@pytest.mark.parametrize("mode", ["factored", "efficient"])
@pytest.mark.parametrize("r", rest_slow([3, 2]))
def test_a_factor_becomes_infinite_only_at_a_rate_that_makes_the_change_overflow(mode, r):
    for lr in (1e30, 1e38):
        model = small_model(r=r)
        optimizer = create_lorapro_optimizer(model, lr=lr, mode=mode)
        with pytest.raises(ValueError, match="NaN or Inf in lora_") if lr == 1e38 else contextlib.nullcontext():
            for step in range(4):
                backward(model, step)
                optimizer.step()
        assert all(factor.isfinite().all() for pair in optimizer.pairs for factor in (pair.A, pair.B)) == (lr < 1e38)


# ---- closures, names and what is printed ----


@both_modes
def test_a_closure_is_called_once_before_gradients_are_read(mode):
    closed, plain = small_model(), small_model()
    one, two = (create_lorapro_optimizer(model, lr=1e-2, mode=mode) for model in (closed, plain))
    for step in range(3):
        calls = []

        def closure(step=step, calls=calls):  # as PyTorch Lightning's: clears, computes, runs backward
            calls.append(torch.is_grad_enabled())
            return backward(closed, step)

        assert one.step(closure=closure) == backward(plain, step)
        assert two.step() is None and calls == [True]
    assert_same(snapshot(one), snapshot(two))


def test_a_closure_that_does_nothing():
    """What PyTorch Lightning hands in under manual optimization."""
    closed, plain = small_model(), small_model()
    one, two = (create_lorapro_optimizer(model, lr=1e-2) for model in (closed, plain))
    for model, optimizer, given in ((closed, one, {"closure": lambda: None}), (plain, two, {})):
        backward(model)
        assert optimizer.step(**given) is None
    assert_same(snapshot(one), snapshot(two))


def test_a_closure_that_fails_changes_nothing():
    model, optimizer = trained(0)
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_same(before, snapshot(optimizer))


def test_groups_added_without_names_get_some():
    def build():
        model = small_model()
        optimizer = create_lorapro_optimizer(model, lr=1e-2)
        added = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        optimizer.add_param_group({"params": added[0], "lr": 0.1})
        optimizer.add_param_group({"params": iter(added[1:])})
        optimizer.add_param_group({"params": []})
        return model, optimizer, added

    model, optimizer, (first, second) = build()
    names = [group["param_names"] for group in optimizer.param_groups[3:]]
    assert names == [["param_group_3.0"], ["param_group_4.0"], []]
    backward(model)
    first.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(first, torch.full((3,), 0.9)) and torch.equal(second, torch.ones(2))
    again, resumed, added = build()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(model.state_dict())
    added[0].data.copy_(first.data)
    for each, held, parameter in ((model, optimizer, first), (again, resumed, added[0])):
        backward(each, 1)
        parameter.grad = torch.full((3,), 2.0)
        held.step()
    assert_same(snapshot(optimizer), snapshot(resumed))


def test_factors_and_earlier_groups_without_names_get_some():
    model = small_model()
    pairs = find_lora_pairs(model)
    groups = [{"params": [pairs[0].A, pairs[0].B]}, {"params": [("x", nn.Parameter(torch.ones(1)))]}]
    optimizer = LoRAProAdamW([*groups, {"params": [pairs[1].A, ("B", pairs[1].B)]}], pairs)
    names = dict(map(reversed, model.named_parameters()))
    given = [[names[pairs[0].A], names[pairs[0].B]], ["x"], [names[pairs[1].A], "B"]]
    assert [group["param_names"] for group in optimizer.param_groups] == given
    taken_over = LoRAProAdamW([{**group} for group in optimizer.param_groups], pairs)
    assert [group["param_names"] for group in taken_over.param_groups] == given
    unnamed = LoRAProAdamW([p for p in model.parameters() if p.requires_grad], pairs)
    unnamed.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert not any("param_names" in group for group in unnamed.param_groups)


def test_print_is_a_handful_of_lines():
    settings = {"mode": "factored", "update": "sequential", "trust_region": 0.03}
    optimizer = create_lorapro_optimizer(small_model(), 1e-2, weight_decay=0.1, config=settings)
    assert repr(optimizer).splitlines() == [
        "LoRAProAdamW (",
        "    2 pairs, mode=factored, update=sequential, trust_region=0.03",
        "    group 0: lr=0.01, weight_decay=0.1, parameters=4",
        "    group 1: lr=0.01, weight_decay=0.1, parameters=1",
        "    group 2: lr=0.01, weight_decay=0, parameters=3",
        ")",
    ]
    plain = create_lorapro_optimizer(small_model(), torch.tensor(1e-2), config={"mode": "efficient"})
    assert "mode=efficient, update=linear, trust_region=0\n    group 0: lr=0.01," in repr(plain)
