"""Factors in bfloat16 and float16 that are stepped in float32 master copies."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser

from grids import rest_slow
from lora_layers import ROWS
from lorapro_hf import LoRAProAdamW, LoRAProCallback, LoRAProConfig, LoRAProTrainingArguments, find_lora_pairs
from lorapro_hf.commands.bench.probes import memory_of
from lorapro_hf.config import MODES
from lorapro_hf.factors.stacks import Stack
from lorapro_hf.functional import reference
from lorapro_hf.optim import memory
from lorapro_hf.optim.memory import StateTooLargeError, require_state_fits, scratch_bytes, state_bytes_by_device
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.stack_state import StackState
from optimizer_helpers import reloaded

BY_NAME = {row.name: row for row in ROWS}
LR, DECAY, STEPS = 1e-4, 0.5, 40
CONFIGS = [
    *({"mode": mode} for mode in MODES if mode != "rite"),
    {"mode": "rite", "rite_clip": 0.0, "rite_skip": 0.0},  # a limit would tie the pairs together
    {"mode": "full", "update": "sequential"},
    {"mode": "factored", "update": "linear"},
    {"mode": "full", "moments_dtype": "bfloat16"},
    {"mode": "efficient", "update": "sequential"},
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, config.values())))
# Every third pair has no gradient now and then.
TURNS = [(1, 2), (2,), (0, 1, 2), (0, 1), (0, 1, 2)]


def several(name="linear", count=3, dtype=torch.bfloat16):
    return [pair for _ in range(count) for pair in find_lora_pairs(BY_NAME[name].build().to(dtype))]


def optimizer_of(pairs, lr=LR, **config):
    parameters = [factor for pair in pairs for factor in (pair.A, pair.B)]
    settings = LoRAProConfig(**{"master_factors": True, **config})
    return LoRAProAdamW(parameters, pairs, lr=lr, weight_decay=DECAY, config=settings)


def give_random(pairs, turn=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for index, pair in enumerate(pairs):
        for factor in (pair.A, pair.B):
            gradient = torch.randn(factor.shape, generator=generator).to(factor)
            factor.grad = gradient if turn is None or index in turn else None


def kept(optimizer):
    """Copies of all parameters and all state."""
    parameters = [factor for pair in optimizer.pairs for factor in (pair.A, pair.B)]
    return [
        tensor.detach().clone()
        for parameter in parameters
        for tensor in (parameter, *(value for _, value in sorted(optimizer.state[parameter].items())))
    ]


def assert_same(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


class Oracle:
    """In float64: the gradient is projected at the rounded factors, and its step is taken by the exact ones."""

    def __init__(self, pair, mode, update=None, **_):
        self.scaling, self.mode, self.update, self.t = pair.scaling, mode, update, 0
        self.A, self.B = pair.A.detach().double(), pair.B.detach().double()
        self.M = self.V = torch.zeros(len(self.B), self.A.shape[1], dtype=torch.float64)
        options = {"lr": LR, "weight_decay": DECAY}
        if mode == "rite":
            self.dense = reference.DenseRite(self.A, self.B, self.scaling, clip=0, skip=0, **options)
        else:
            kind = reference.DenseSpectral if mode == "spectral" else reference.DenseFactoredAdamW
            self.dense = kind(self.A, self.B, self.scaling, update=update or "linear", **options)
        self.parameters = [self.A.clone().requires_grad_(), self.B.clone().requires_grad_()]
        self.adamw = torch.optim.AdamW(self.parameters, **options)

    def step(self, g, A, B):
        """`A` and `B` are the parameters."""
        if self.mode == "efficient":
            A, B = A.detach().double(), B.detach().double()
            self.parameters[0].grad, self.parameters[1].grad = self.scaling * B.mT @ g, self.scaling * g @ A.mT
            before = self.A, self.B
            self.adamw.step()
            self.A, self.B = (parameter.detach().clone() for parameter in self.parameters)
            kept_A, kept_B = ((1 - LR * DECAY) * factor for factor in before)
            change = reference.lengthened(self.A - kept_A, before[1], LR)
            if self.update == "sequential":
                change = reference.change_through(change, kept_B, self.B)
            self.A = kept_A + change
            self.parameters[0].data = self.A.clone()
            return
        projected = reference.projected_gradient(g, A, B)
        if self.mode in ("factored", "spectral", "rite"):
            self.dense.step(projected)
            self.A, self.B = self.dense.A, self.dense.B
            return
        self.t += 1
        self.M, self.V = 0.9 * self.M + 0.1 * projected, 0.999 * self.V + 0.001 * projected**2
        u = (self.M / (1 - 0.9**self.t)) / ((self.V / (1 - 0.999**self.t)).sqrt() + 1e-8)
        A, B = ((1 - LR * DECAY) ** 0.5 * factor for factor in (self.A, self.B))
        if self.update == "sequential":
            self.A, self.B = reference.sequential_step(u, A, B, self.scaling, LR)
        else:
            h_A, h_B = reference.factor_gradients(u, self.A, self.B, self.scaling)
            self.A, self.B = A - LR * h_A, B - LR * h_B


@pytest.mark.parametrize("dtype", rest_slow([torch.bfloat16, torch.float16]), ids=str)
@pytest.mark.parametrize(
    "config",
    rest_slow(
        [
            {"mode": "full"},
            {"mode": "factored"},
            {"mode": "rite", "rite_clip": 0.0, "rite_skip": 0.0},
            {"mode": "spectral"},
            {"mode": "efficient"},
            {"mode": "full", "update": "sequential"},
            {"mode": "factored", "update": "linear"},
            {"mode": "efficient", "update": "sequential"},
        ],
        fast=3,
    ),
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_small_steps_add_up_as_in_float64(config, dtype):
    pairs = several(dtype=dtype)
    frozen = copy.deepcopy(pairs)
    optimizer, nearest = optimizer_of(pairs, **config), optimizer_of(frozen, master_factors=False, **config)
    oracles = [Oracle(pair, **config) for pair in pairs]
    starts = [(oracle.A, oracle.B) for oracle in oracles]
    gradients = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for _ in range(STEPS):
        for index, (pair, rounded, oracle) in enumerate(zip(pairs, frozen, oracles, strict=True)):
            g = gradients[index] + 0.1 * torch.randn(5, 6, dtype=torch.float64)
            A, B = pair.A.detach().double(), pair.B.detach().double()
            oracle.step(g, A, B)
            for each in (pair, rounded):
                each.A.grad = (pair.scaling * B.T @ g).to(dtype)
                each.B.grad = (pair.scaling * g @ A.T).to(dtype)
        optimizer.step()
        nearest.step()
    for pair, rounded, oracle, start in zip(pairs, frozen, oracles, starts, strict=True):
        for letter, before in zip("AB", start, strict=True):
            factor, expected = getattr(pair, letter), getattr(oracle, letter)
            master, moved = optimizer.state[factor]["master"].double(), (expected - before).norm()
            assert master.dtype == torch.float64 and torch.equal(factor, master.to(dtype))
            assert (master - expected).norm() <= 0.05 * moved, (letter, (master - expected).norm() / moved)
            if dtype == torch.bfloat16:  # and without masters most of it is lost
                assert (getattr(rounded, letter).detach().double() - expected).norm() >= 0.3 * moved, letter


@each_config
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        pytest.param("experts (in, out)", marks=pytest.mark.slow),
        "Conv2d with groups",
        pytest.param("embedding", marks=pytest.mark.slow),
    ],
)
def test_a_stack_steps_as_its_pairs_do_alone(config, name):
    together = several(name)
    alone = copy.deepcopy(together)
    optimizer, each = optimizer_of(together, **config), [optimizer_of([pair], **config) for pair in alone]
    for seed, turn in enumerate(TURNS):
        give_random(together, turn, seed)
        give_random(alone, turn, seed)
        for index in turn:
            each[index].step()
        optimizer.step()
    assert len(optimizer._stacks) == 1
    for index, (one, two) in enumerate(zip(together, alone, strict=True)):
        for first, second in ((one.A, two.A), (one.B, two.B)):
            master = optimizer.state[first]["master"]
            assert master.dtype == torch.float32 and master.shape == first.shape
            assert torch.equal(first, master.bfloat16())
            torch.testing.assert_close(master, each[index].state[second]["master"], rtol=1e-4, atol=1e-6)


@each_config
def test_a_skipped_step_changes_nothing(config):
    pairs = several()
    optimizer = optimizer_of(pairs, **config)
    for seed in range(3):
        give_random(pairs, seed=seed)
        optimizer.step()
    before = kept(optimizer)
    give_random(pairs)
    pairs[1].B.grad[0, 0] = float("inf")
    optimizer.step()
    assert_same(before, kept(optimizer))
    assert optimizer.skipped_steps == 1


@each_config
def test_resume_equals_uninterrupted_to_the_bit(config):
    straight = several("experts (in, out)", 2) + several(count=2)
    optimizer = optimizer_of(straight, **config)
    for seed in range(3):
        give_random(straight, seed=seed)
        optimizer.step()
    resumed = copy.deepcopy(straight)
    again = optimizer_of(resumed, **config)
    again.load_state_dict(reloaded(optimizer.state_dict()))
    for pairs, own in ((straight, optimizer), (resumed, again)):
        for seed in range(3, 6):
            give_random(pairs, seed=seed)
            own.step()
    assert_same(kept(optimizer), kept(again))


@pytest.mark.parametrize("mode", MODES[:1] + MODES[2:])
def test_a_parameter_changed_from_outside_is_where_the_next_step_starts(mode):
    pairs = several()
    optimizer = optimizer_of(pairs, mode=mode)
    for seed in range(3):
        give_random(pairs, seed=seed)
        optimizer.step()
    # As loading an adapter does; the other pairs keep what their parameters cannot show.
    with torch.no_grad():
        pairs[1].A.copy_(torch.randn_like(pairs[1].A))
    before = [optimizer.state[pair.B]["master"].clone() for pair in pairs]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    give_random(pairs)
    optimizer.step()
    assert torch.equal(optimizer.state[pairs[1].A]["master"], pairs[1].A.float())
    for pair, master in zip(pairs, before, strict=True):
        assert torch.equal(optimizer.state[pair.B]["master"], master)
        assert not torch.equal(master, pair.B.float())


def test_only_narrow_factors_have_masters():
    wide, narrow, mixed = several(count=1, dtype=torch.float32), several(count=1), several(count=1)
    mixed[0].A.data = mixed[0].A.data.float()
    pairs = [*wide, *narrow, *mixed]
    optimizer = optimizer_of(pairs)
    give_random(pairs)
    optimizer.step()
    owners = [pair.A for pair in pairs] + [pair.B for pair in pairs]
    assert ["master" in optimizer.state[factor] for factor in owners] == [False, True, False, False, True, True]
    measured = sum(
        value.nbytes for state in optimizer.state.values() for name, value in state.items() if name != "step"
    )
    assert state_bytes_by_device(pairs, optimizer.config) == {torch.device("cpu"): measured}
    without = state_bytes_by_device(pairs, LoRAProConfig())[torch.device("cpu")]
    assert measured - without == 4 * (narrow[0].A.numel() + narrow[0].B.numel() + mixed[0].B.numel())


@pytest.mark.parametrize("update", ["sequential", "linear"])
def test_factors_of_two_dtypes_are_rounded_before_what_follows_from_them(update):
    """Without masters: B in bfloat16 beside an A in float32, and a moment that has to fit the B that is stored."""
    (pair,) = several(count=1)
    pair.A.data = pair.A.data.float()
    optimizer = optimizer_of([pair], 0.05, mode="factored", update=update, master_factors=False)
    for seed in range(3):
        give_random([pair], seed=seed)
        optimizer.step()
    moment, B = optimizer.state[pair.B]["exp_avg"], pair.B.detach().float()
    assert moment.norm() > 0.1 and pair.B.dtype == torch.bfloat16
    assert (B.mT @ moment).norm() < 1e-5 * moment.norm() * B.norm()


def test_checkpoints_with_and_without_masters_are_told_apart():
    saved = {}
    for masters in (True, False):
        pairs = several()
        optimizer = optimizer_of(pairs, mode="efficient", master_factors=masters)
        give_random(pairs)
        optimizer.step()
        saved[masters] = optimizer, optimizer.state_dict()
    names = {True: "'efficient' with master factors", False: "'efficient'"}
    for masters, (optimizer, _) in saved.items():
        before = kept(optimizer)
        message = f"is of LoRA-Pro mode {names[not masters]}, but this optimizer has LoRA-Pro mode {names[masters]}. "
        with pytest.raises(ValueError, match=message + ".*start a new training from the saved adapter"):
            optimizer.load_state_dict(saved[not masters][1])
        assert_same(before, kept(optimizer))


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="master_factors='yes' is unknown; valid values are True, False"):
        LoRAProConfig(master_factors="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"master_factors.*your optimizer.*LoRAProTrainer"):
        LoRAProCallback({"master_factors": True})
    pairs = several()
    stand_ins = [(pair.A.detach().float(), pair.B.detach().float()) for pair in pairs]
    with pytest.raises(ValueError, match=r"engine keeps float32 masters.*Leave master_factors out"):
        StackState(Stack(pairs, factors=stand_ins), rule_of(LoRAProConfig(master_factors=True)).specs(pairs[0]))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    message = r"mode='full' with master_factors=True, with a step's working memory, needs.*No mode fits; the smallest, "
    with pytest.raises(
        StateTooLargeError, match=message + r"'spectral' with master_factors=True.*leave out master_fac"
    ):
        require_state_fits(pairs, LoRAProConfig(mode="full", master_factors=True))


@pytest.mark.parametrize("mode", ["full", "factored", "spectral", "rite", "efficient"])
@pytest.mark.usefixtures("torch_steps")
def test_working_memory_is_allowed_for(mode):
    layers = nn.ModuleDict({f"layer{i}": nn.Linear(300, 260, bias=False) for i in range(6)})
    settings = LoraConfig(r=4, target_modules=list(layers), init_lora_weights=False)
    pairs = find_lora_pairs(get_peft_model(layers, settings).bfloat16())
    optimizer = optimizer_of(pairs, mode=mode)
    for seed in range(2):
        give_random(pairs, seed=seed)
        optimizer.step()
    allowed = sum(scratch_bytes(pairs, LoRAProConfig(mode=mode, master_factors=True)).values())
    assert allowed / 20 < memory_of(optimizer.step, torch.device("cpu")).peak <= allowed


def test_arguments():
    words = "--output_dir", "unused"
    parser = HfArgumentParser(LoRAProTrainingArguments)
    for more, expected in (((), False), (("--lora_pro_master_factors",), True)):
        (args,) = parser.parse_args_into_dataclasses([*words, *more])
        assert args.lora_pro_config == LoRAProConfig(master_factors=expected)
    with pytest.raises(ValueError, match="lora_pro_master_factors='yes' must be true or false"):
        LoRAProTrainingArguments(output_dir="unused", lora_pro_master_factors="yes")  # type: ignore[arg-type]


@pytest.mark.slow
def test_comparison_with_other_ways_runs(tmp_path, capsys):
    """The script behind the tables of docs/precision.md."""
    path = Path(__file__).parents[2] / "benchmarks" / "narrow_factors.py"
    spec = importlib.util.spec_from_file_location("narrow_factors", path)
    module = sys.modules["narrow_factors"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HELD_OUT = 1
    try:
        module.main(["--quick", "--output", str(tmp_path / "tables.md")])
    finally:
        del sys.modules["narrow_factors"]
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    rows = [line for line in text.splitlines() if line.startswith(("| full", "| efficient", "| factored"))]
    assert len(rows) == 12 and "nan" not in text
