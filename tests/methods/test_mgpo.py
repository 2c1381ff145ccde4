"""MGPO: gradients at a point off along the momentum, as the dense formulas of both sources give them."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from grids import rest_slow
from killable import Nursery
from lora_layers import ALL_ROWS, DEFAULTS
from lorapro_hf import (
    LoRAProTrainer,
    LoRAProTrainingArguments,
    LoRASB,
    MGPOCallback,
    create_lorapro_optimizer,
    find_lora_pairs,
    fuse_lora_layers,
)
from lorapro_hf.factors.stacks import stacks_of
from lorapro_hf.functional.reference import (
    DenseFactoredAdamW,
    DenseFullAdamW,
    DenseRite,
    DenseSpectral,
    projected_gradient,
)
from lorapro_hf.functional.reference import _orthonormal as orthonormal
from lorapro_hf.optim.first_moments import read_moments
from mgpo_jobs import train
from optimizer_helpers import longest_step
from support_models import two_adapters
from trainer_helpers import arguments, assert_same, build, differ, factors, logged, tiny_lora
from weight_oracle import own_weight

ROWS = {row.name: row for row in ALL_ROWS if set(row.settings) <= set(LoraConfig.__dataclass_fields__)}
REFUSED = ("MultiheadAttention", "a block used twice")  # the second shares its weight with a layer without adapter
QUANTISED = ("4-bit base", "8-bit base")
QUICK = ("linear with rsLoRA", "Conv1D of GPT-2", "embedding", "Conv2d with groups", "experts (in, out)")
SLOW_ROWS = [name for name in ROWS if name not in (*REFUSED, *QUANTISED, *QUICK)]
LAYERS = [*QUICK, "linear with DoRA", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_ROWS if "DoRA" not in n)]
LAYERS += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW_ROWS if name.endswith("g with DoRA")]


def network(**settings: Any) -> Any:
    """Two adapted layers of different shapes, in float64, with r = 2 and s = 1.5."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=False, **settings)
    return get_peft_model(body, config).double()


def batches(steps: int) -> list[list[torch.Tensor]]:
    """Two micro-batches for each step."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(7, 6, dtype=torch.float64, generator=generator) for _ in range(2)] for _ in range(steps)]


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return (out.sin() * torch.linspace(-1, 2, out.numel()).view_as(out)).mean()


class ByHand:
    """Both sources, written densely: AdamW on the factors of `network()`, whose gradients are taken elsewhere."""

    def __init__(self, rho: float, beta: float, target: str, sign: int) -> None:
        model, self.s = network(), 1.5
        self.rho, self.beta, self.target, self.sign = rho, beta, target, sign
        layers = [model.base_model.model[0], model.base_model.model[2]]
        self.W = [layer.base_layer.weight.detach() for layer in layers]
        self.b = [layer.base_layer.bias.detach() for layer in layers]
        self.A = [layer.lora_A["default"].weight.detach().clone().requires_grad_() for layer in layers]
        self.B = [layer.lora_B["default"].weight.detach().clone().requires_grad_() for layer in layers]
        self.optimizer = torch.optim.AdamW([*self.A, *self.B], lr=0.05, weight_decay=0.01)
        self.averages: list[Any] = [None, None]

    def _average(self, index: int, norm: torch.Tensor) -> None:
        old = self.averages[index]
        self.averages[index] = norm if old is None else self.beta * old + (1 - self.beta) * norm

    def points(self) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """ε of each weight, and the changes of A and of B."""
        eps = [torch.zeros_like(W) for W in self.W]
        change = [torch.zeros_like(p) for p in self.A], [torch.zeros_like(p) for p in self.B]
        if not self.optimizer.state:
            return eps, *change
        moments = [[self.optimizer.state[p]["exp_avg"] for p in factors] for factors in (self.A, self.B)]
        if self.target == "weight":
            for i, (m_A, m_B) in enumerate(zip(*moments, strict=True)):
                v = self.s * (m_B @ self.A[i].detach() + self.B[i].detach() @ m_A)
                eps[i] = self.sign * self.rho * v / v.norm() * min(1 / self.averages[i], 10)
            return eps, *change
        length = torch.cat([m.flatten() for x in moments for m in x]).norm()
        moved = [[self.sign * self.rho * m / length / self.averages[0] for m in x] for x in moments]
        return eps, moved[0], moved[1]

    def step(self, micro: list[torch.Tensor]) -> None:
        eps, of_A, of_B = self.points()
        for x in micro:
            for i, activation in enumerate((torch.tanh, lambda out: out)):
                W = self.W[i] + eps[i] + self.s * (self.B[i] + of_B[i]) @ (self.A[i] + of_A[i])
                x = activation(x @ W.mT + self.b[i])
            (loss_of(x) / len(micro)).backward()
        if self.target == "weight":
            for i, (A, B) in enumerate(zip(self.A, self.B, strict=True)):
                self._average(i, (self.s * (B.grad @ A + B @ A.grad)).norm().detach())
        else:
            self._average(0, torch.cat([p.grad.flatten() for p in (*self.A, *self.B)]).norm())
        self.optimizer.step()
        self.optimizer.zero_grad()


def run(method: MGPOCallback, model: Any, steps: list[list[torch.Tensor]], optimizer: Any = None) -> Any:
    """A loop by hand."""
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.01)
    method.before_training(model, None)
    for number, micro in enumerate(steps, start=1):
        for x in micro:
            with method.forward_context():
                (loss_of(model(x)) / len(micro)).backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer, number)
        optimizer.zero_grad()
    return optimizer


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("target", "sign"), [("weight", None), ("factors", None), ("weight", 1), ("factors", -1)])
def test_steps_of_both_sources(target, sign):
    expected = ByHand(0.2, 0.7, target, sign or {"weight": -1, "factors": 1}[target])
    model, steps = network(), batches(5)
    for micro in steps:
        expected.step(micro)
    method = MGPOCallback(0.2, 0.7, target, sign)
    run(method, model, steps)
    for pair, A, B in zip(find_lora_pairs(model), expected.A, expected.B, strict=True):
        torch.testing.assert_close(pair.A, A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pair.B, B, rtol=1e-10, atol=1e-12)
    plain = ByHand(0.0, 0.7, target, 1)
    for micro in steps:
        plain.step(micro)
    assert (plain.A[0] - expected.A[0]).norm() > 1e-3 * expected.A[0].norm()
    averages = [float(x) for x in expected.averages if x is not None]
    assert [float(x) for x in torch.cat(method.state_dict()["gradient_norms"])] == pytest.approx(averages, rel=1e-12)


# ---- layers ----


def stepped(row: Any, model: Any, method: MGPOCallback) -> tuple[Any, dict[str, torch.Tensor]]:
    """The optimizer after one step, and ε of each pair by the dense formula, shaped as `B @ A`."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    method.before_training(model, None)
    row.loss(model).backward()
    method.before_step(optimizer)
    norms = {p.name: product(p, p.A, p.B.grad, p.A.grad, p.B).norm() for p in find_lora_pairs(model)}
    optimizer.step()
    method.after_step(optimizer, 1)
    optimizer.zero_grad()
    eps = {}
    for pair in find_lora_pairs(model):
        m_A, m_B = (optimizer.state[p]["exp_avg"] for p in (pair.A, pair.B))
        v = product(pair, pair.A, m_B, m_A, pair.B)
        eps[pair.name] = method.sign * method.rho * v / v.norm() * min(1 / norms[pair.name], 10)
    return optimizer, eps


def product(pair: Any, A: Any, of_B: Any, of_A: Any, B: Any) -> torch.Tensor:
    """`s (m_B A + B m_A)`."""
    A, of_A, B, of_B = pair.matrix_A(A), pair.matrix_A(of_A), pair.matrix_B(B), pair.matrix_B(of_B)
    return (pair.scaling * (of_B @ A + B @ of_A)).detach()


def write(pair: Any, change: torch.Tensor) -> None:
    """Add a change shaped as `B @ A` to the frozen weight, laid out as PEFT's own change of it is."""
    weight, B = own_weight(pair), pair.matrix_B(pair.B.detach())
    own = pair.layer.get_delta_weight(pair.adapter_name).detach() / pair.scaling
    flat = (B @ pair.matrix_A(pair.A.detach())).flatten()
    order = (own.flatten()[:, None] - flat).abs().argmin(1)  # where each element of the product lies
    assert torch.allclose(own.flatten(), flat[order])
    weight.data += change.flatten()[order].view_as(weight)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_with_the_changed_weight(name):
    row = ROWS[name]
    torch.manual_seed(0)
    model, method = row.build(), MGPOCallback(0.5)
    _, eps = stepped(row, model, method)
    dense = copy.deepcopy(model)
    if name == "Conv2d with groups":  # the weight has no place for the change of LoRA, which sees all inputs
        dense.base_model.model.body.base_layer = ungrouped(dense.base_model.model.body.base_layer)
    for pair in find_lora_pairs(dense):
        if name == "Conv2d with groups":
            own_weight(pair).data += eps[pair.name].reshape(own_weight(pair).shape)
        else:
            write(pair, eps[pair.name])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with method.forward_context():
        out = row.output(model)
        row.loss(model).backward()
        torch.testing.assert_close(out, row.output(dense), rtol=1e-9, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(row.output(model), row.output(copy.deepcopy(model)), rtol=0, atol=0)
    row.loss(dense).backward()
    for p, q in zip(trained(model), trained(dense), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)
    assert_same({n: p.detach() for n, p in model.named_parameters()}, before)
    assert (out - row.output(model)).norm() > 1e-4 * out.norm()  # after the window, the weight as it was


def ungrouped(layer: nn.Conv2d) -> nn.Conv2d:
    whole = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size).double()
    whole.weight.data.zero_()
    rows, columns = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    for group in range(layer.groups):
        own = slice(group * rows, (group + 1) * rows)
        whole.weight.data[own, group * columns : (group + 1) * columns] = layer.weight.data[own]
    whole.bias = layer.bias
    return whole.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_bases(name):
    row, method = ROWS[name], MGPOCallback(0.5)
    model = row.build()
    _, eps = stepped(row, model, method)
    body = model.base_model.model.body
    x = torch.randn(9, 64, requires_grad=True)
    with method.forward_context():
        out = body(x)
        out.sum().backward()
    changed = x.grad.clone()
    plain = body(x)
    torch.testing.assert_close(out, plain + x @ eps["base_model.model.body"].mT, rtol=1e-4, atol=1e-5)
    x.grad = None
    plain.sum().backward()
    torch.testing.assert_close(changed, x.grad + eps["base_model.model.body"].sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear with DoRA", "experts (in, out)", "Conv2d with groups", "embedding"])
def test_layers_compute_with_changed_factors(name):
    row = ROWS[name]
    torch.manual_seed(0)
    model, method = row.build(), MGPOCallback(0.5, target="factors")
    optimizer, _ = stepped(row, model, method)
    elsewhere = copy.deepcopy(model)
    pairs = find_lora_pairs(model)
    moments = [optimizer.state[p]["exp_avg"] for pair in pairs for p in (pair.A, pair.B)]
    length = torch.cat([m.flatten() for m in moments]).norm()
    known = float(method.state_dict()["gradient_norms"][0])
    own = [p for pair in find_lora_pairs(elsewhere) for p in (pair.A, pair.B)]
    for p, m in zip(own, moments, strict=True):
        p.data += 0.5 * m / length / known
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with method.forward_context():
        row.loss(model).backward()
    row.loss(elsewhere).backward()
    for p, q in zip(trained(model), trained(elsewhere), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)
    assert_same(dict(model.named_parameters()), before)


@pytest.mark.parametrize("target", ["weight", "factors"])
def test_an_exception_in_the_forward_pass_leaves_the_parameters_in_their_places(target):
    model, method = ROWS["experts (in, out)"].build(), MGPOCallback(target=target)
    stepped(ROWS["experts (in, out)"], model, method)
    before = dict(model.named_parameters())
    with pytest.raises(RuntimeError), method.forward_context():
        model(torch.randn(2, 3).double())
    assert all(p is before[n] for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_several_adapters_each_add_a_change():
    row, method = ROWS["linear"], MGPOCallback(0.5)
    torch.manual_seed(0)
    model = two_adapters(row.model(), LoraConfig(**DEFAULTS)).double()
    for pair in find_lora_pairs(model):
        pair.A.requires_grad_(), pair.B.requires_grad_()
    pairs = find_lora_pairs(model)
    assert len(pairs) == 2
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    method.before_training(model, None)
    row.loss(model).backward()
    method.before_step(optimizer)
    norms = [product(p, p.A, p.B.grad, p.A.grad, p.B).norm() for p in pairs]
    optimizer.step()
    method.after_step(optimizer, 1)
    changes = [product(p, p.A, *(optimizer.state[x]["exp_avg"] for x in (p.B, p.A)), p.B) for p in pairs]
    changes = [-0.5 * v / v.norm() * min(1 / norm, 10) for v, norm in zip(changes, norms, strict=True)]
    dense = copy.deepcopy(model)
    dense.base_model.model.body.base_layer.weight.data += sum(changes)
    with method.forward_context():
        torch.testing.assert_close(row.output(model), row.output(dense), rtol=1e-9, atol=1e-11)


def test_the_next_operation_may_write_to_the_output():
    """Also where the change is added to the output, in place, or not: to that of a fused layer."""
    x, outputs = torch.ones(0, 6, dtype=torch.float64), []
    for settings, is_fused in [({}, False), ({}, True), ({"lora_dropout": 0.5}, False), ({"lora_dropout": 0.5}, True)]:
        model, method = network(**settings).eval(), MGPOCallback(0.5)
        model.base_model.model[1] = nn.ReLU(inplace=True)
        if is_fused:
            fuse_lora_layers(model)
        run(method, model, batches(2))
        with method.forward_context():
            assert model(x).shape == (0, 4)  # a shape that is fused
            outputs.append(model(batches(1)[0][0]))
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=1e-9, atol=1e-11)


def test_dropout_before_the_factors_hides_no_input_from_the_changed_weight():
    model, method = network(lora_dropout=0.5), MGPOCallback(0.5)
    optimizer = run(method, model, batches(1))
    dense = copy.deepcopy(model)
    for pair, of_dense, average in zip(
        find_lora_pairs(model), find_lora_pairs(dense), torch.cat(method.state_dict()["gradient_norms"]), strict=True
    ):
        v = product(pair, pair.A, *(optimizer.state[p]["exp_avg"] for p in (pair.B, pair.A)), pair.B)
        own_weight(of_dense).data -= 0.5 * v / v.norm() * min(1 / float(average), 10)
    x = batches(1)[0][0]
    with method.forward_context():
        torch.manual_seed(3)
        out = model(x)
        loss_of(out).backward()
    torch.manual_seed(3)
    torch.testing.assert_close(out, dense(x), rtol=1e-9, atol=1e-11)
    torch.manual_seed(3)
    loss_of(dense(x)).backward()
    for p, q in zip(trained(model), trained(dense), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **kwargs or {})


def test_a_changed_step_takes_no_more_products_than_a_plain_one():
    model, method, counts = network(), MGPOCallback(0.5), []
    run(method, model, batches(1))
    for context in (method.forward_context(), contextlib.nullcontext()):
        with context, Products() as products:
            loss_of(model(batches(1)[0][0])).backward()
        counts.append(products.count)
    assert counts[0] == counts[1] > 6


# ---- moments of LoRA-Pro ----

ORACLES = {"full": DenseFullAdamW, "factored": DenseFactoredAdamW, "spectral": DenseSpectral, "rite": DenseRite}


def normalised(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    v = left.mT @ right
    return v / v.flatten(-2).norm(dim=-1)[..., None, None]


@pytest.mark.parametrize("mode", ["efficient", "full", "full_8bit", "factored", "spectral", "rite"])
def test_the_moment_of_each_mode_as_a_movement_of_the_weight(mode):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(70, 50)), LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    ).double()
    (pair,) = find_lora_pairs(model)
    s = pair.scaling
    optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.0, mode=mode, trust_region=0.1)
    oracle, limit = None, longest_step(pair, 0.1)
    if mode in ORACLES:
        oracle = ORACLES[mode](pair.A, pair.B, s, lr=1e-2, longest=limit)
    elif mode == "full_8bit":
        oracle = DenseFullAdamW(pair.A, pair.B, s, lr=1e-2, longest=limit)
    for seed in range(3):
        g = 0.01 * torch.randn(50, 70, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pair.A.grad, pair.B.grad = s * pair.B.detach().T @ g, s * g @ pair.A.detach().T
        if oracle is not None:
            oracle.step(g)
        optimizer.step()
    A, B = pair.A.detach(), pair.B.detach()
    if mode == "efficient":
        m_A, m_B = (optimizer.state[p]["exp_avg"] for p in (pair.A, pair.B))
        v = s * (m_B @ A + B @ m_A)
    elif mode == "rite":
        (of_A, _), (of_B, _) = orthonormal(oracle.A.T), orthonormal(oracle.B)
        v = of_B @ oracle.M[0].T + oracle.M[1] @ of_A.T
    else:
        v = projected_gradient(oracle.M, oracle.A, oracle.B)
    (stack,) = stacks = stacks_of([pair])
    ((left, right),) = read_moments(optimizer, stacks, True)
    tolerance = 5e-2 if mode == "full_8bit" else 1e-8
    assert (normalised(left, right)[0] - v / v.norm()).norm() < tolerance
    assert left.shape == (1, 6, 50) and right.shape == (1, 6, 70)
    ((of_B, of_A),) = read_moments(optimizer, stacks, False)
    if mode == "efficient":
        assert torch.equal(of_A[0], m_A) and torch.equal(of_B[0], m_B.T)
    else:
        M = (left.mT @ right)[0]
        torch.testing.assert_close(of_A[0], s * B.T @ M)
        torch.testing.assert_close(of_B[0], (s * M @ A.T).T)


# ---- in a trainer ----

MODES = rest_slow(
    [("efficient", "weight"), (None, "weight"), ("full_8bit", "factors")]
    + [(mode, "weight") for mode in ("full", "factored", "spectral", "rite")]
)


def trainer_of(folder: Path, method: Any, *more: Any, **settings: Any) -> Any:
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    steps |= {"lora_pro_mode": "efficient", "per_device_train_batch_size": 2}
    args = arguments(folder, LoRAProTrainingArguments, **{**steps, **settings})
    callbacks = [*([] if method is None else [method]), *more]
    return build(LoRAProTrainer, args, model=tiny_lora(lora_dropout=0.1), callbacks=callbacks)


@pytest.mark.parametrize(("mode", "target"), MODES)
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, mode, target):
    settings = {"lora_pro": False} if mode is None else {"lora_pro_mode": mode}
    whole, again = (MGPOCallback(0.5, target=target) for _ in range(2))
    first = trainer_of(tmp_path, whole, **settings)
    first.train()
    resumed = trainer_of(tmp_path, again, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(factors(resumed), factors(first))
    states = whole.state_dict(), again.state_dict()
    assert all(map(torch.equal, *(state["gradient_norms"] for state in states)))
    assert all((norms > 0).all() for norms in states[0]["gradient_norms"])
    plain = trainer_of(tmp_path / "plain", None, **settings)
    plain.train()
    assert differ(factors(plain), factors(first))


@pytest.mark.parametrize(
    ("reentrant", "target"),
    rest_slow([(True, "weight"), (False, "weight"), (True, "factors"), (False, "factors")]),
)
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant, target):
    runs = []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": True} if checkpointing else {}
        if checkpointing:
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        trainer = trainer_of(tmp_path, MGPOCallback(0.5, target=target), max_steps=3, save_strategy="no", **settings)
        trainer.train()
        runs.append(factors(trainer))
    assert_same(*runs, rtol=1e-4, atol=1e-6)


def test_a_plain_trainer_takes_the_same_steps_and_evaluates_without_a_change(tmp_path):
    runs, losses = [], []
    for cls in (LoRAProTrainer, Trainer):
        kind = LoRAProTrainingArguments if cls is LoRAProTrainer else None
        settings = {"lora_pro": False} if kind else {}
        settings |= {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
        args = arguments(tmp_path, **({"cls": kind} if kind else {}), **settings)
        trainer = build(cls, args, callbacks=[MGPOCallback(0.5)])
        trainer.train()
        runs.append(factors(trainer))
        losses.append(logged(trainer, "eval_loss"))
        assert trainer.evaluate()["eval_loss"] == losses[-1][-1]
    assert_same(*runs)
    assert losses[0] == losses[1]


def test_sampling_and_reference_passes_see_the_weight_as_it_is():
    model, method = tiny_lora(), MGPOCallback(0.5)
    tokens = torch.arange(3, 11)[None]
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    method.before_training(model, None)
    model(input_ids=tokens, labels=tokens).loss.backward()
    method.before_step(optimizer)
    optimizer.step()
    method.after_step(optimizer, 1)
    plain = model(input_ids=tokens).logits
    with model.disable_adapter():
        base = model(input_ids=tokens).logits
    sampled = model.generate(
        input_ids=tokens, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with method.forward_context():
        assert not torch.equal(model(input_ids=tokens).logits, plain)
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, plain)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens).logits, base)
        again = model.generate(
            input_ids=tokens, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert torch.equal(torch.stack(again.logits), torch.stack(sampled.logits))
        assert not torch.equal(model(input_ids=tokens).logits, plain)


def test_steps_that_are_left_out_leave_the_averages_alone(tmp_path):
    seen: list[Any] = []

    class Spoiling(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            seen.append([x.clone() for x in method._averages])
            if state.global_step == 1:
                trained(model)[0].grad[0, 0] = float("nan")

    method = MGPOCallback()
    trainer_of(tmp_path, method, Spoiling(), max_steps=3, save_strategy="no").train()
    assert all(map(torch.equal, seen[1], seen[2]))
    assert not all(map(torch.equal, seen[0], seen[1])) and not all(map(torch.equal, seen[2], method._averages))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["efficient", "full", None])
def test_two_ranks_take_the_steps_of_one(nursery: Nursery, tmp_path: Path, mode: str | None):
    job = {"jobs": "mgpo_jobs", "mode": mode}
    one = train({**job, "folder": str(tmp_path / "one"), "ranks": 1}, 0)
    two = nursery.finish(tmp_path / "two", ranks=2, **job)
    assert_same(two[0], two[1])
    assert_same(two[0], one, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("lora_pro", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_flag_makes_the_method_and_the_card_names_it(tmp_path, lora_pro):
    settings = {"max_steps": 2, "save_strategy": "no", "lora_pro": lora_pro}
    by_flag = trainer_of(tmp_path, None, mgpo_rho="5e-1", mgpo_beta=0.8, **settings)
    by_flag.train()
    by_callback = trainer_of(tmp_path, MGPOCallback(0.5, 0.8), **settings)
    by_callback.train()
    assert_same(factors(by_flag), factors(by_callback))
    if lora_pro:
        by_flag.create_model_card()
        assert "rho 0.5, beta 0.8, target weight, sign -1" in (tmp_path / "README.md").read_text()


# ---- refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mgpo_rho": 0}, r"mgpo_rho=0\.0 must be a positive number"),
        ({"mgpo_rho": 0.1, "mgpo_beta": 2}, r"mgpo_beta=2\.0 must be at least 0"),
        ({"mgpo_beta": 0.9}, "mgpo_beta would be ignored: set mgpo_rho, too"),
        ({"mgpo_rho": "far"}, "mgpo_rho='far' must be a number"),
    ],
)
def test_flags_without_a_meaning(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, LoRAProTrainingArguments, **settings)


def test_a_plain_trainer_does_not_read_the_flag(tmp_path):
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False, mgpo_rho=0.1)
    with pytest.raises(ValueError, match=r"Trainer does not read mgpo_rho=0.1. .* callbacks=\[MGPOCallback\(0.1\)\]"):
        build(Trainer, args).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0}, "rho=0 must be a positive number; leave MGPO out"),
        ({"rho": float("nan")}, "rho=nan must be a positive number"),
        ({"beta": 1.0}, r"beta=1.0 must be at least 0 and below 1"),
        ({"beta": -0.1}, r"beta=-0.1 must be at least 0"),
        ({"sign": 0}, "sign=0 must be 1, along the momentum, or -1"),
        ({"target": "bias"}, "target='bias' is unknown; valid values are 'weight', 'factors'"),
    ],
)
def test_settings_without_a_meaning(settings, message):
    with pytest.raises(ValueError, match=message):
        MGPOCallback(**settings)


def test_optimizers_without_a_first_moment():
    from bitsandbytes.optim import AdamW8bit
    from transformers import Adafactor

    class Hiding(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["state1"] = torch.zeros_like(p)

    model = network()
    for optimizer in (torch.optim.SGD(trained(model), lr=0.1), Adafactor(trained(model))):
        with pytest.raises(ValueError, match=f"{type(optimizer).__name__} keeps no first moment to follow. Use AdamW"):
            run(MGPOCallback(), model, batches(1), optimizer)
    with pytest.raises(ValueError, match=r"AdamW8bit keeps its moments in formats that cannot be read\. Use AdamW"):
        MGPOCallback().watch(AdamW8bit(trained(model)))  # before the first step
    with pytest.raises(ValueError, match=r"Hiding keeps 'state1' of each parameter, but no first moment .* Use AdamW"):
        run(MGPOCallback(), model, batches(2), Hiding(trained(model)))
    run(MGPOCallback(), model, batches(2), torch.optim.SGD(trained(model), lr=0.1, momentum=0.9))


def test_adapters_and_layers_that_cannot_be_changed():
    model = network()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the base weight.*Call model.unmerge_adapter\(\) first"):
        MGPOCallback().before_training(model, None)
    with pytest.raises(
        ValueError, match=r"MGPO cannot change its forward pass, because PEFT merges .* Leave it out of"
    ):
        MGPOCallback().before_training(ROWS["MultiheadAttention"].build(), None)
    compiled = network()
    compiled.compile(backend="eager")
    for each in (compiled, torch.compile(network(), backend="eager")):
        with pytest.raises(
            ValueError, match=r"a compiled model: compiled code would keep the change of its first step"
        ):
            MGPOCallback().before_training(each, None)


def test_other_methods_and_states_of_other_trainings(tmp_path):
    with pytest.raises(ValueError, match="'mgpo' cannot be combined with lora_sb: LoRA-SB trains one matrix"):
        trainer_of(tmp_path, MGPOCallback(), LoRASB(), lora_pro=False).train()
    trainer = trainer_of(tmp_path, MGPOCallback())
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="no copies of layers"):
        trainer.lora_methods[0].on_train_begin(trainer.args, trainer.state, trainer.control)
    method, other = MGPOCallback(), MGPOCallback(target="factors")
    method.before_training(network(), None)
    other.before_training(network(), None)
    with pytest.raises(
        ValueError, match=r"trained with MGPO's target='weight', not 'factors'. Go on with MGPOCallback"
    ):
        other.load_state_dict(method.state_dict())
    with pytest.raises(ValueError, match="holds MGPO's averages of other LoRA layers"):
        method.load_state_dict({**method.state_dict(), "pairs": ["x"]})
