"""Boosters against dense formulas: in each kind of layer, in the steps of a loop, and in the optimizer's state."""

from __future__ import annotations

import copy
import io
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from grids import rest_slow
from lora_layers import ALL_ROWS, Net
from lorapro_hf import BoostingCallback, create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.config import MODES
from lorapro_hf.methods.boosters import add_booster, as_one_adapter, boosters_of, save_whole
from lorapro_hf.methods.boosting import reset_state
from optimizer_helpers import backward, small_model
from trainer_helpers import assert_same

ROWS = {row.name: row for row in ALL_ROWS if set(row.settings) <= set(LoraConfig.__dataclass_fields__)}
IN_DEFAULT_RUN = ("linear with rsLoRA", "Conv1D of GPT-2", "Conv2d", "embedding", "experts (in, out)", "4-bit base")
SLOW = ("Conv2d with groups", "Conv1d", "Conv3d", "experts (out, in)", "a block used twice", "8-bit base")
LAYERS = [*IN_DEFAULT_RUN, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name in ROWS)]
UNMERGED = ("Conv2d with groups", "a block used twice", "4-bit base", "8-bit base")  # PEFT cannot, or not exactly


def fresh(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return ROWS[name].build(init_lora_weights=True, **settings)


def output(name: str, model: Any) -> torch.Tensor:
    """The output of the adapted layer, which is linear in its weight."""
    row = ROWS[name]
    torch.manual_seed(1)
    inputs = row.inputs()
    with torch.no_grad():
        return model.base_model.model.body(inputs.to(row.dtype) if inputs.is_floating_point() else inputs)


def draw(*pairs: Any, seed: int) -> None:
    """The same random factors for pairs of one shape."""
    generator = torch.Generator().manual_seed(seed)
    for letter in "AB":
        values = torch.randn(getattr(pairs[0], letter).shape, generator=generator)
        for pair in pairs:
            getattr(pair, letter).data.copy_(values)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_adds_its_boosters_and_saves_them_as_one_adapter(name, tmp_path):
    model, single = fresh(name), fresh(name)
    (pair,), (alone,) = find_lora_pairs(model), find_lora_pairs(single)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    without = output(name, single)
    expected = without.clone()
    for seed in range(3):
        draw(pair, alone, seed=seed)
        expected += output(name, single) - without
        if seed < 2:
            add_booster(pair)
    near = {"rtol": 1e-11, "atol": 1e-11} if ROWS[name].dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(output(name, model), expected, **near)
    torch.testing.assert_close(output(name, copy.deepcopy(model)), expected, **near)
    with model.disable_adapter():
        assert torch.equal(output(name, model), without)
    if name not in UNMERGED:
        merged = nn.ModuleDict({"model": copy.deepcopy(model).merge_and_unload()})
        merged.base_model = merged
        torch.testing.assert_close(output(name, merged), expected, **near)
    trained = (pair.A, pair.B)
    with as_one_adapter(model), as_one_adapter(model):
        torch.testing.assert_close(output(name, model), expected, **near)
        assert pair.layer.r["default"] == 3 * alone.layer.r["default"]
        model.save_pretrained(tmp_path)
    assert trained[0] is pair.A and trained[1] is pair.B and pair.layer.r == alone.layer.r
    if name != "8-bit base":  # two of them differ without an adapter, too
        torch.manual_seed(0)
        stock = PeftModel.from_pretrained(ROWS[name].model().to(ROWS[name].dtype), tmp_path)
        torch.testing.assert_close(output(name, stock.to(ROWS[name].dtype)), expected, **near)
    assert all(torch.equal(value, model.get_parameter(n)) for n, value in before.items())


@pytest.mark.slow
def test_two_expert_parameters_of_one_module(tmp_path):
    name = "two expert parameters of one module"
    model, dense = fresh(name), fresh(name)
    pairs = find_lora_pairs(model)
    for seed in range(2):
        for number, (pair, other) in enumerate(zip(pairs, find_lora_pairs(dense), strict=True)):
            draw(pair, seed=10 * number + seed)
            change = type(pair.layer).get_delta_weight(pair.layer, "default")
            getattr(other.layer.get_base_layer(), pair.layer.parameter_name).data.add_(change.detach())
            if seed == 0:
                add_booster(pair)
    expected = ROWS[name].output(dense)
    torch.testing.assert_close(ROWS[name].output(model), expected, rtol=1e-11, atol=1e-11)
    with as_one_adapter(model):
        model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(ROWS[name].model().double(), tmp_path).double()
    torch.testing.assert_close(ROWS[name].output(stock), expected, rtol=1e-11, atol=1e-11)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 6, generator=generator).double(), torch.randn(8, 5, generator=generator).double())
        for _ in range(count)
    ]


def test_a_loop_takes_the_steps_of_the_dense_formula():
    rates, (m, n), scaling = [0.1 / (step + 1) for step in range(7)], (5, 6), 2.0
    torch.manual_seed(0)
    model = get_peft_model(Net(nn.Linear(n, m)), LoraConfig(r=1, lora_alpha=2, target_modules=["body"])).double()
    (pair,) = find_lora_pairs(model)
    W, bias = pair.layer.weight.detach().clone(), pair.layer.bias.detach()
    A, B = pair.A.detach().clone().requires_grad_(), pair.B.detach().clone().requires_grad_()
    generator, expected = torch.Generator().manual_seed(11), []
    torch.manual_seed(11)
    method = BoostingCallback(3)
    method.before_training(model, [])
    optimizer = torch.optim.AdamW([pair.A, pair.B], weight_decay=0.1)
    dense = torch.optim.AdamW([A, B], weight_decay=0.1)
    for step, (x, y) in enumerate(batches(7)):
        if step in (3, 6):  # a new booster, with an optimizer of its own
            W = (W + scaling * B @ A).detach()
            bound = 1 / math.sqrt(n)
            A = torch.empty(1, n).uniform_(-bound, bound, generator=generator).double().requires_grad_()
            B = torch.zeros(m, 1).double().requires_grad_()
            dense = torch.optim.AdamW([A, B], weight_decay=0.1)
        for each in (optimizer, dense):
            each.param_groups[0]["lr"] = rates[step]
            each.zero_grad()
        ((torch.tanh(x @ (W + scaling * B @ A).T + bias) - y) ** 2).mean().backward()
        dense.step()
        with method.forward_context():
            ((model(x) - y) ** 2).mean().backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer, step + 1)
        expected.append((A.detach().clone(), B.detach().clone()))
        for own, formula in zip((pair.A, pair.B), expected[-1], strict=True):
            torch.testing.assert_close(own.detach(), formula, rtol=1e-10, atol=1e-12)
    W0 = pair.layer.weight.detach()
    change = pair.layer.get_delta_weight("default").detach()
    torch.testing.assert_close(W0 + change, (W + scaling * B @ A).detach(), rtol=1e-10, atol=1e-12)
    assert torch.linalg.matrix_rank(change) == 3 and len(boosters_of(pair.layer).A) == 2


def test_a_pickled_model_keeps_its_boosters(tmp_path):
    model = small_model(r=1)
    save_whole(model)
    for seed, pair in enumerate(find_lora_pairs(model)):
        draw(pair, seed=seed)
        add_booster(pair)
    content = io.BytesIO()
    torch.save(model, content)
    content.seek(0)
    copied = torch.load(content, weights_only=False)
    x = torch.randn(4, 6)
    before = model(x)
    torch.testing.assert_close(copied(x), before, rtol=0, atol=0)
    copied.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).r == 2
    torch.testing.assert_close(copied.merge_and_unload()(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_many_boosters_lose_nothing_in_bfloat16():
    torch.manual_seed(0)
    model = get_peft_model(Net(nn.Linear(64, 48)).bfloat16(), LoraConfig(r=1, target_modules=["body"]))
    (pair,) = find_lora_pairs(model)
    W = pair.layer.weight.detach().double()
    expected = torch.zeros_like(W)
    for seed in range(200):  # each of a hundredth of the weight, where bfloat16 has two digits
        draw(pair, seed=seed)
        pair.B.data.mul_(0.001)
        expected += pair.scaling * pair.B.detach().double() @ pair.A.detach().double()
        add_booster(pair)
    pair.B.data.zero_()
    x = torch.randn(8, 64).bfloat16()
    out = model.base_model.model.body(x).double()
    exact = x.double() @ (W + expected).T + pair.layer.bias.double()
    torch.testing.assert_close(out, exact, rtol=2**-7, atol=2**-7)
    with as_one_adapter(model):
        found = pair.scaling * pair.B.detach() @ pair.A.detach()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_new_booster_changes_no_output():
    model, method = small_model(r=1), BoostingCallback(1)
    method.before_training(model, [])
    for pair in find_lora_pairs(model):
        draw(pair, seed=0)
    x = torch.randn(4, 6)
    before = model(x)
    method.after_step(torch.optim.AdamW(model.parameters()), 1)
    with method.forward_context():
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert all(not pair.B.any() and pair.A.any() for pair in find_lora_pairs(model))


KINDS = [
    (None, torch.float32, {}),
    ("efficient", torch.bfloat16, {"master_factors": True}),
    *((mode, torch.float32, {}) for mode in MODES),
]


@pytest.mark.parametrize(("mode", "dtype", "settings"), rest_slow(KINDS, 3))
def test_the_state_of_the_factors_is_that_of_a_new_optimizer(mode, dtype, settings):
    def optimizer_of(model: Any) -> torch.optim.Optimizer:
        if mode is None:
            return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode, **settings})

    model = small_model(dtype, r=1, modules_to_save=None)
    optimizer = optimizer_of(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    for pair in find_lora_pairs(model):
        add_booster(pair)
        draw(pair, seed=5)
        pair.B.data.zero_()
    reset_state(optimizer, find_lora_pairs(model))
    anew = copy.deepcopy(model)
    for each, own in ((model, optimizer), (anew, optimizer_of(anew))):
        for step in range(3, 5):
            backward(each, step)
            own.step()
    assert_same(*({n: p for n, p in each.named_parameters() if p.requires_grad} for each in (model, anew)))


@pytest.mark.parametrize("mode", rest_slow([*MODES], 2))
def test_layers_that_are_not_chosen_stay_zero(mode):
    model = small_model(r=1)
    torch.manual_seed(4)
    method, pairs = BoostingCallback(2, layers=1), find_lora_pairs(model)
    method.before_training(model, [])
    optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.1, config={"mode": mode})
    chosen = []
    for step in range(12):
        with method.forward_context():
            backward(model, step)
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer, step + 1)
        chosen.append([bool(pair.A.any() and pair.B.any()) for pair in pairs])
        assert [bool(pair.A.any() or pair.B.any()) for pair in pairs] == chosen[-1] and sum(chosen[-1]) == 1
    assert chosen[::2] == chosen[1::2] and {tuple(each) for each in chosen} == {(True, False), (False, True)}
    ranks = [sum(each[index] for each in chosen[::2]) for index in range(2)]
    with as_one_adapter(model):
        assert [pair.layer.r["default"] for pair in pairs] == ranks
        config = model.peft_config["default"]
        named = {("base_model.model." + name.strip("^")): rank for name, rank in config.rank_pattern.items()}
        assert [named.get(pair.name, config.r) for pair in pairs] == ranks
    for pair, rank in zip(pairs, ranks, strict=True):
        assert torch.linalg.matrix_rank(pair.layer.get_delta_weight("default")) == min(rank, 5)


def test_layers_are_blocks_and_both_hooks_choose():
    model = get_peft_model(
        nn.Sequential(*(nn.Sequential(OrderedDict(up=nn.Linear(4, 4), down=nn.Linear(4, 4))) for _ in range(3))),
        LoraConfig(r=1, target_modules=["up", "down"]),
    )
    seen: list[Any] = []

    def last(names: list[str], generator: torch.Generator) -> list[str]:
        seen.append(names)
        return names[-1:]

    def ones(pair: Any, generator: torch.Generator) -> torch.Tensor:
        return torch.ones(pair.shape_A) * (2 + len(pair.layer.boosters.A))

    method = BoostingCallback(1, sampler=last, subspace=ones)
    method.before_training(model, [])
    for step in range(2):
        method.after_step(torch.optim.SGD(model.parameters()), step)
        method.forward_context()
    blocks = [f"base_model.model.{number}" for number in range(3)]
    assert seen == [blocks] * 3
    pairs = find_lora_pairs(model)
    assert [bool(pair.A.any()) for pair in pairs] == [False] * 4 + [True] * 2
    assert torch.equal(pairs[-1].A, torch.full((1, 4), 4.0))


# ---- refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps_per_booster": 0}, "steps_per_booster=0 must be a whole number of optimizer steps, 1 or more"),
        ({"rank": 0}, "rank=0 must be a whole number that is the adapter's r, 1 or more"),
        ({"layers": 0}, "layers=0 must be a whole number of layers, or None for all, 1 or more"),
        ({"subspace": "new"}, "subspace='new' is unknown; valid values are 'fresh'"),
        ({"sampler": "some"}, "sampler='some' is unknown; valid values are 'all'"),
        ({"layers": 2, "sampler": lambda names, _: names}, "layers=2 would be ignored: the sampler chooses"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BoostingCallback(**{"steps_per_booster": 2, **settings})


def compiled() -> Any:
    model = small_model(r=1)
    model.base_model.compile()
    return model


def merged() -> Any:
    model = small_model(r=1)
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (
            lambda: small_model(r=2),
            {},
            r"0: the rank of its adapter is 2, but that of a booster 1\. Set r=1 .*rank=2\)",
        ),
        (lambda: small_model(r=1), {"layers": 3}, r"layers=3, but the adapter is in 2 layers: .* Lower layers"),
        (lambda: small_model(r=1, use_dora=True), {}, r"its variant DoraLinearVariant computes more .* Use plain LoRA"),
        (lambda: small_model(r=1, lora_bias=True), {}, r"its adapter has a bias, .* Set lora_bias=False"),
        (lambda: small_model(r=1, init_lora_weights="pissa"), {}, "init_lora_weights='pissa' starts the factors from"),
        (lambda: fresh("MultiheadAttention", r=1), {}, r"PEFT merges its factors .* Leave it out of target_modules"),
        (compiled, {}, r"compiled code would leave out the boosters .* Leave out torch_compile and model.compile\(\)"),
        (merged, {}, r"is merged into the base weight, .* Call model.unmerge_adapter\(\) first"),
        (lambda: small_model(r=1), {"sampler": lambda *_: ["x"]}, r"the sampler returned \['x'\], but it must choose"),
    ],
)
def test_models_without_meaning_are_refused_before_anything_changes(build, settings, message):
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        BoostingCallback(1, **settings).before_training(model, [])
    assert_same(dict(model.named_parameters()), before)
