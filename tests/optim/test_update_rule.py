"""A new update rule is one class and one line of the registry: it trains, resumes, is shared out and is inspected."""

import copy
import json

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lorapro_hf import LoRAProConfig, cli, config, create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.config import MODES
from lorapro_hf.factors.stacks import Rows, global_norm
from lorapro_hf.functional.bases import compute_dtype
from lorapro_hf.functional.factor_steps import linear_step, select
from lorapro_hf.optim.projected_gradients import project_pair_gradients_
from lorapro_hf.optim.rules import RULES
from lorapro_hf.optim.rules.base import UpdateRule, matrix_shapes
from lorapro_hf.optim.rules.stack_state import StateSpec
from optimizer_helpers import assert_same, backward, small_model, snapshot
from processes import run
from trainer_helpers import tiny_base
from training import assert_close, build, make_optimizer, result, train


class SGD(UpdateRule):
    """SGD with momentum along the projected gradients, shortened by their norm over all pairs."""

    name = "sgd"
    has_trust_region = False

    def state_spec(self, pair):
        (A, B), dtype = matrix_shapes(pair), compute_dtype(pair.A, pair.B)
        return [StateSpec("momentum", "A", A, dtype), StateSpec("momentum", "B", B, dtype, "rows")]

    def shared_norm(self, read):
        return global_norm(read)

    def step(self, read, state, options):
        h = read.projected_gradients_(options.x_mode)
        for side, gradient in zip("AB", h, strict=True):
            momentum = state[side, "momentum"]
            new = options.betas[0] * momentum + gradient / (1 + options.shared_norm)
            momentum.copy_(select(options.active, new, momentum))
        directions = (state[side, "momentum"].clone() for side in "AB")
        return Rows(*linear_step(*state.factors(read.factors), *directions, options))


def register(patch):
    """As a line of the registry and a name in `MODES` do."""
    patch.setitem(RULES, "sgd", SGD)
    patch.setattr(config, "MODES", tuple(RULES))
    mode = LoRAProConfig.__dataclass_fields__["mode"]
    patch.setattr(mode, "metadata", {**mode.metadata, "choices": config.MODES})


@pytest.fixture
def sgd(monkeypatch):
    register(monkeypatch)


def test_the_modes_are_those_of_the_registry():
    assert tuple(RULES) == MODES and all(rule.name == mode for mode, rule in RULES.items())


def trained(steps=range(4), optimizer=None, model=None):
    model = small_model() if model is None else model
    optimizer = optimizer or create_lorapro_optimizer(model, lr=0.1, mode="sgd", weight_decay=0.1)
    for step in steps:
        backward(model, step)
        optimizer.step()
    return model, optimizer


def test_it_takes_the_steps_of_torch(sgd):
    model, expected = (small_model(torch.float64, modules_to_save=None) for _ in range(2))
    pairs = find_lora_pairs(expected)
    oracle = torch.optim.SGD([p for p in expected.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    optimizer = create_lorapro_optimizer(model, lr=0.1, mode="sgd")
    for step in range(4):
        backward(expected, step)
        norm = project_pair_gradients_(pairs, LoRAProConfig(mode="efficient"))
        for parameter in (p for p in expected.parameters() if p.grad is not None):
            parameter.grad /= 1 + norm
        oracle.step()
        trained([step], optimizer, model)
    assert_close(result(model), result(expected), 1e-10)


@pytest.mark.parametrize("settings", [{}, {"master_factors": True}])
def test_it_resumes_to_the_bit(sgd, settings):
    def new(model):
        return create_lorapro_optimizer(model, lr=0.1, mode="sgd", weight_decay=0.1, **settings)

    dtype = torch.bfloat16 if settings else torch.float32
    model = small_model(dtype)
    optimizer = new(model)
    trained(range(3), optimizer, model)
    resumed = copy.deepcopy(model)
    other = new(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in ((model, optimizer), (resumed, other)):
        trained(range(3, 6), each[1], each[0])
    assert_same(snapshot(optimizer), snapshot(other))
    with pytest.raises(ValueError, match="the checkpoint is of LoRA-Pro mode 'sgd'"):
        create_lorapro_optimizer(resumed, lr=0.1, mode="full").load_state_dict(optimizer.state_dict())


def test_a_step_that_is_not_finite_changes_nothing(sgd):
    model, optimizer = trained(range(2))
    before = snapshot(optimizer)
    backward(model, 2)
    optimizer.pairs[0].A.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    before[1]["param_groups"][0]["skipped_steps"] = 1
    assert_same(snapshot(optimizer), before)


def on_ranks(rank, ranks):
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        model = DistributedDataParallel(build())
        optimizer = make_optimizer(model, {"mode": "sgd", "shard_states": True})
        train(model, optimizer, rank, ranks)
        saved = optimizer.state_dict()["state"]
        return result(model), {key: dict(state) for key, state in saved.items()}


@pytest.mark.distributed
def test_two_ranks_share_its_state_and_take_the_steps_of_one(sgd, tmp_path):
    model = build()
    optimizer = make_optimizer(model, {"mode": "sgd"})
    train(model, optimizer)
    expected = optimizer.state_dict()["state"]
    (first, saved), (second, _) = run(on_ranks, 2, tmp_path)
    assert_close(first, result(model), 1e-10)
    assert_close(second, result(model), 1e-10)
    assert saved.keys() == expected.keys()
    for key, state in expected.items():
        assert_close(saved[key], state, 1e-10)


def test_it_is_inspected(sgd, tmp_path, capsys):
    tiny_base().save_pretrained(tmp_path)
    capsys.readouterr()  # saving may import a library that prints
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    costs = {cost["mode"]: cost for cost in json.loads(capsys.readouterr().out)["costs"]}
    assert costs["sgd"]["state_bytes"] == costs["efficient"]["state_bytes"] / 2
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "sgd" in capsys.readouterr().out
