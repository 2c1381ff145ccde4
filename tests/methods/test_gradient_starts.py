"""A start from gradients is the truncated decomposition of autograd's gradient, for every kind of layer."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, default_data_collator

import lorapro_hf
from lora_layers import ALL_ROWS
from lorapro_hf import (
    FusedLoRA,
    GradientStart,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    find_lora_pairs,
    init_from_gradients,
)
from lorapro_hf.methods import base
from lorapro_hf.methods.gradient_starts import first_batches
from processes import run
from trainer_helpers import arguments, assert_same, build, logged, tiny_base
from weight_oracle import of_autograd

ROWS = {row.name: row for row in ALL_ROWS if set(row.settings) <= set(LoraConfig.__dataclass_fields__)}
IN_DEFAULT_RUN = ("linear with rsLoRA", "Conv1D of GPT-2", "embedding", "Conv2d", "experts (in, out)")
SLOW = ("linear", "Conv2d of kernel 1", "Conv1d", "Conv3d", "experts (out, in)", "two expert parameters of one module")
LAYERS = [*IN_DEFAULT_RUN, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name in ROWS)]


def fresh(name: str, **settings):
    torch.manual_seed(0)
    return ROWS[name].build(init_lora_weights=True, **settings)


def truncated(step: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vt = torch.linalg.svd(step, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vt[..., :rank, :]


def expected_change(gradient: torch.Tensor, rank: int, method: str, step_size: float | None) -> torch.Tensor:
    """In float64: `−c G` or `−c sign(G)`, truncated."""
    step = -gradient if method == "lora_one" else -gradient.sign()
    if method == "lora_one" or step_size is None:
        step = step * (step_size or 0.03) / torch.linalg.matrix_norm(step, 2)[..., None, None]
    else:
        step = step * step_size
    return truncated(step, rank)


def change_of(pair) -> torch.Tensor:
    A, B = pair.matrix_A(pair.A.detach()), pair.matrix_B(pair.B.detach())
    return pair.scaling * B @ A


def assert_start(model, gradients, method="lora_one", step_size=None, tolerance=1e-9) -> None:
    for pair in find_lora_pairs(model):
        rank = pair.matrix_A(pair.A).shape[-2]
        expected = expected_change(gradients[pair.name], rank, method, step_size)
        assert (change_of(pair) - expected).norm() <= tolerance * expected.norm() > 0, pair.name
        of_A, of_B = (
            matrix.detach().square().sum(dim)
            for matrix, dim in ((pair.matrix_A(pair.A), -1), (pair.matrix_B(pair.B), -2))
        )
        torch.testing.assert_close(of_A[of_B > 0], of_B[of_B > 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("method", "step_size"), [("lora_one", None), ("lora_sb", 1e-3)])
def test_start_is_the_truncated_step(name, method, step_size):
    row, model = ROWS[name], fresh(name)
    gradients = of_autograd(model, row.loss)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    init_from_gradients(model, [0], method, step_size, loss_fn=lambda model, _: row.loss(model))
    assert_start(model, gradients, method, step_size)
    assert all(torch.equal(dict(model.named_parameters())[n], value) for n, value in base.items())


@pytest.mark.parametrize(("method", "step_size"), [("lora_one", 0.5), ("lora_sb", None)])
def test_output_is_that_of_the_changed_weight(method, step_size):
    row, model = ROWS["linear"], fresh("linear")
    (gradient,) = of_autograd(model, row.loss).values()
    changed = copy.deepcopy(model)
    changed.base_model.model.body.get_base_layer().weight.data += expected_change(gradient, 3, method, step_size)
    init_from_gradients(model, [0], method, step_size, loss_fn=lambda model, _: row.loss(model))
    torch.testing.assert_close(row.output(model), row.output(changed), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits):
    row = ROWS[f"{bits}-bit base"]
    model = row.build(init_lora_weights=True)
    out = row.output(model)
    torch.manual_seed(1)
    x = row.inputs()
    gradient = (torch.linspace(-1, 2, out.numel()).view_as(out) * (1 - out.detach() ** 2)).mT @ x
    init_from_gradients(model, [0], loss_fn=lambda model, _: row.loss(model))
    (pair,) = find_lora_pairs(model)
    expected = expected_change(gradient.double(), 3, "lora_one", None)
    assert (change_of(pair).double() - expected).norm() <= (1e-2 if bits == 8 else 1e-5) * expected.norm()


class Two(nn.Module):
    """Two layers, of which the second may be left out."""

    def __init__(self, uses_both: bool = True) -> None:
        super().__init__()
        self.one, self.two, self.uses_both = nn.Linear(6, 5), nn.Linear(5, 4), uses_both

    def forward(self, x):
        x = torch.tanh(self.one(x))
        return self.two(x) if self.uses_both else x + 0 * self.two(x).sum()


def two(uses_both: bool = True, **settings):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["one", "two"], **settings}
    return get_peft_model(Two(uses_both), LoraConfig(**settings)).double()


def inputs(count: int = 4) -> list[torch.Tensor]:
    return list(torch.randn(count, 7, 6, generator=torch.Generator().manual_seed(5)).double())


def loss_of(model, x):
    return model(x).square().sum()


def factors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_scalings_of_patterns_negative_ones_and_low_precision():
    model = two(use_rslora=True, rank_pattern={"one": 3}, alpha_pattern={"two": 5})
    model.base_model.model.two.set_scale("default", -0.25)
    gradients = of_autograd(model, lambda model: sum(loss_of(model, x) for x in inputs()) / 4)
    half = copy.deepcopy(model)
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data.bfloat16().double() if "lora_" in name else parameter.data
    init_from_gradients(model, inputs(), loss_fn=loss_of)
    assert_start(model, gradients)
    for pair in find_lora_pairs(half):
        pair.A.data, pair.B.data = pair.A.data.bfloat16(), pair.B.data.bfloat16()
    init_from_gradients(half, inputs(), loss_fn=lambda model, x: loss_of(model, x), max_bytes=0)
    for pair in find_lora_pairs(half):
        expected = expected_change(gradients[pair.name], pair.A.shape[0], "lora_one", None)
        assert pair.A.dtype == torch.bfloat16
        assert (change_of(pair).double() - expected).norm() <= 1e-2 * expected.norm()


def test_directions_that_the_gradient_lacks_can_still_be_trained():
    model = two(r=3)
    init_from_gradients(model, [inputs(1)[0][:1]], loss_fn=loss_of)  # gradients of rank 1
    loss_of(model, inputs(1)[0]).backward()
    for pair in find_lora_pairs(model):
        B = pair.B.detach()
        assert B[:, 0].any() and not B[:, 1:].any()
        norms = pair.A.detach().norm(dim=1)
        torch.testing.assert_close(norms, norms[:1].expand(3))
        assert torch.linalg.matrix_rank(pair.A.detach()) == 3 and (pair.B.grad.norm(dim=0) > 0).all()


def test_experts_that_no_batch_reaches_start_as_plain_lora_does(caplog):
    model = fresh("experts (in, out)")

    def loss_fn(model, _):
        torch.manual_seed(1)
        return model(torch.randn(9, 6).double())[:, :2].square().sum()

    with caplog.at_level(logging.WARNING, "lorapro_hf"):
        init_from_gradients(model, [0], loss_fn=loss_fn)
    assert "body: no batch has reached 1 of its 3 matrices" in caplog.text
    (pair,) = find_lora_pairs(model)
    assert [bool(B.any()) for B in pair.matrix_B(pair.B.detach())] == [True, True, False]
    assert pair.matrix_A(pair.A.detach())[2].norm(dim=1).allclose(torch.ones(3).double())


def test_random_states_modes_and_gradients_stay():
    model = two(lora_dropout=0.3).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    init_from_gradients(model, inputs(), loss_fn=loss_of)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_several_passes_give_the_same_start():
    one, many = two(), two()
    init_from_gradients(one, inputs(), loss_fn=loss_of)
    init_from_gradients(many, inputs(), loss_fn=loss_of, max_bytes=0)
    assert all(torch.equal(value, factors(one)[name]) for name, value in factors(many).items())


def test_samples_are_counted_by_the_first_tensor_with_rows():
    batch = {"dataset_name": "all", "temperature": torch.tensor(1.0), "input_ids": torch.ones(4, 7)}
    assert first_batches([batch] * 3, 5) == ([batch] * 2, 8)


# ---- refused, with nothing changed ----


def merged():
    model = two()
    model.merge_adapter()
    return model


def two_adapters():
    model = two()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["one", "two"]))
    model.base_model.set_adapter(["default", "other"])
    return model.double()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (merged, {}, r"adapter 'default' is merged .* Call model.unmerge_adapter\(\)"),
        (lambda: two().requires_grad_(False), {}, "no active LoRA adapter is trainable"),
        (two_adapters, {}, "model.one cannot start from gradients: several active adapters .* Activate one"),
        (lambda: two(use_dora=True), {}, "model.one cannot start .* its variant DoraLinearVariant computes more"),
        (lambda: two(r=5), {}, r"model.two cannot start .* its rank 5 is above the smaller side of .* \(4, 5\)"),
        (lambda: two(init_lora_weights=False), {}, "one cannot start .* already changes the weight .* would be lost"),
        (two, {"batches": []}, "batches is empty: give at least one batch"),
        (two, {"batches": iter(inputs()), "max_bytes": 0}, "batches is an iterator, .* Give a list"),
        (two, {"method": "best"}, "method='best' is unknown; valid values are 'lora_one', 'lora_sb'"),
        (two, {"step_size": 0.0}, r"step_size=0\.0 must be a positive number, or None"),
        (two, {"step_size": float("nan")}, "step_size=nan must be a positive number"),
        (
            lambda: two().half(),
            {"step_size": 1e9, "loss_fn": lambda model, x: loss_of(model, x.half())},
            r"model.one: a step of step_size=1000000000\.0 overflows in torch.float16",
        ),
        (lambda: two(False), {}, "model.two: its gradient is 0 in all batches. Give more batches"),
        (two, {"loss_fn": lambda model, x: float("nan") * loss_of(model, x)}, "model.one: its gradient is not finite"),
    ],
)
def test_refusals_leave_all_factors(model, options, message):
    model = model()
    before = factors(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        init_from_gradients(model, **{"batches": inputs(), "loss_fn": loss_of, "max_bytes": 0, **options})
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())


def test_a_second_start_is_refused():
    model = two()
    init_from_gradients(model, inputs(), loss_fn=loss_of)
    with pytest.raises(ValueError, match="already changes the weight"):
        init_from_gradients(model, inputs(), loss_fn=loss_of)


# ---- on two ranks ----


def on_each_rank(rank, ranks):
    model = two()
    torch.manual_seed(rank)
    for pair in find_lora_pairs(model):
        nn.init.normal_(pair.A)
    init_from_gradients(model, inputs()[rank::ranks], loss_fn=loss_of)
    return factors(model)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_start_as_one_does(tmp_path):
    model = two()
    init_from_gradients(model, inputs(), loss_fn=loss_of)
    first, second = run(on_each_rank, 2, tmp_path)
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    for pair in find_lora_pairs(model):
        A, B = (first[f"{pair.name}.lora_{letter}.default.weight"] for letter in "AB")
        torch.testing.assert_close(pair.scaling * B @ A, change_of(pair), rtol=1e-8, atol=1e-12)


# ---- in a trainer ----


def trainer_of(folder: Path, model: Any = None, **settings: Any) -> Any:
    """With the batches that its collator has made in `trainer.batches`."""
    kind = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    model = model or get_peft_model(tiny_base(), LoraConfig(r=4, lora_alpha=8, **kind))
    batches: list[Any] = []

    def collate(rows: list[Any]) -> Any:
        batches.append(default_data_collator(rows))
        batches[-1]["labels"][:, 0] = -100  # transformers 4 counts it in the mean
        return batches[-1]

    settings = {"max_steps": 2, "lora_pro_init": "lora_one", "lora_pro_init_samples": 6, **settings}
    trainer = build(
        LoRAProTrainer, arguments(folder, LoRAProTrainingArguments, **settings), model, data_collator=collate
    )
    trainer.batches = batches
    return trainer


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The factors as they are after each start."""
    seen: list[dict[str, torch.Tensor]] = []
    before = GradientStart.before_training

    def watched(self: GradientStart, model: Any, batches: Any) -> None:
        before(self, model, batches)
        seen.append(factors(model))

    monkeypatch.setattr(GradientStart, "before_training", watched)
    return seen


@pytest.mark.parametrize("lora_pro", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_trainer_starts_once_from_its_first_samples(tmp_path, caplog, started, lora_pro):
    trainer = trainer_of(tmp_path, lora_pro=lora_pro, lora_pro_init_step_size="2e-2")
    with caplog.at_level(logging.INFO, "lorapro_hf"):
        trainer.train()
        trained = factors(trainer.model)
        trainer.train()  # goes on with the factors
    assert caplog.text.count("Factors start by lora_one from the gradients of 8 samples, step size 0.02") == 1
    assert_same(started[1], trained)
    by_hand = trainer_of(tmp_path).model
    init_from_gradients(by_hand, trainer.batches[:2], step_size=0.02)
    assert_same(started[0], factors(by_hand), rtol=1e-4, atol=1e-6)
    plain = trainer_of(tmp_path, lora_pro_init=None, lora_pro_init_samples=None)
    plain.train()
    assert_same(plain.batches[0], trainer.batches[3])  # accelerate reads a third for the start, and the order stays


@pytest.mark.parametrize("weights_alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_training_does_not_start_again(tmp_path, started, weights_alone):
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "save_only_model": weights_alone}
    whole = trainer_of(tmp_path, **saves)
    whole.train()
    resumed = trainer_of(tmp_path, **saves)
    fresh = factors(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(started[1], fresh)
    if not weights_alone:
        assert_same(factors(resumed.model), factors(whole.model))
    trained = factors(resumed.model)
    resumed.train()
    assert_same(started[2], trained)


def test_a_model_that_could_not_be_resumed_starts_after_all(tmp_path, started, monkeypatch):
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer_of(tmp_path, **saves).train()
    again = trainer_of(tmp_path, **saves)
    with monkeypatch.context() as broken:
        broken.setattr(again, "_load_from_checkpoint", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    again.train()
    assert_same(started[2], started[0])


@pytest.mark.slow
def test_a_model_that_is_made_for_each_training_starts_once_in_each(tmp_path, started):
    settings = {"max_steps": 1, "lora_pro_init": "lora_sb", "lora_pro_init_samples": 4}
    args = arguments(tmp_path, LoRAProTrainingArguments, **settings)
    made: list[Any] = []

    def make() -> Any:
        made.append(trainer_of(tmp_path).model)
        return made[-1]

    trainer = build(LoRAProTrainer, args, model_init=make)
    trainer.train()
    trainer.train()
    assert len(made) == 3 and len(started) == 2
    assert_same(*started)


@pytest.mark.slow
def test_the_loss_is_that_of_the_trainer(tmp_path, started):
    class Backwards(LoRAProTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return -super().compute_loss(*args, **kwargs)

    trainer_of(tmp_path).train()
    args = arguments(tmp_path, LoRAProTrainingArguments, max_steps=1, lora_pro_init="lora_one", lora_pro_init_samples=6)
    build(Backwards, args, trainer_of(tmp_path).model).train()
    for pair in find_lora_pairs(trainer_of(tmp_path).model):
        one, other = (
            seen[f"{pair.name}.lora_B.default.weight"] @ seen[f"{pair.name}.lora_A.default.weight"] for seen in started
        )
        assert (one + other).norm() < 1e-3 * one.norm()


def test_an_engine_is_refused_with_the_way_around_it(monkeypatch):
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(base, "is_initialized", lambda: True)
    monkeypatch.setattr(base, "AcceleratorState", lambda: state)
    way = r"cannot work under FSDP.*--num_train_epochs 0 .*--adapter_name_or_path start"
    with pytest.raises(RuntimeError, match=way):
        base.require_compatible([GradientStart()], {})
    with pytest.raises(RuntimeError, match=r"under FSDP.*call fuse_lora_layers\(model\) before the trainer"):
        base.require_compatible([FusedLoRA()], {})


def test_a_plain_trainer_and_a_trainer_that_generates(tmp_path):
    class Generating(LoRAProTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    model = trainer_of(tmp_path).model
    with pytest.raises(ValueError, match=r"Generating makes its inputs while it trains, .* Leave out lora_pro_init"):
        build(Generating, arguments(tmp_path), model, callbacks=[GradientStart()], lora_pro_config={}).train()
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False, lora_pro_init="lora_one", max_steps=1)
    with pytest.raises(ValueError, match=r"Trainer does not read lora_pro_init='lora_one'.* call init_from_gradients"):
        build(Trainer, args, model).train()
    build(Trainer, arguments(tmp_path, learning_rate=0.0, max_steps=1), model, callbacks=[GradientStart()]).train()
    assert all(pair.B.any() for pair in find_lora_pairs(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_pro_init": "best"}, "lora_pro_init='best' is unknown; valid values are 'lora_one', 'lora_sb'"),
        ({"lora_pro_init": None}, "lora_pro_init_samples would be ignored: set lora_pro_init to lora_one, lora_sb or"),
        ({"lora_pro_init_samples": 0}, "lora_pro_init_samples=0 must be a whole number of samples"),
        ({"lora_pro_init_step_size": -1}, "lora_pro_init_step_size=-1.0 must be a positive number"),
        ({"lora_pro_init_step_size": "far"}, "lora_pro_init_step_size='far' must be a number"),
    ],
)
def test_arguments_without_a_meaning_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainers_of_trl_start_and_log_nothing_of_it(tmp_path, kind):
    """TRL counts tokens in its loss; DPO's reference model is this model without its adapter."""
    pytest.importorskip("trl")
    from trl_helpers import adapter, chat_model, completions, preferences, tokenizer

    def logs(**settings: Any) -> tuple[list[Any], list[Any]]:
        cls, config = (getattr(lorapro_hf, f"LoRAPro{kind}{name}") for name in ("Trainer", "Config"))
        args = arguments(tmp_path, config, max_steps=2, bf16=False, max_length=32, **settings)
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        data = completions() if kind == "SFT" else preferences()
        model = get_peft_model(chat_model(), adapter(init_lora_weights=True))
        trainer = cls(model=model, args=args, train_dataset=data, processing_class=tokenizer())
        trainer.train()
        return logged(trainer, "num_tokens"), logged(trainer, "loss")

    tokens, losses = logs(lora_pro_init="lora_one", gradient_checkpointing=True)
    expected, plain = logs()
    assert tokens == expected and losses[0] < plain[0] - 1e-3
