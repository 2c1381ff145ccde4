"""Fused LoRA layers are PEFT's up to rounding, or leave the forward pass to PEFT, and trainings with them resume."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

import training
import zero_helpers
from grids import few_of, rest_slow
from killable import Nursery
from lora_layers import ALL_ROWS, ROWS, Net, Row, vectors
from lorapro_hf import (
    FusedLoRA,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    MGPOCallback,
    create_lorapro_optimizer,
    find_lora_pairs,
    fuse_lora_layers,
    unfuse_lora_layers,
    weight_gradients,
)
from lorapro_hf.functional.lora_orders import Order
from lorapro_hf.methods import fused_layers as module
from lorapro_hf.methods.fused_layers import FusedForward
from processes import run
from trainer_helpers import arguments, assert_same, build, factors, logged, tiny_lora

BY_NAME = {row.name: row for row in ALL_ROWS}
PLAIN, GPT2, QUANTISED = BY_NAME["linear"], BY_NAME["Conv1D of GPT-2"], BY_NAME["4-bit base"]
FUSED = [
    *("linear", "linear with rsLoRA", "Conv1D of GPT-2", "a block used twice"),
    *("linear with r = 1", "linear with r above the size of the weight"),
    *(pytest.param(f"{bits}-bit base", marks=pytest.mark.slow) for bits in (4, 8)),
]
KEPT = [row.name for row in ROWS if row.name not in {*FUSED[:6], "4-bit base", "8-bit base"}]


def pair_of(row: Row, criterion: str = "flops", **settings: Any) -> tuple[PeftModel, PeftModel, int]:
    """A model with PEFT's layers, a fused copy, and the number of fused layers."""
    torch.manual_seed(0)
    plain = row.build(**settings)
    fused = copy.deepcopy(plain)
    return plain, fused, fuse_lora_layers(fused, criterion)


def outcome(model: nn.Module, row: Row) -> dict[str, torch.Tensor]:
    """The output and the gradients of all trained parameters."""
    model.zero_grad()
    row.loss(model).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "output": row.output(model).detach()}


def assert_alike(plain: nn.Module, fused: nn.Module, row: Row, tolerance: float = 1e-12) -> None:
    expected = outcome(plain, row)
    assert_same(outcome(fused, row), expected, rtol=tolerance, atol=tolerance)


def body(model: Any) -> Any:
    return model.base_model.model.body


@pytest.mark.parametrize("criterion", ["flops", pytest.param("time", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUSED)
def test_output_and_gradients_are_those_of_peft(name: str, criterion: str):
    row = BY_NAME[name]
    plain, fused, count = pair_of(row, criterion)
    assert count == 1
    assert_alike(plain, fused, row, 1e-12 if row.dtype == torch.float64 else 1e-5)
    body(fused).set_scale("default", -2.5)
    body(plain).set_scale("default", -2.5)
    assert_alike(plain, fused, row, 1e-12 if row.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("row", [PLAIN, GPT2], ids=["linear", "Conv1D"])
def test_trained_bias(row: Row, bias: str):
    plain, fused, _ = pair_of(row, bias=bias)
    assert "bias" in str(outcome(fused, row).keys())
    assert_alike(plain, fused, row)


def with_input_gradient(model: nn.Module, row: Row) -> torch.Tensor:
    torch.manual_seed(1)
    x = row.inputs().to(row.dtype).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("frozen", ["A", "B", "AB"])
def test_frozen_factors(frozen: str):
    plain, fused, _ = pair_of(PLAIN)
    for model in (plain, fused):
        for letter in frozen:
            getattr(body(model), f"lora_{letter}")["default"].weight.requires_grad_(False)
    torch.testing.assert_close(with_input_gradient(fused, PLAIN), with_input_gradient(plain, PLAIN))
    assert_same(
        {n: p.grad for n, p in fused.named_parameters() if p.grad is not None} or {"": torch.ones(1)},
        {n: p.grad for n, p in plain.named_parameters() if p.grad is not None} or {"": torch.ones(1)},
        rtol=1e-12,
        atol=1e-12,
    )


# Where PEFT's own forward pass takes over


def calls_of_peft(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Gets an entry for each call of PEFT's forward pass."""
    calls: list[bool] = []
    own = FusedForward.of_peft

    def watched(self: FusedForward, *args: Any, **kwargs: Any) -> Any:
        calls.append(True)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(FusedForward, "of_peft", watched)
    return calls


@pytest.mark.parametrize("name", rest_slow(KEPT, fast=4))
def test_other_layers_keep_the_forward_pass(name: str, caplog: pytest.LogCaptureFixture):
    row = BY_NAME[name]
    with caplog.at_level(logging.INFO, "lorapro_hf"):
        plain, fused, count = pair_of(row)
    assert count == 0 and "Layers that keep PEFT's forward pass: " in caplog.text
    assert_same(outcome(fused, row), outcome(plain, row))


def hooked(model: Any) -> None:
    body(model).lora_A["default"].register_forward_pre_hook(lambda *_: None)


def second_adapter(model: Any) -> None:
    torch.manual_seed(3)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["body"], init_lora_weights=False))
    model.double()
    model.base_model.set_adapter(["default", "second"])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disabled adapters": lambda model: model.base_model.disable_adapter_layers(),
    "merged adapters": lambda model: model.merge_adapter(),
    "no or several active adapters": second_adapter,
    "hooks on lora_A or lora_B, as of ZeRO-3": hooked,
    "another module than nn.Dropout before lora_A, or hooks on it": lambda model: body(model).lora_dropout.update(
        {"default": nn.Tanh()}
    ),
    "casts of inputs turned off": lambda model: setattr(body(model), "cast_input_dtype_enabled", False),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_changes_later_is_seen(reason: str, monkeypatch: pytest.MonkeyPatch):
    plain, fused, count = pair_of(PLAIN)
    calls = calls_of_peft(fused, monkeypatch)
    row_output = PLAIN.output(fused)
    assert count == 1 and not calls and row_output.requires_grad
    for model in (plain, fused):
        CHANGES[reason](model)
    torch.testing.assert_close(PLAIN.output(fused), PLAIN.output(plain), rtol=0, atol=0)
    assert calls and module.obstacle(body(fused)) == reason
    assert fuse_lora_layers(fused) == 0


def test_what_changes_back_is_seen_too(monkeypatch: pytest.MonkeyPatch):
    plain, fused, _ = pair_of(PLAIN)
    calls = calls_of_peft(fused, monkeypatch)
    fused.merge_adapter()
    PLAIN.output(fused)
    fused.unmerge_adapter()
    with fused.disable_adapter():
        PLAIN.output(fused)
    assert len(calls) == 2
    torch.testing.assert_close(PLAIN.output(fused), PLAIN.output(plain))
    assert len(calls) == 2


def test_another_active_adapter_is_read():
    plain, fused, _ = pair_of(PLAIN)
    for model in (plain, fused):
        second_adapter(model)
        model.set_adapter("second")
    assert_alike(plain, fused, PLAIN)
    assert fuse_lora_layers(fused) == 1


def test_dropout_is_peft_s_in_training_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "lorapro_hf"):
        plain, fused, count = pair_of(PLAIN, lora_dropout=0.5)
    assert count == 0 and "1 with dropout in training" in caplog.text
    calls = calls_of_peft(fused, monkeypatch)
    assert_same(outcome(fused, PLAIN), outcome(plain, PLAIN))
    assert len(calls) == 2
    assert_alike(plain.eval(), fused.eval(), PLAIN)
    assert len(calls) == 2


BASES: dict[str, Callable[[Any], Any]] = {
    "hooks": lambda base: base.register_forward_hook(lambda layer, args, out: 3 * out),
    "a trained weight": lambda base: base.weight.requires_grad_(),
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_with_more_than_a_frozen_weight_is_called(name: str, monkeypatch: pytest.MonkeyPatch):
    plain, fused, _ = pair_of(PLAIN)
    calls = calls_of_peft(fused, monkeypatch)
    for model in (plain, fused):
        BASES[name](body(model).base_layer)
    assert_alike(plain, fused, PLAIN)
    assert not calls and fuse_lora_layers(fused) == 1


def test_adapter_names_of_mixed_batches():
    plain, fused, _ = pair_of(PLAIN)
    names = ["default", "__base__"] * 4 + ["default"]
    x = vectors().double()
    for model in (plain, fused):
        model.eval()
    torch.testing.assert_close(body(fused)(x, adapter_names=names), body(plain)(x, adapter_names=names), rtol=0, atol=0)


# The model stays as it is


def test_unfused_layers_are_as_before():
    plain, fused, _ = pair_of(PLAIN)
    before = [vars(layer).keys() for layer in plain.modules()]
    assert fuse_lora_layers(fused, "time") == 1  # once more, by another criterion
    unfuse_lora_layers(fused)
    assert [vars(layer).keys() for layer in fused.modules()] == before
    assert_same(outcome(fused, PLAIN), outcome(plain, PLAIN))
    with pytest.raises(ValueError, match=r"no fused layer. Call fuse_lora_layers\(model\) first"):
        unfuse_lora_layers(fused)


def test_hooks_of_accelerate_before_and_after(caplog: pytest.LogCaptureFixture):
    plain, fused, _ = pair_of(PLAIN)
    add_hook_to_module(body(fused), ModelHook())
    assert_alike(plain, fused, PLAIN)
    unfuse_lora_layers(fused)
    assert_same(outcome(fused, PLAIN), outcome(plain, PLAIN))
    assert fuse_lora_layers(fused) == 0 and "a forward pass that another library has replaced" in caplog.text


def test_copies_and_pickles_are_fused_and_their_own():
    plain, fused, _ = pair_of(PLAIN)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert body(other).forward.layer is body(other)
        with torch.no_grad():
            body(other).lora_A["default"].weight.zero_()
        assert not torch.equal(PLAIN.output(other), PLAIN.output(fused))
    assert_alike(plain, fused, PLAIN)


def test_names_and_saved_adapter_are_those_of_peft(tmp_path: Path):
    plain, fused, _ = pair_of(PLAIN)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [type(each) for each in fused.modules()] == [type(each) for each in plain.modules()]
    assert_same(fused.state_dict(), plain.state_dict())
    for model, name in ((plain, "plain"), (fused, "fused")):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "fused")]
    assert_same(files[1], files[0])
    torch.testing.assert_close(
        PLAIN.output(fused.merge_and_unload()), PLAIN.output(plain.merge_and_unload()), rtol=0, atol=0
    )


# Precision, checkpoints, compilers


@few_of(dtype=[torch.bfloat16, torch.float16], widens=[True, False], base=[torch.float32, torch.bfloat16])
def test_autocast_and_mixed_dtypes(monkeypatch, dtype, widens, base):
    monkeypatch.setattr("lorapro_hf.functional.fused_linear._WIDENS", widens)
    torch.manual_seed(0)
    plain = get_peft_model(
        Net(nn.Linear(64, 48)).to(base), LoraConfig(r=8, target_modules=["body"], init_lora_weights=False)
    )
    fused = copy.deepcopy(plain)
    assert fuse_lora_layers(fused) == 1
    x = torch.randn(5, 9, 64).to(base)
    for is_cast in (True, False):
        found = []
        for model in (plain, fused):
            model.zero_grad()
            own = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=dtype, enabled=is_cast):
                out = body(model)(own)
            out.float().square().sum().backward()
            of_factors = [p.grad for p in model.parameters() if p.requires_grad]
            found.append([out, own.grad, *of_factors])
        for one, other in zip(*found, strict=True):
            assert one.dtype == other.dtype
            assert (one.float() - other.float()).norm() <= 0.01 * other.float().norm()
        assert out.dtype == (dtype if is_cast else base)


class Twice(nn.Module):
    """A block that is checkpointed, and whose layer is used twice."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.body, self.use_reentrant = nn.Linear(6, 6), use_reentrant

    def forward(self, x):
        def block(x: torch.Tensor) -> torch.Tensor:
            return self.body(torch.tanh(self.body(x)))

        if self.use_reentrant is None:
            return block(x)
        return checkpoint(block, x.requires_grad_(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("criterion", ["flops", "time"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool, criterion: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_fastest", {})
    row = Row("checkpointed", lambda: Twice(use_reentrant))
    _, fused, count = pair_of(row, criterion)
    plain, _, _ = pair_of(Row("plain", lambda: Twice(None)))
    assert count == 1
    assert_alike(plain, fused, row)


def test_no_grad_and_inference_mode():
    plain, fused, _ = pair_of(PLAIN, "time")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(PLAIN.output(fused), PLAIN.output(plain))


@pytest.mark.slow
@pytest.mark.parametrize("row", [PLAIN, GPT2], ids=["linear", "Conv1D"])
def test_compiled_without_a_break(row: Row):
    plain, fused, _ = pair_of(row, "time")
    torch._dynamo.reset()
    compiled: Any = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = outcome(plain, row)
    row.loss(compiled).backward()
    for name, parameter in fused.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_time_measures_a_shape_once_and_may_leave_a_layer_to_peft(monkeypatch: pytest.MonkeyPatch):
    measured: list[Any] = []

    def fake(tensors: Any, scaling: float, precision: Any, needed: Any, separate: Any) -> Order | None:
        measured.append(needed)
        torch.testing.assert_close(separate(tensors.x), separate(tensors.x))
        return None if len(measured) == 1 else Order(True, True)

    monkeypatch.setattr(module, "fastest_order", fake)
    monkeypatch.setattr(module, "_fastest", {})
    plain, fused, _ = pair_of(PLAIN, "time")
    calls = calls_of_peft(fused, monkeypatch)
    for _ in range(3):
        assert_same(outcome(fused, PLAIN), outcome(plain, PLAIN))
    assert len(measured) == 1 and len(calls) > 2
    body(fused).lora_A["default"].weight.requires_grad_(False)
    body(plain).lora_A["default"].weight.requires_grad_(False)
    assert_alike(plain, fused, PLAIN)
    assert [needed.A for needed in measured] == [True, False]


def test_a_shape_that_would_take_more_is_left_to_peft(monkeypatch: pytest.MonkeyPatch):
    model = get_peft_model(Net(nn.Linear(96, 36)), LoraConfig(r=8, target_modules=["body"]))
    assert fuse_lora_layers(model) == 1
    calls = calls_of_peft(model, monkeypatch)
    for tokens in (32, 320):
        model(torch.randn(tokens, 96, requires_grad=True))
    assert len(calls) == 1


# Beside the rest of the package


def test_gradients_of_frozen_weights():
    plain, fused, _ = pair_of(PLAIN)
    found = [
        [gradient for _, gradient in weight_gradients(model, [0], lambda model, _: PLAIN.loss(model))]
        for model in (plain, fused)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def stepped(rank: int, ranks: int, kind: str, is_fused: bool) -> dict[str, torch.Tensor]:
    """Three steps of LoRA-Pro on equal shares of a batch."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)),
        LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False),
    ).double()
    assert not is_fused or fuse_lora_layers(model) == 2
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp2":
        fully_shard(model)
    elif kind == "fsdp2 of layers":
        fully_shard(model.base_model.model[0])
        fully_shard(model)
    optimizer = create_lorapro_optimizer(model, lr=1e-2)
    for step in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).double().chunk(ranks)[rank]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    whole = (getattr(p, "full_tensor", lambda p=p: p) for p in model.parameters() if p.requires_grad)
    return {str(index): read().detach().clone() for index, read in enumerate(whole)}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", rest_slow(["ddp", "fsdp2", "fsdp2 of layers"]))
def test_two_ranks_step_as_one(kind: str, tmp_path: Path):
    alone = stepped(0, 1, "alone", is_fused=False)
    for of_rank in run(stepped, 2, tmp_path, kind, True):
        assert_same(of_rank, alone, rtol=1e-9, atol=1e-10)


def under_zero(rank: int, ranks: int, stage: int) -> dict[str, torch.Tensor]:
    """The parameters after a training with PEFT's layers and one with layers that were fused before."""
    found: dict[str, torch.Tensor] = {}
    for is_fused in (False, True):
        model = training.build(torch.float32)
        optimizer = training.make_optimizer(model, {"mode": "efficient"})
        layers = fuse_lora_layers(model) if is_fused else 0
        engine = zero_helpers.engine_of(model, optimizer, stage=stage)
        taken = [module.obstacle(layer) for layer in engine.module.modules() if "forward" in vars(layer)]
        assert len(taken) == layers and all((reason is not None) is (stage == 3) for reason in taken)
        zero_helpers.train(engine, rank, ranks)
        found |= {f"{is_fused}.{name}": value for name, value in zero_helpers.result(engine).items()}
        engine.destroy()
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage: int, tmp_path: Path):
    pytest.importorskip("deepspeed")
    found = zero_helpers.run(under_zero, 2, tmp_path, stage)[0]
    plain, fused = (
        {name.split(".", 1)[1]: value for name, value in found.items() if name.startswith(str(kind))}
        for kind in (False, True)
    )
    assert_same(fused, plain, rtol=1e-4, atol=1e-5)


# Trainings


def trainer_of(folder: Path, model: Any = None, **settings: Any) -> Any:
    saves = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    args = arguments(folder, LoRAProTrainingArguments, **{**saves, "fuse_lora": True, **settings})
    return build(LoRAProTrainer, args, model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder)
    trainer.train()
    return folder, trainer


def test_a_training_is_that_of_plain_layers(whole: tuple[Path, Any], tmp_path: Path):
    _, trainer = whole
    plain = trainer_of(tmp_path, fuse_lora=False)
    plain.train()
    torch.testing.assert_close(logged(trainer, "loss"), logged(plain, "loss"), rtol=1e-5, atol=0)
    assert_same(factors(trainer), factors(plain), rtol=1e-2, atol=1e-4)
    assert sum("forward" in vars(layer) for layer in trainer.model.modules()) == 14
    assert "fused" in trainer._hyperparameters()["forward pass of LoRA layers"]  # of the model card


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"mgpo_rho": 0.05},
        {"booster_steps": 1},
        {"lora_pro": False, "lora_pro_init": "lora_sb_fixed", "learning_rate": 1e-3},
        {"lora_pro_mode": "full", "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_training_with_other_methods(settings: dict[str, Any], tmp_path: Path):
    starts = {"lora_pro_init_samples": 4} if "lora_pro_init" in settings else {}
    found = []
    for is_fused in (False, True):
        model = tiny_lora(init_lora_weights=True, **({"r": 1} if "booster_steps" in settings else {}))
        for pair in find_lora_pairs(model) if starts else ():
            pair.B.data.zero_()
        trainer = trainer_of(tmp_path, model, fuse_lora=is_fused, max_steps=2, save_strategy="no", **starts, **settings)
        trainer.train()
        found.append(logged(trainer, "loss"))
        assert any("forward" in vars(layer) for layer in trainer.model.modules()) is is_fused
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["weight", "factors"])
def test_a_change_of_mgpo_is_computed(target: str):
    """Its hooks add to a layer's output or put other factors in the place of A and B."""
    outputs = []
    for model in pair_of(PLAIN)[:2]:
        method = MGPOCallback(0.5, target=target)
        method.before_training(model, None)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in (1, 2):
            optimizer.zero_grad()
            with method.forward_context():
                PLAIN.loss(model).backward()
            method.before_step(optimizer)
            optimizer.step()
            method.after_step(optimizer, step)
        with method.forward_context():
            outputs.append(PLAIN.output(model).detach())
        assert (outputs[-1] - PLAIN.output(model)).norm() > 1e-3
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


def test_a_training_resumes_to_the_bit_and_without_fused_layers(whole: tuple[Path, Any], tmp_path: Path):
    folder, trainer = whole
    resumed, unfused = trainer_of(tmp_path), trainer_of(tmp_path, fuse_lora=False)
    for each in (resumed, unfused):
        each.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_same(factors(resumed), factors(trainer))
    assert_same(factors(unfused), factors(trainer), rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("settings", [{"lora_pro_mode": "efficient"}, {"lora_pro_mode": "full"}], ids=str)
def test_a_killed_training_resumes_to_the_bit(tmp_path: Path, nursery: Nursery, settings: dict[str, Any]):
    job = {"settings": {**settings, "fuse_lora": True}, "dropout": 0.0}
    (expected,) = nursery.finish(tmp_path / "whole", **job)
    assert nursery.run(tmp_path / "killed", kill={"when": "gradients", "step": 5}, **job) == [-9]
    (found,) = nursery.finish(tmp_path / "killed", resume=True, **job)
    for part in ("parameters", "state"):
        assert_same(found[part], expected[part])


def test_bad_input_is_refused_with_a_remedy(tmp_path: Path):
    plain, _, _ = pair_of(PLAIN)
    with pytest.raises(ValueError, match="criterion='speed' is unknown; valid values are 'flops', 'time'"):
        fuse_lora_layers(plain, "speed")
    with pytest.raises(ValueError, match="criterion='speed' is unknown"):
        FusedLoRA("speed")
    with pytest.raises(TypeError, match="takes a model with LoRA layers, not a NoneType"):
        fuse_lora_layers(None)
    with pytest.raises(ValueError, match=r"Net has no LoRA layer to fuse. Call fuse_lora_layers\(model\) after"):
        fuse_lora_layers(PLAIN.model())
    with pytest.raises(ValueError, match=r"do not run under nn.DataParallel.*torchrun"):
        fuse_lora_layers(nn.DataParallel(plain))
    with pytest.raises(ValueError, match=r"fuse_lora='yes' must be true or false"):
        trainer_of(tmp_path, fuse_lora="yes")
    with pytest.raises(ValueError, match=r"no LoRA layer can be fused \(14 with dropout in training\).*lora_dropout=0"):
        trainer_of(tmp_path, tiny_lora(lora_dropout=0.1)).train()
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False, fuse_lora=True)
    with pytest.raises(ValueError, match=r"Trainer does not read fuse_lora=True.*call fuse_lora_layers\(model\)"):
        build(Trainer, args).train()
    trainer = trainer_of(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"do not run under nn.DataParallel"):
        trainer.lora_methods[0].on_train_begin(trainer.args, trainer.state, trainer.control)
