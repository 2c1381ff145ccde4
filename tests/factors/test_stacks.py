"""Many pairs as one batch: reading and writing them, and what is remembered of them between steps."""

import copy

import pytest
import torch
from torch import nn

from grids import rest_slow
from lora_layers import ROWS
from lorapro_hf import LoRAProAdamW, LoRAProConfig, find_lora_pairs
from lorapro_hf.config import MODES
from lorapro_hf.factors.stacks import stacks_of
from lorapro_hf.functional import reference
from optimizer_helpers import longest_step, reloaded

BY_NAME = {row.name: row for row in ROWS}
PLAIN = [row for row in ROWS if "base" not in row.name]  # quantised bases add no layout of their own
LAYOUTS = ["linear", "Conv2d", "Conv2d with groups", "experts (in, out)", "experts (out, in)", "embedding"]
SCALINGS = (2.0, 0.5, 1.25)
LR, DECAY, LIMIT = 0.02, 0.5, 0.03
CONFIGS = [
    *({"mode": mode} for mode in MODES if mode != "rite"),
    {"mode": "rite", "rite_clip": 0.0, "rite_skip": 0.0},  # a limit would tie the pairs together
    {"mode": "full", "update": "sequential"},
    {"mode": "full_8bit", "update": "sequential"},
    {"mode": "factored", "update": "linear"},
    {"mode": "full", "moments_dtype": "bfloat16"},
    {"mode": "efficient", "update": "sequential"},
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))


def several(name="linear", count=3):
    """The pairs of as many models, with scalings of their own."""
    pairs = [pair for _ in range(count) for pair in find_lora_pairs(BY_NAME[name].build())]
    for index, pair in enumerate(pairs):
        pair.layer.scaling[pair.adapter_name] = SCALINGS[index % len(SCALINGS)]
    return pairs


def optimizer_of(pairs, lr=LR, mode="full", **config):
    parameters = [factor for pair in pairs for factor in (pair.A, pair.B)]
    settings = LoRAProConfig(mode=mode, trust_region=LIMIT, **config)
    return LoRAProAdamW(parameters, pairs, lr=lr, weight_decay=DECAY, config=settings)


def give(pair, g):
    """Set the gradients that the full gradient `g` `(m, n)` leads to."""
    s = pair.scaling
    pair.A.grad, pair.B.grad = s * pair.B.detach().mT @ g.to(pair.A), s * g.to(pair.A) @ pair.A.detach().mT


def full_gradients(count, pairs=3, m=5, n=6):
    return torch.randn(count, pairs, m, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_the_mask_of_active_pairs_is_made_once_for_the_same_pairs():
    (stack,) = stacks_of(several())
    go, skip = torch.zeros(()), torch.ones(())
    assert stack.active([0, 2], go).tolist() == [True, False, True]
    mask = stack._mask
    assert not stack.active([0, 2], skip).any() and stack._mask is mask
    assert stack.active([1], go).tolist() == [False, True, False]
    assert stack.active(None, go).all()


@pytest.mark.parametrize("row", PLAIN, ids=lambda row: row.name)
def test_writing_what_was_read_restores_every_bit(row):
    models = [(row.build().to(dtype), dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    for stack, dtype in ((stack, dtype) for model, dtype in models for stack in stacks_of(find_lora_pairs(model))):
        before = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in stack.pairs]
        rows = stack.read()
        assert rows.A.dtype == rows.B.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        with torch.no_grad():
            for pair in stack.pairs:
                pair.A.zero_()
                pair.B.zero_()
            stack.write(rows, None)
        for pair, (A, B) in zip(stack.pairs, before, strict=True):
            assert torch.equal(pair.A, A) and torch.equal(pair.B, B)


def delta_weights(pair):
    """`scaling * B A` as `(packed, m, n)`, PEFT's own where it has one."""
    if pair.layout == "groups":  # each group of outputs sees its own share of the r channels
        halves = zip(pair.B.detach().flatten(1).chunk(pair.batch), pair.A.detach().chunk(pair.batch), strict=True)
        return pair.scaling * torch.stack([B @ A.flatten(1) for B, A in halves])
    delta = pair.layer.get_delta_weight(pair.adapter_name).detach()
    if pair.layout == "experts":
        # as (in, out) or as (out, in), by the kind of experts and the version of PEFT
        return delta if delta.shape[-2] == pair.matrix_B(pair.B).shape[-2] else delta.mT
    if isinstance(pair.layer.get_base_layer(), nn.Embedding):
        delta = delta.mT
    return delta.flatten(1)[None]


@pytest.mark.parametrize("name", LAYOUTS)
def test_entries_are_in_the_order_of_layers_and_then_of_what_each_packs(name):
    pairs = several(name)
    (stack,) = stacks_of(pairs)
    A, B = stack.read()
    expected = torch.cat([delta_weights(pair) for pair in pairs])
    assert len(expected) == 3 * stack.packed == len(stack.scaling())
    torch.testing.assert_close(stack.scaling()[:, None, None] * B.mT @ A, expected)
    # Some entries only: those of the last layer, in which all that it packs come together.
    assert stack.entries([2]) == list(range(2 * stack.packed, 3 * stack.packed))
    assert stack.per_entry(torch.arange(3)).tolist() == [layer for layer in range(3) for _ in range(stack.packed)]


def test_only_some_pairs_are_written():
    pairs = several("experts (in, out)")
    (stack,) = stacks_of(pairs)
    before = [pair.A.detach().clone() for pair in pairs]
    rows = stack.read()
    with torch.no_grad():
        stack.write(rows._replace(A=rows.A + 1), [0, 2])
    for pair, A, moved in zip(pairs, before, (1, 0, 1), strict=True):
        torch.testing.assert_close(pair.A.detach(), A + moved)


def test_scalings_are_those_of_the_layers_now():
    pairs = several("experts (in, out)", 2)
    (stack,) = stacks_of(pairs)
    assert stack.scaling().tolist() == [2.0] * 3 + [0.5] * 3
    assert stack.scaling().tolist() == [2.0] * 3 + [0.5] * 3
    pairs[1].layer.set_scale("default", 6.0)
    assert stack.scaling().tolist() == [2.0] * 3 + [pairs[1].scaling] * 3 and pairs[1].scaling > 0.5
    pairs[0].layer.scaling["default"] = 0.0
    with pytest.raises(ValueError, match="scaling of adapter 'default' is 0"):
        stack.scaling()


def test_pairs_share_a_stack_only_if_they_are_alike():
    alike, other = several(), {}
    other["shape"] = find_lora_pairs(BY_NAME["linear"].build(r=2))[0]
    other["dtype"] = find_lora_pairs(BY_NAME["linear"].build().float())[0]
    other["dtype of one factor"] = find_lora_pairs(BY_NAME["linear"].build())[0]
    other["dtype of one factor"].B.data = other["dtype of one factor"].B.data.float()
    other["device"] = find_lora_pairs(BY_NAME["linear"].build().to("meta"))[0]
    other["group"] = several(count=1)[0]
    groups = {id(other["group"]): (0, 1)}
    stacks = stacks_of([*other.values(), *alike], lambda pair: groups.get(id(pair), (0, 0)))
    assert sorted(len(stack.pairs) for stack in stacks) == [1, 1, 1, 1, 1, 3]
    assert stacks[-1].pairs == alike and stacks[-1].stored_dtypes == (torch.float64, torch.float64)
    by_pair = {id(stack.pairs[0]): stack for stack in stacks}
    assert by_pair[id(other["group"])].groups == (0, 1)
    assert by_pair[id(other["dtype of one factor"])].stored_dtypes == (torch.float64, torch.float32)


class Oracles:
    """Pair by pair in float64 what the optimizer does, fed with full gradients."""

    def __init__(self, pairs, mode="full", update=None, efficient_projected=False, **_):
        self.pairs, self.mode, self.update, self.is_projected = pairs, mode, update, efficient_projected
        hyper = {"lr": LR, "weight_decay": DECAY}
        self.limits = [longest_step(pair, LIMIT) for pair in pairs]
        self.factors = [[f.detach().clone().requires_grad_() for f in (pair.A, pair.B)] for pair in pairs]
        if mode == "efficient":
            self.each = [torch.optim.AdamW(factors, fused=True, **hyper) for factors in self.factors]
        elif mode == "full":
            kind, more = reference.DenseFullAdamW, {}
        elif mode == "rite":
            kind, more = reference.DenseRite, {"clip": 0, "skip": 0}
        else:
            kind = reference.DenseSpectral if mode == "spectral" else reference.DenseFactoredAdamW
            more = {"update": update or "linear"}
        if mode != "efficient":
            self.each = [
                kind(pair.A, pair.B, pair.scaling, longest=limit, **hyper, **more)
                for pair, limit in zip(pairs, self.limits, strict=True)
            ]

    def step(self, index, g):
        if self.mode != "efficient":
            return self.each[index].step(g)
        (A, B), s = self.factors[index], self.pairs[index].scaling
        A.grad, B.grad = s * B.detach().mT @ g, s * g @ A.detach().mT
        if self.is_projected:
            A.grad, B.grad = reference.factor_gradients(g, A.detach(), B.detach(), s)
        old_A, old_B = A.detach().clone(), B.detach().clone()
        kept_A, kept_B = ((1 - LR * DECAY) * factor for factor in (old_A, old_B))
        self.each[index].step()
        change = A.data - kept_A
        if not self.is_projected:
            change = reference.lengthened(change, old_B, LR)
        if self.update == "sequential":
            change = reference.change_through(change, kept_B, B.data)
        step_B = B.data - kept_B
        D = s * ((old_B + step_B) @ (old_A + change) - old_B @ old_A)
        kept = reference.kept_fraction(D, self.limits[index])
        A.data, B.data = kept_A + kept * change, kept_B + kept * step_B

    def check(self, tolerance=1e-7):
        for index, pair in enumerate(self.pairs):
            own = self.each[index]
            A, B = self.factors[index] if self.mode == "efficient" else (own.A, own.B)
            for found, expected in ((pair.A, A), (pair.B, B)):
                assert (found - expected).norm() <= tolerance * expected.norm()


WITH_ORACLE = [
    {"mode": "full"},
    {"mode": "spectral"},
    {"mode": "rite", "rite_clip": 0.0, "rite_skip": 0.0},
    {"mode": "factored"},
    {"mode": "factored", "update": "linear"},
    {"mode": "efficient"},
    {"mode": "efficient", "update": "sequential"},
    {"mode": "efficient", "efficient_projected": True},
    {"mode": "efficient", "efficient_projected": True, "update": "sequential"},
]
# Which of three pairs take part in each of six steps: none at first, then later than others, now and then, all.
TURNS = [(1, 2), (2,), (0, 2), (0, 1, 2), (0, 1), (0, 1, 2)]


@pytest.mark.parametrize("config", WITH_ORACLE, ids=lambda config: "-".join(map(str, config.values())))
def test_pairs_step_when_they_have_a_gradient_as_if_alone(config):
    pairs = several()
    optimizer, oracles = optimizer_of(pairs, **config), Oracles(pairs, **config)
    counts = [0, 0, 0]
    for turn, gradients in zip(TURNS, full_gradients(len(TURNS)), strict=True):
        before = [(p.A.detach().clone(), p.B.detach().clone(), copy.deepcopy(optimizer.state.get(p.A))) for p in pairs]
        optimizer.zero_grad()
        for index in turn:
            give(pairs[index], gradients[index])
            oracles.step(index, gradients[index])
            counts[index] += 1
        optimizer.step()
        oracles.check()
        for index, pair in enumerate(pairs):
            assert optimizer.state[pair.A]["step"].item() == optimizer.state[pair.B]["step"].item() == counts[index]
            if index not in turn:
                A, B, state = before[index]
                assert torch.equal(pair.A, A) and torch.equal(pair.B, B)
                assert all(torch.equal(optimizer.state[pair.A][name], value) for name, value in (state or {}).items())


@each_config
@pytest.mark.parametrize("name", rest_slow(["experts (in, out)", "linear", "Conv2d with groups"]))
def test_a_stack_steps_as_its_pairs_do_alone(config, name):
    """Storages without a dense oracle, and packed pairs: an optimizer for each pair that steps in its turns only."""
    together = several(name)
    alone = copy.deepcopy(together)
    optimizer, each = optimizer_of(together, **config), [optimizer_of([pair], **config) for pair in alone]
    for turn in TURNS:
        optimizer.zero_grad()
        for index in turn:
            for letter in "AB":
                one, two = getattr(together[index], letter), getattr(alone[index], letter)
                one.grad = torch.randn_like(one)
                two.grad = one.grad.clone()
            each[index].step()
        optimizer.step()
        for one, two in zip(together, alone, strict=True):
            torch.testing.assert_close(one.A.detach(), two.A.detach(), rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(one.B.detach(), two.B.detach(), rtol=1e-9, atol=1e-10)


@each_config
def test_state_is_views_of_the_stacked_moments(config):
    pairs = several("experts (in, out)")
    optimizer = optimizer_of(pairs, **config)
    for pair in pairs:
        pair.A.grad, pair.B.grad = torch.randn_like(pair.A), torch.randn_like(pair.B)
    optimizer.step()
    (moments,) = optimizer._moments.values()
    for (factor, name), stacked in moments.tensors.items():
        shown = [optimizer.state[getattr(pair, factor)][name] for pair in pairs]
        for index, view in enumerate(shown):
            assert view.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
            before = stacked.clone()
            view.add_(1)
            changed = (stacked != before).flatten(1).all(1)
            entries = changed.view(3, -1).all(1) if len(changed) > 3 else changed
            assert entries.tolist() == [i == index for i in range(3)]


def side_by_side(pairs, optimizer, oracles, gradients):
    """Give both the same gradients, compare their steps, and yield the number of each step."""
    for step, of_step in enumerate(gradients):
        for index, pair in enumerate(pairs):
            give(pair, of_step[index])
            oracles.step(index, of_step[index])
        optimizer.step()
        oracles.check()
        yield step


@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
def test_changes_to_the_state_are_seen_by_the_next_step(how):
    pairs = several()
    optimizer, oracles = optimizer_of(pairs), Oracles(pairs)
    for step in side_by_side(pairs, optimizer, oracles, full_gradients(4)):
        if step != 1:
            continue
        state, other = optimizer.state[pairs[1].A], torch.randn(5, 6, dtype=torch.float64)
        if how == "in place":
            state["exp_avg"].copy_(other)
        elif how == "replaced":
            state["exp_avg"] = other
        else:
            optimizer.state[pairs[1].A] = {}
            oracles.each[1].V.zero_()
            oracles.each[1].t, other = 0, torch.zeros_like(other)
        oracles.each[1].M = other.clone()


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("full", "in place"),
        ("factored", "in place"),
        *((mode, "replaced") for mode in ("full", "factored", "efficient")),
    ],
)
def test_changed_counters_are_seen_by_the_next_step(mode, how):
    pairs = several()
    optimizer, oracles = optimizer_of(pairs, mode=mode), Oracles(pairs, mode)
    for step in side_by_side(pairs, optimizer, oracles, full_gradients(4)):
        if step != 1:
            continue
        for factor, of_oracle in zip((pairs[1].A, pairs[1].B), oracles.factors[1], strict=True):
            state = optimizer.state[factor]
            state["step"] = state["step"].fill_(50.0) if how == "in place" else torch.tensor(50.0)
            if mode == "efficient":
                oracles.each[1].state[of_oracle]["step"].fill_(50.0)
        oracles.each[1].t = 50


def test_a_replaced_parameter_is_stepped_with_a_state_of_its_own():
    pairs = several()
    optimizer = optimizer_of(pairs)
    gradients = full_gradients(3)
    for pair, g in zip(pairs, gradients[0], strict=True):
        give(pair, g)
    optimizer.step()
    old = pairs[1].A
    before = old.detach().clone()
    pairs[1].layer.lora_A["default"].weight = nn.Parameter(torch.randn_like(old))
    give(pairs[1], gradients[1][1])
    with pytest.raises(ValueError, match="factors are not in the optimizer's param_groups"):
        optimizer.step()
    parameters = optimizer.param_groups[0]["params"]
    parameters[[p is old for p in parameters].index(True)] = pairs[1].A
    oracles = Oracles(pairs)
    for index, pair in enumerate(pairs):
        if index != 1:
            state = optimizer.state[pair.A]
            oracles.each[index].M, oracles.each[index].V = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
            oracles.each[index].t = 1
    for _ in side_by_side(pairs, optimizer, oracles, gradients[1:]):
        pass
    assert torch.equal(old, before)


def test_pairs_that_move_to_another_group_keep_their_moments():
    pairs = several()
    optimizer, oracles = optimizer_of(pairs), Oracles(pairs)
    for step in side_by_side(pairs, optimizer, oracles, full_gradients(4)):
        if step == 1:
            moving = [pairs[2].A, pairs[2].B]
            first = optimizer.param_groups[0]
            first["params"] = [p for p in first["params"] if all(p is not other for other in moving)]
            optimizer.add_param_group({"params": moving, "lr": LR / 4})
            oracles.each[2].lr = LR / 4
    assert sorted(len(stack.pairs) for stack in optimizer._stacks) == [1, 2]


@each_config
def test_loading_goes_on_as_if_never_interrupted(config):
    straight = several("experts (in, out)") + several()
    optimizer = optimizer_of(straight, **config)

    def train(pairs, optimizer, turns, seed):
        generator = torch.Generator().manual_seed(seed)
        for turn in turns:
            optimizer.zero_grad()
            for index, pair in enumerate(pairs):
                for factor in (pair.A, pair.B):
                    gradient = torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
                    factor.grad = gradient if index % 3 in turn else None
            optimizer.step()

    train(straight, optimizer, TURNS[:3], seed=1)
    resumed = copy.deepcopy(straight)
    again = optimizer_of(resumed, **config)
    again.load_state_dict(reloaded(optimizer.state_dict()))
    train(straight, optimizer, TURNS[3:], seed=2)
    train(resumed, again, TURNS[3:], seed=2)
    for one, two in zip(straight, resumed, strict=True):
        for first, second in ((one.A, two.A), (one.B, two.B)):
            assert torch.equal(first, second)
            kept, loaded = optimizer.state[first], again.state[second]
            assert kept.keys() == loaded.keys()
            assert all(torch.equal(value, loaded[name]) for name, value in kept.items())
