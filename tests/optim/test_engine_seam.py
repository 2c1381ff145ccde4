"""An engine that keeps parameters and gradients itself drives the optimizer through its public seam alone."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import lorapro_hf
from lorapro_hf import LoRAProAdamW, create_lorapro_optimizer
from optimizer_helpers import backward, both_modes, small_model


class Masters:
    """Access to an engine's own copies of parameters and gradients."""

    group = None
    in_place = False

    def __init__(self, parameters: list[Any]) -> None:
        self.masters = {id(p): p.detach().clone() for p in parameters}
        self.raw: dict[int, torch.Tensor] = {}

    def dtype(self, parameter: Any) -> torch.dtype:
        return parameter.dtype

    def held(self, parameter: Any) -> torch.Tensor:
        return self.masters[id(parameter)]

    def gradients(self, parameters: Any) -> list[Any]:
        return [self.raw.get(id(p)) for p in parameters]

    def values(self, parameters: Any) -> list[torch.Tensor]:
        return [self.masters[id(p)] for p in parameters]

    def store(self, parameters: Any, values: Any) -> None:
        for parameter, value in zip(parameters, values, strict=True):
            self.masters[id(parameter)].copy_(value)


class Engine:
    """Shows the optimizer one group at a time, as DeepSpeed does, with tensors of its own in the parameters' places."""

    def __init__(self, model: Any, optimizer: LoRAProAdamW) -> None:
        self.model, self.optimizer = model, optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.access = Masters(self.parameters)
        self.of_pairs = [group for group in optimizer.param_groups if group["lora_pro_factors"]]
        self.others = [p for g in optimizer.param_groups if not g["lora_pro_factors"] for p in g["params"]]
        for group in optimizer.param_groups:
            group["params"] = [self.access.held(p) for p in group["params"]]
        optimizer.attach_engine(self.access, self.step_shown_groups)

    def step_shown_groups(self) -> None:
        for group in self.optimizer.param_groups:
            if group["lora_pro_factors"]:
                self.optimizer.step_pairs()
            else:
                self.optimizer.step_others([group])

    def step(self) -> None:
        self.access.raw = {id(p): p.grad.clone() for p in self.parameters}
        for parameter in self.others:
            self.access.held(parameter).grad = parameter.grad
        with self.optimizer.engine_step():
            whole = self.optimizer.param_groups
            for group in whole:
                self.optimizer.param_groups = [group]
                self.optimizer.step()
            self.optimizer.param_groups = whole
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.copy_(self.access.held(parameter))


def built(mode: str, engine: bool = True) -> tuple[Any, LoRAProAdamW, Any]:
    """A model, its optimizer, and the engine or optimizer that takes the steps."""
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.1, config={"mode": mode})
    return model, optimizer, Engine(model, optimizer) if engine else optimizer


def take(model: Any, optimizer: LoRAProAdamW, stepper: Any, steps: range, overflow: int = -1) -> None:
    for step in steps:
        backward(model, step)
        if step == overflow:
            optimizer.pairs[1].A.grad.fill_(float("inf"))
        stepper.step()


def assert_equal(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@both_modes
def test_an_engine_takes_the_steps_of_the_optimizer_to_the_bit(mode: str) -> None:
    plain, by_engine = built(mode, engine=False), built(mode)
    for each in (plain, by_engine):
        take(*each, range(4), overflow=2)
    assert_equal(trained(by_engine[0]), trained(plain[0]))
    assert_equal(by_engine[1].pair_state(), plain[1].pair_state())
    assert by_engine[1].skipped_steps == plain[1].skipped_steps == 1
    parameters = dict(plain[0].named_parameters())
    for name, parameter in by_engine[0].named_parameters():
        if any(parameter is other for other in by_engine[2].others):
            assert_equal(by_engine[1].state[by_engine[2].access.held(parameter)], plain[1].state[parameters[name]])


@both_modes
def test_what_an_engine_saves_goes_on_to_the_bit(mode: str) -> None:
    whole, resumed = built(mode), built(mode)
    take(*whole, range(3), overflow=1)
    saved = copy.deepcopy((whole[1].state_dict(), whole[1].pair_state(), whole[0].state_dict()))
    assert len(saved[0]["state"]) == len(whole[2].others)  # that of the pairs is apart
    take(*whole, range(3, 5))
    resumed[0].load_state_dict(saved[2])
    resumed[2].access.store(resumed[2].parameters, resumed[2].parameters)
    resumed[1].load_state_dict(saved[0])
    resumed[1].load_pair_state(saved[1].get)
    assert resumed[1].skipped_steps == 1
    take(*resumed, range(3, 5))
    assert_equal(trained(resumed[0]), trained(whole[0]))
    assert_equal(resumed[1].pair_state(), whole[1].pair_state())


def test_an_engine_refuses_the_state_of_another_mode() -> None:
    model, optimizer, engine = built("efficient")
    take(model, optimizer, engine, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of another optimizer, mode or model.*load_optimizer_states=False"):
        optimizer.load_state_dict(built("full")[1].state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_an_engine_refuses_a_limit_that_a_default_would_change() -> None:
    _, optimizer, _ = built("full")
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["trust_region"] = 0.2
    with pytest.raises(ValueError, match=r"was written with trust_region=0\.2.* Set trust_region=0\.2"):
        optimizer.load_state_dict(saved)


def test_pairs_step_within_a_step_alone_and_once() -> None:
    model, optimizer, _ = built("factored")
    with pytest.raises(RuntimeError, match=r"Call it within `with engine_step\(\):`"):
        optimizer.step_pairs()
    backward(model)
    optimizer.access.raw = {id(p): p.grad for pair in optimizer.pairs for p in (pair.A, pair.B)}  # type: ignore[union-attr]
    with optimizer.engine_step():
        optimizer.step_pairs()
        first = copy.deepcopy(optimizer.pair_state())
        optimizer.step_pairs()
        assert_equal(optimizer.pair_state(), first)


def test_a_closure_is_refused() -> None:
    _, optimizer, _ = built("full")
    with pytest.raises(RuntimeError, match=r"no closure under DeepSpeed.*engine\.backward\(loss\) and engine"):
        optimizer.step(lambda: pytest.fail("the closure ran"))


def liberties(source: str) -> list[str]:
    """Private attributes of our optimizer that a module reads, and attributes of it that the module sets."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return [
        ast.unparse(node)
        for node in nodes
        if ast.unparse(node.value) in ("optimizer", "self.optimizer")
        and (node.attr.startswith("_") or not isinstance(node.ctx, ast.Load))
    ]


def test_deepspeed_takes_no_liberties_with_the_optimizer() -> None:
    files = sorted((Path(lorapro_hf.__file__).parent / "deepspeed").glob("*.py"))
    assert len(files) >= 4
    assert {file.name: found for file in files if (found := liberties(file.read_text(encoding="utf-8")))} == {}
    taken = liberties("self.optimizer._settle()\noptimizer.state_dict = None\nengine.optimizer.step = 1")
    assert set(taken) == {"self.optimizer._settle", "optimizer.state_dict"}


def test_a_copy_knows_its_groups_before_its_first_step() -> None:
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    twin = copy.deepcopy(optimizer)
    expected = [optimizer.group_positions(pair) for pair in optimizer.pairs]
    assert [twin.group_positions(pair) for pair in twin.pairs] == expected
