"""BeamLoRA takes the steps of its paper, written out here with weights between the factors, and stays plain LoRA."""

from __future__ import annotations

import copy
import logging
import math
import re
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_layers import ALL_ROWS, needs_weight_tying, tied_llama
from lorapro_hf import BeamLoRACallback, create_lorapro_optimizer, find_lora_pairs, fold_beamlora
from lorapro_hf.functional.rank_gates import gate_weights, replacements
from lorapro_hf.methods.slots import with_copies

EVERY, STEPS, KEEP, TEMPERATURE, RATE = 4, 12, 0.6, 0.05, 2e-2


def small_model(**settings: Any) -> Any:
    """Two layers of different ranks, in float64, whose B is not 0."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7)).double()
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "rank_pattern": {"2": 3}, **settings}
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **settings)).double()
    return model


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(9, size, generator=generator, dtype=torch.float64) for size in (6, 7))


def loss_of(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out - target).square().mean()


def train(model: Any, method: BeamLoRACallback, optimizer: Any, steps: range = range(1, STEPS + 1)) -> None:
    for step in steps:
        x, y = data(step)
        loss_of(model(x), y).backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer, step)
        optimizer.zero_grad()


def callback(**settings: Any) -> BeamLoRACallback:
    return BeamLoRACallback(**{"every": EVERY, "keep": KEEP, "until": 1.0, "max_steps": STEPS, **settings})


class Oracle:
    """The paper's training: A, B and q are parameters, and autograd goes through `B diag(r softmax(q / τ)) A`."""

    def __init__(self, model: Any, weight_decay: float) -> None:
        self.layers = [model.base_model.model[0], model.base_model.model[2]]
        self.A = [p.A.detach().clone().requires_grad_() for p in find_lora_pairs(model)]
        self.B = [p.B.detach().clone().requires_grad_() for p in find_lora_pairs(model)]
        self.q = [torch.zeros(len(A), dtype=torch.float64, requires_grad=True) for A in self.A]
        self.optimizer = torch.optim.AdamW([*self.A, *self.B], lr=RATE, weight_decay=weight_decay)
        self.of_gates = torch.optim.AdamW(self.q, lr=RATE, weight_decay=0.0)
        self.replaced: list[int] = []

    def weights(self, i: int) -> torch.Tensor:
        e = (self.q[i] / TEMPERATURE).exp()
        return len(e) * e / e.sum()

    def out(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            base, s = layer.get_base_layer(), layer.scaling["default"]
            W = base.weight.detach() + s * self.B[i] @ torch.diag(self.weights(i)) @ self.A[i]
            x = x @ W.T + base.bias.detach()
            x = torch.tanh(x) if i == 0 else x
        return x

    def step(self, step: int) -> None:
        x, y = data(step)
        self.optimizer.zero_grad()
        self.of_gates.zero_grad()
        loss_of(self.out(x), y).backward()
        self.optimizer.step()
        self.of_gates.step()
        with torch.no_grad():
            p = 1 - (1 - KEEP) * (1 + math.cos(math.pi * step / STEPS)) / 2
            if step % EVERY == 0 and STEPS - step >= EVERY:
                self.replace(p, step)
            if step % (EVERY // 2) == 0:
                self.then = [[self.kept(p) for p in both] for both in zip(self.A, self.B, strict=True)]

    def kept(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.optimizer.state[p]
        return {"value": p.detach().clone(), "m": state["exp_avg"].clone(), "v": state["exp_avg_sq"].clone()}

    def replace(self, p: float, step: int) -> None:
        pool = sorted(((float(w), i, k) for i in (0, 1) for k, w in enumerate(self.weights(i))), reverse=True)
        total, sum_so_far, left_out = sum(w for w, _, _ in pool), 0.0, [0, 0]
        for w, i, _ in pool:
            sum_so_far += w
            left_out[i] += sum_so_far > p * total
        generator = torch.Generator().manual_seed(step)
        for i in (0, 1):
            w = self.weights(i).tolist()
            best_first = sorted(range(len(w)), key=lambda k: -w[k])
            K = min(left_out[i], len(w) // 2)
            order = torch.randperm(K, generator=generator).tolist()
            self.replaced.append(K)
            for n, worst in enumerate(best_first[len(w) - K :]):
                best = best_first[order[n]]
                for factor, rows, then in ((self.A[i], True, self.then[i][0]), (self.B[i], False, self.then[i][1])):
                    state = self.optimizer.state[factor]
                    for now, old in ((factor, "value"), (state["exp_avg"], "m"), (state["exp_avg_sq"], "v")):
                        if rows:
                            now[worst] = then[old][best]
                        else:
                            now[:, worst] = then[old][:, best]
                mean = (w[worst] + w[best]) / 2
                # a weight w has q = τ log w + c, with the c of the other slots
                c = self.q[i][best] - TEMPERATURE * math.log(w[best])
                self.q[i][worst] = self.q[i][best] = c + TEMPERATURE * math.log(mean)
            if K:
                self.of_gates.state.pop(self.q[i])


@pytest.mark.parametrize("weight_decay", [0.1])
def test_adamw_takes_the_steps_of_the_paper(weight_decay):
    model, method = small_model(), callback()
    oracle = Oracle(model, weight_decay)
    method.before_training(model, None)
    pairs = find_lora_pairs(model)
    optimizer = torch.optim.AdamW([f for p in pairs for f in (p.A, p.B)], lr=RATE, weight_decay=weight_decay)
    close = {"rtol": 1e-9, "atol": 1e-11}
    for step in range(1, STEPS + 1):
        oracle.step(step)
        train(model, method, optimizer, range(step, step + 1))
        for i, pair in enumerate(pairs):
            torch.testing.assert_close(pair.layer.beamlora_gates["default"], oracle.q[i].detach(), **close)
            torch.testing.assert_close(pair.A.detach(), oracle.A[i].detach(), **close)
            torch.testing.assert_close(pair.B.detach(), (oracle.B[i] * oracle.weights(i)).detach(), **close)
            for own, its in ((pair.A, oracle.A[i]), (pair.B, oracle.B[i])):
                for name in ("exp_avg", "exp_avg_sq"):
                    of_own, of_its = optimizer.state[own][name], oracle.optimizer.state[its][name]
                    torch.testing.assert_close(of_own, of_its, **close)
        x, _ = data(100)
        torch.testing.assert_close(model(x), oracle.out(x), **close)
    assert len(oracle.replaced) == 4 and sum(oracle.replaced) >= 3 and max(oracle.replaced) == 2


# ---- with LoRA-Pro, whose rule steps B diag(g) ----


def gradients_of_gates(model: Any, pairs: Any, gates: Any, step: int) -> list[torch.Tensor]:
    """By autograd through the weights that B of the model holds already."""
    x, y = data(step)
    q = [gate.clone().requires_grad_() for gate in gates]
    for i, pair in enumerate(pairs):
        base, s = pair.layer.get_base_layer(), pair.scaling
        scale = torch.softmax(q[i] / TEMPERATURE, 0) / torch.softmax(gates[i] / TEMPERATURE, 0)
        W = base.weight.detach() + s * (pair.B.detach() * scale) @ pair.A.detach()
        x = x @ W.T + base.bias.detach()
        x = torch.tanh(x) if i == 0 else x
    return list(torch.autograd.grad(loss_of(x, y), q))


@pytest.mark.parametrize("mode", ["efficient", "full", "factored", "spectral", "rite"])
def test_a_mode_steps_the_weighted_pairs(mode):
    settings = {"lr": RATE, "mode": mode, "weight_decay": 0.1}
    models = [small_model() for _ in range(2)]
    (model, expected), method = models, callback()
    optimizer, oracle = (create_lorapro_optimizer(each, **settings) for each in models)
    method.before_training(model, None)
    pairs = find_lora_pairs(expected)
    gates = [torch.zeros(len(pair.A), dtype=torch.float64) for pair in pairs]
    of_gates = torch.optim.AdamW(gates, lr=RATE, weight_decay=0.0)
    snapshot: Any = None
    count = 0
    for step in range(1, STEPS + 1):
        train(model, method, optimizer, range(step, step + 1))
        for gate, gradient in zip(gates, gradients_of_gates(expected, pairs, gates, step), strict=True):
            gate.grad = gradient
        before = [torch.softmax(gate / TEMPERATURE, 0) for gate in gates]
        x, y = data(step)
        loss_of(expected(x), y).backward()
        oracle.step()
        oracle.zero_grad()
        of_gates.step()
        weights = [len(gate) * torch.softmax(gate / TEMPERATURE, 0) for gate in gates]
        with oracle.rewriting():
            for i, pair in enumerate(pairs):
                pair.B.data.mul_(weights[i] / len(gates[i]) / before[i])
            if step in (4, 8):
                p = 1 - (1 - KEEP) * (1 + math.cos(math.pi * step / STEPS)) / 2
                for i, (replaced, sources) in enumerate(replacements(weights, p, step)):
                    count += len(replaced)
                    for to, source in zip(replaced, sources, strict=True):
                        mean = weights[i][[to, source]].mean()
                        copy_slot(oracle, pairs[i], snapshot[i], to, source, mean, mode == "efficient")
                        pairs[i].B.data[:, source] *= mean / weights[i][source]
                        c = gates[i][source] - TEMPERATURE * weights[i][source].log()
                        gates[i][to] = gates[i][source] = c + TEMPERATURE * mean.log()
                    if replaced:
                        of_gates.state.pop(gates[i], None)
        if step % 4 == 2:
            snapshot = [kept_slots(oracle, pair, weights[i], mode == "efficient") for i, pair in enumerate(pairs)]
        for own, its in zip(find_lora_pairs(model), pairs, strict=True):
            # copies nearly repeat their sources, so that a step divides by small singular values
            assert (own.B @ own.A - its.B @ its.A).norm() < 1e-6 * (its.B @ its.A).norm()
    assert count >= 3


def kept_slots(optimizer: Any, pair: Any, weights: torch.Tensor, with_moments: bool) -> dict[str, torch.Tensor]:
    names = ("exp_avg", "exp_avg_sq") if with_moments else ()
    kept = {f"A {name}": optimizer.state[pair.A][name].clone() for name in names}
    kept |= {f"B {name}": optimizer.state[pair.B][name].clone() for name in names}
    return {**kept, "A": pair.A.data.clone(), "B": pair.B.data / weights}


def copy_slot(optimizer: Any, pair: Any, kept: Any, to: int, source: int, weight: Any, with_moments: bool) -> None:
    pair.A.data[to] = kept["A"][source]
    pair.B.data[:, to] = kept["B"][:, source] * weight
    for name in ("exp_avg", "exp_avg_sq") if with_moments else ():
        optimizer.state[pair.A][name][to] = kept[f"A {name}"][source]
        optimizer.state[pair.B][name][:, to] = kept[f"B {name}"][:, source]


# ---- kinds of layers ----

ROWS = {row.name: row for row in ALL_ROWS}
KINDS = ("linear with rsLoRA", "Conv1D of GPT-2", "Conv2d", "embedding", "experts (in, out)", "Conv2d with groups")
SLOW = ("Conv1d", "experts (out, in)", "two expert parameters of one module", "a block used twice")
every_kind = pytest.mark.parametrize("name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])


@every_kind
def test_gates_of_every_kind_of_layer(name):
    row = ROWS[name]
    torch.manual_seed(0)
    model, method = row.build(), BeamLoRACallback(2, max_steps=8)
    method.before_training(model, None)
    pairs = find_lora_pairs(model)
    optimizer = torch.optim.SGD([factor for pair in pairs for factor in (pair.A, pair.B)], lr=0.0)
    row.loss(model).backward()
    method.before_step(optimizer)
    gates = [pair.layer.beamlora_gates["default"] for pair in pairs]
    gradients = [gate.grad.clone() for gate in gates]
    method.after_step(optimizer, 1)  # nothing moves at a rate of 0
    for pair, gate, gradient in zip(pairs, gates, gradients, strict=True):
        B = pair.B.detach().clone()
        for index in product(*map(range, gate.shape)):
            found = []
            for h in (1e-5, -1e-5):
                q = torch.zeros_like(gate)
                q[index] = h
                weights = gate.shape[-1] * torch.softmax(q / TEMPERATURE, -1)
                pair.B.data.copy_(pair.factor_B(pair.matrix_B(B) * weights[..., None, :]))
                found.append(float(row.loss(model)))
            assert (found[0] - found[1]) / 2e-5 == pytest.approx(float(gradient[index]), rel=1e-5, abs=1e-6)
        pair.B.data.copy_(B)


@every_kind
def test_a_slot_is_a_column_of_b_and_its_row_of_a(name):
    torch.manual_seed(0)
    row = ROWS[name]
    model = row.build()
    out = row.output(model)
    for pair in find_lora_pairs(model):
        r = pair.matrix_A(pair.A).shape[-2]
        slots = [(list(range(r)), torch.randperm(r).tolist()) for _ in range(pair.batch)]
        pair.A.data.copy_(with_copies(pair, "A", pair.A.data, pair.A.data, slots))
        one = row.output(model)
        pair.B.data.copy_(with_copies(pair, "B", pair.B.data, pair.B.data, slots))
        assert slots == [(list(range(r)), list(range(r)))] * pair.batch or not torch.allclose(one, out)
    torch.testing.assert_close(row.output(model), out)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits):
    torch.manual_seed(0)
    row = ROWS[f"{bits}-bit base"]
    model, method = row.build(), BeamLoRACallback(2, max_steps=4)
    method.before_training(model, None)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, mode="efficient")
    for step in range(1, 5):
        row.loss(model).backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer, step)
        optimizer.zero_grad()
    out = row.output(model)
    fold_beamlora(model)
    assert torch.equal(row.output(model), out)


# ---- refusals and skipped steps ----


def test_a_step_that_is_left_out_changes_no_gate():
    model, method = small_model(), callback()
    method.before_training(model, None)
    optimizer = create_lorapro_optimizer(model, lr=RATE, mode="efficient")
    train(model, method, optimizer, range(1, 3))
    pairs = find_lora_pairs(model)
    kept = [x for pair in pairs for x in (pair.layer.beamlora_gates["default"], pair.A.data, pair.B.data)]
    before = [x.clone() for x in kept]
    (model(data(3)[0]).sum() * float("nan")).backward()
    method.before_step(optimizer)
    optimizer.step()
    method.after_step(optimizer, 3)
    assert optimizer.skipped_steps == 1 and all(map(torch.equal, before, kept))


def test_gradients_that_the_optimizer_unscales_give_the_same_gates():
    found = []
    for scale in (1.0, 1024.0):
        model, method = small_model(), callback()
        method.before_training(model, None)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)
        steps = iter(range(1, STEPS + 1))
        optimizer.register_step_pre_hook(lambda optimizer, *_, method=method: method.before_step(optimizer))
        optimizer.register_step_post_hook(
            lambda optimizer, *_, method=method, steps=steps: method.after_step(optimizer, next(steps))
        )
        scaler = torch.amp.GradScaler("cpu", scale, growth_interval=2, enabled=scale != 1)
        for step in range(1, STEPS + 1):
            x, y = data(step)
            scaler.scale(loss_of(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append([pair.layer.beamlora_gates["default"] for pair in find_lora_pairs(model)])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)
    assert all(gate.any() for gate in found[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 3}, "every=3 must be an even number of steps"),
        ({"every": 0}, "every=0 must be an even number of steps, 2 or more"),
        ({"every": 2.0}, r"every=2\.0 must be an even number"),
        ({"keep": 0.0}, r"keep=0\.0 must be above 0 and at most 1"),
        ({"until": 1.5}, r"until=1\.5 must be above 0 and at most 1"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be a positive number, such as 0\.05"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        callback(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"model\.0 cannot be trained by BeamLoRA: DoRA's norm .* Set use_dora=False"),
        (
            {"rank_pattern": {"2": 1}},
            r"model\.2 cannot .* one slot, of which none can be copied\. Set r .* to 2 or more",
        ),
    ],
)
def test_layers_that_are_refused(settings, message):
    model = small_model(**settings)
    with pytest.raises(ValueError, match=message):
        callback().before_training(model, None)
    assert not any("beamlora_gates" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mode", ["efficient", "factored"])
def test_master_copies_are_weighted_and_copied(mode):
    model, method = small_model().to(torch.bfloat16), callback()
    method.before_training(model, None)
    optimizer = create_lorapro_optimizer(model, lr=RATE, mode=mode, master_factors=True)
    pairs = find_lora_pairs(model)
    for step in range(1, EVERY + 1):
        then = {key: {name: x.clone() for name, x in kept.items()} for key, kept in method._then.items()}
        x, y = (each.bfloat16() for each in data(step))
        loss_of(model(x), y).backward()
        method.before_step(optimizer)
        optimizer.step()
        stepped = [optimizer.state[pair.B]["master"].clone() for pair in pairs]
        before = [gate_weights(pair.layer.beamlora_gates["default"], TEMPERATURE) for pair in pairs]
        method.after_step(optimizer, step)
        optimizer.zero_grad()
        for pair, old, weights in zip(pairs, stepped, before, strict=True):
            A, B = (optimizer.state[factor]["master"] for factor in (pair.A, pair.B))
            assert torch.equal(pair.A, A.bfloat16()) and torch.equal(pair.B, B.bfloat16()) and B.dtype == torch.float32
            after = gate_weights(pair.layer.beamlora_gates["default"], TEMPERATURE)
            if step < EVERY:
                torch.testing.assert_close(B, old * after / weights)
            else:
                kept = then[f"{pair.name}.default"]
                copies = [(to, a) for to in range(len(A)) for a in range(len(A)) if torch.equal(A[to], kept["A"][a])]
                assert copies and all(torch.allclose(B[:, to], kept["B"][:, a] * after[to]) for to, a in copies)


def test_factors_in_half_precision_merged_or_tied_are_refused():
    model, method = small_model().to(torch.bfloat16), callback()
    method.before_training(model, None)
    with pytest.raises(
        ValueError, match=r"bfloat16 rounds small changes away\. Keep the adapter in float32, .* master"
    ):
        method.before_step(create_lorapro_optimizer(model, lr=RATE, mode="efficient"))
    merged = small_model()
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the base weight.*unmerge_adapter"):
        callback().before_training(merged, None)


@needs_weight_tying
def test_tied_factors_are_refused():
    with pytest.raises(ValueError, match=r"shares its factors with another layer. Leave one of them out"):
        callback().before_training(tied_llama(), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": None}, r"needs the number of steps: BeamLoRACallback\(every, max_steps=\.\.\.\)"),
        ({"every": 8}, "every=8 leaves BeamLoRA no time to replace a slot in 12 steps: set every to 6 or less"),
        ({"until": 0.3}, "in 12 steps: set every to 2 or less"),
        ({"max_steps": 3}, "train longer, or leave it out"),
    ],
)
def test_a_loop_without_time_is_refused_before_its_first_step(settings, message):
    model, method = small_model(), callback(**settings)
    method.before_training(model, None)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    with pytest.raises(ValueError, match=message):
        train(model, method, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_optimizer_whose_state_has_no_slots_is_refused_at_its_first_step():
    model, method = small_model(), callback()
    method.before_training(model, None)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=RATE)
    with pytest.raises(
        ValueError, match=r"the state 'row_var' of Adafactor cannot be copied .* Use optim='adamw_torch'"
    ):
        train(model, method, optimizer)


def test_folding_drops_the_gates_alone():
    model, method = small_model(), callback()
    with pytest.raises(ValueError, match=r"the model has no gates of BeamLoRA. Train it"):
        fold_beamlora(model)
    method.before_training(model, None)
    train(model, method, create_lorapro_optimizer(model, lr=RATE, mode="efficient"))
    out = model(data(0)[0])
    fold_beamlora(model)
    assert torch.equal(model(data(0)[0]), out) and not any("beamlora_gates" in vars(m) for m in model.modules())


def test_the_jump_is_logged(caplog):
    caplog.set_level(logging.INFO, "lorapro_hf")
    model, method = small_model(), callback()
    method.before_training(model, None)
    optimizer = create_lorapro_optimizer(model, lr=RATE, mode="efficient")
    train(model, method, optimizer, range(1, EVERY))
    x, y = data(EVERY)
    loss_of(model(x), y).backward()
    method.before_step(optimizer)
    optimizer.step()
    method.after_step(optimizer, EVERY)
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"BeamLoRA at step 4: 3 of 7 slots replaced \(share kept: 0\.7000\), which changed the updates of the "
        r"weights by [0-9.e-]+ of their norm",
        message,
    )
