"""LoRAProTrainer behaves as Trainer does in everything but the step."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.lr_scheduler import LinearLR
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_pt_utils import get_parameter_names

from lorapro_hf import (
    LoRAProAdamW,
    LoRAProCallback,
    LoRAProConfig,
    LoRAProOptimizerFactory,
    LoRAProTrainer,
    LoRAProTrainerMixin,
    LoRAProTrainingArguments,
    create_lorapro_optimizer,
    equivalent_gradient,
)
from lorapro_hf.optim import memory
from lorapro_hf.optim.memory import StateTooLargeError, readable_bytes
from trainer_helpers import (
    EFFICIENT,
    PlainArgsTrainer,
    arguments,
    assert_same,
    build,
    differ,
    factors,
    logged,
    run,
    tiny_base,
    tiny_lora,
)

MODES = pytest.mark.parametrize("mode", ["full", pytest.param("efficient", marks=pytest.mark.slow)])
TIMINGS = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
EVAL_TIMINGS = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


class At(TrainerCallback):
    """Calls `do(**kwargs)` at an event."""

    def __init__(self, event: str, do: Any) -> None:
        setattr(self, event, lambda args, state, control, **kwargs: do(state=state, control=control, **kwargs))


def interrupt_at(step: int) -> TrainerCallback:
    def stop(state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= step

    return At("on_step_end", stop)


# ---- off: the parent ----


def test_off_is_trainer_to_the_bit(tmp_path: Path):
    settings = {"weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 0.5, "eval_strategy": "steps", "eval_steps": 3}
    plain = run(tmp_path / "a", Trainer, **settings)
    off = run(tmp_path / "b", lora_pro=False, **settings)
    assert_same(factors(plain), factors(off))

    def history(trainer: Trainer) -> list[dict]:
        return [{k: v for k, v in e.items() if k not in TIMINGS | EVAL_TIMINGS} for e in trainer.state.log_history]

    assert history(plain) == history(off)
    assert off.lora_pro_config is None
    assert [type(c) for c in plain.callback_handler.callbacks] == [type(c) for c in off.callback_handler.callbacks]


def test_off_allows_any_optimizer_and_model(tmp_path: Path):
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False, optim="adafactor", max_steps=1)
    build(LoRAProTrainer, args, model=tiny_base()).train()
    build(LoRAProTrainer, args, callbacks=[LoRAProCallback()]).train()


# ---- on: the optimizer is built from the arguments ----


@MODES
def test_equals_a_loop_written_by_hand(tmp_path: Path, mode: str):
    settings = {
        "weight_decay": 0.3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-4,
        "max_grad_norm": 0.05,
        "lr_scheduler_type": "linear",
    }
    adapter = {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"], "lora_bias": True}
    batches: list[dict] = []

    def collate(rows: list[dict]) -> dict:
        batches.append(default_data_collator(rows))
        return batches[-1]

    build_with = {"model": tiny_lora(**adapter), "data_collator": collate}
    trainer = run(tmp_path, build_with=build_with, lora_pro_mode=mode, lora_pro_x_mode="symmetric", **settings)

    model = tiny_lora(**adapter).train()
    optimizer = create_lorapro_optimizer(
        model,
        lr=1e-2,
        betas=(0.8, 0.95),
        eps=1e-4,
        weight_decay=0.3,
        config={"mode": mode, "x_mode": "symmetric"},
        decay_parameters=get_parameter_names(model, [torch.nn.LayerNorm], ["bias", "norm"]),
    )
    schedule = LinearLR(optimizer, 1.0, 1 / 6, total_iters=5)
    for batch in batches[:6]:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    reference = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert any("bias" in name for name in reference)
    assert_same(factors(trainer), reference, rtol=1e-5, atol=1e-6)


@MODES
def test_differs_from_plain_lora_and_learns(tmp_path: Path, mode: str):
    trainer = run(tmp_path / "a", lora_pro_mode=mode, max_steps=12)
    assert differ(factors(trainer), factors(run(tmp_path / "b", Trainer, max_steps=12)))
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert isinstance(trainer.optimizer.optimizer, LoRAProAdamW)


def test_learning_rate_is_that_of_the_arguments(tmp_path: Path):
    trainer = build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, learning_rate=3e-4))
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {3e-4}


def test_plain_arguments_take_the_config_or_the_default(tmp_path: Path):
    stated = run(tmp_path / "a", lora_pro_mode="efficient", max_steps=2)
    given = run(tmp_path / "b", PlainArgsTrainer, {"lora_pro_config": EFFICIENT}, max_steps=2)
    as_dictionary = build(PlainArgsTrainer, arguments(tmp_path / "c"), lora_pro_config=EFFICIENT.to_dict())
    assert given.lora_pro_config == as_dictionary.lora_pro_config == EFFICIENT
    assert_same(factors(stated), factors(given))
    default = build(PlainArgsTrainer, arguments(tmp_path))
    assert default.lora_pro_config == LoRAProConfig()


def test_trainer_that_builds_the_peft_model_itself(tmp_path: Path):
    class AdaptingTrainer(Trainer):  # as TRL's trainers do
        def __init__(self, model: Any = None, args: Any = None, peft_config: Any = None, **kwargs: Any) -> None:
            super().__init__(model=get_peft_model(model, peft_config), args=args, **kwargs)

    class AdaptingLoRAProTrainer(LoRAProTrainerMixin, AdaptingTrainer):
        pass

    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = build(
        AdaptingLoRAProTrainer,
        arguments(tmp_path, max_steps=2),
        model=tiny_base(),
        peft_config=config,
        lora_pro_config={},
    )
    trainer.train()
    assert len(trainer.optimizer.optimizer.pairs) == 2


def test_model_init_and_changed_arguments(tmp_path: Path):
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro_mode="full", max_steps=2)
    trainer = build(LoRAProTrainer, args, model_init=lambda: tiny_lora())
    trainer.train()
    assert trainer.optimizer.optimizer.config.mode == "full"
    first = factors(trainer)
    trainer.train()
    assert_same(first, factors(trainer))  # model_init starts again
    args.lora_pro_mode = "efficient"  # as a hyperparameter search does
    trainer.train()
    assert trainer.optimizer.optimizer.config.mode == "efficient"
    args.lora_pro = False
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW


# ---- what Trainer offers keeps working ----


@MODES
def test_accumulation_equals_one_large_batch(tmp_path: Path, mode: str):
    settings = {"lora_pro_mode": mode, "adam_epsilon": 1e-4, "max_steps": 3}
    large = run(tmp_path / "a", per_device_train_batch_size=8, **settings)
    small = run(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    assert_same(factors(large), factors(small), rtol=1e-4, atol=1e-5)
    norms = zip(logged(large, "lora_pro_grad_norm"), logged(small, "lora_pro_grad_norm"), strict=True)
    assert all(math.isclose(a, b, rel_tol=1e-3) for a, b in norms)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@MODES
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, mode: str, dropout: float):
    settings = {"lora_pro_mode": mode, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}

    def fresh(folder: str, callbacks: list | None = None) -> Any:
        args = arguments(tmp_path / folder, LoRAProTrainingArguments, **settings)
        return build(LoRAProTrainer, args, model=tiny_lora(lora_dropout=dropout), callbacks=callbacks)

    whole = fresh("whole")
    whole.train()
    fresh("halves", [interrupt_at(3)]).train()
    resumed = fresh("halves")
    resumed.train(resume_from_checkpoint=True)
    assert_same(factors(whole), factors(resumed))
    for key in ("loss", "learning_rate", "lora_pro_grad_norm"):
        assert logged(whole, key) == logged(resumed, key) and len(logged(whole, key)) == 6
    states = [trainer.optimizer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert_same(state, states[1][key])
    # the moments count: without them the second half goes elsewhere
    file = tmp_path / "halves" / "checkpoint-3" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    for state in saved["state"].values():
        state.update({name: torch.zeros_like(value) for name, value in state.items() if name != "step"})
    torch.save(saved, file)
    (file.parent / "lorapro_manifest.json").unlink()  # which knows what was saved
    forgetful = fresh("halves")
    forgetful.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-3"))
    assert differ(factors(whole), factors(forgetful))


def test_resume_refuses_a_checkpoint_of_the_other_mode(tmp_path: Path):
    run(tmp_path, lora_pro_mode="efficient", save_strategy="steps", save_steps=3, max_steps=3)
    trainer = build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, lora_pro_mode="full"))
    with pytest.raises(ValueError, match="efficient"):
        trainer.train(resume_from_checkpoint=True)


def test_load_best_model_at_end(tmp_path: Path):
    evaluations = iter([1.0, 0.1, 2.0])
    at_step_4: dict[str, torch.Tensor] = {}

    def keep(state: Any, model: Any, **_: Any) -> None:
        if state.global_step == 4:
            at_step_4.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    trainer = run(
        tmp_path,
        build_with={
            "callbacks": [At("on_step_end", keep)],
            "compute_metrics": lambda _: {"score": next(evaluations)},
        },
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert_same(factors(trainer), at_step_4)


@pytest.mark.parametrize("save_only_model", [pytest.param(True, marks=pytest.mark.slow), False])
def test_checkpoint_holds_the_same_files_as_trainers(tmp_path: Path, save_only_model: bool):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "save_only_model": save_only_model}
    run(tmp_path / "plain", Trainer, **settings)
    run(tmp_path / "pro", **settings)
    plain, pro = (
        {p.relative_to(tmp_path / kind).as_posix() for p in (tmp_path / kind).rglob("*")} for kind in ("plain", "pro")
    )
    assert pro == plain | {f"checkpoint-2/{name}" for name in ("lorapro_config.json", "lorapro_manifest.json")}
    assert ("checkpoint-2/optimizer.pt" in pro) is not save_only_model


@MODES
def test_clipping_scales_the_raw_gradients(tmp_path: Path, mode: str):
    free = run(tmp_path / "a", max_grad_norm=1e9, max_steps=1, lora_pro_mode=mode)
    clipped = run(tmp_path / "b", max_grad_norm=0.01, max_steps=1, lora_pro_mode=mode)
    (raw,) = logged(free, "grad_norm")
    assert raw > 0.1 and logged(clipped, "grad_norm") == [raw]  # the norm is logged as it was before clipping
    (adjusted,), (expected,) = logged(clipped, "lora_pro_grad_norm"), logged(free, "lora_pro_grad_norm")
    assert math.isclose(adjusted, expected * 0.01 / raw, rel_tol=1e-3)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path):
    plain = run(tmp_path / "a", max_steps=3)
    checkpointed = run(
        tmp_path / "b",
        max_steps=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert checkpointed.model.base_model.model.is_gradient_checkpointing
    assert_same(factors(plain), factors(checkpointed), rtol=1e-5, atol=1e-6)


@MODES
def test_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str):
    # transformers 4 leaves bf16 behind in here, for every later test of the process
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    exact = run(tmp_path / "a", lora_pro_mode=mode, max_steps=4)
    mixed = run(tmp_path / "b", lora_pro_mode=mode, max_steps=4, bf16=True)
    assert all(tensor.dtype == torch.float32 for tensor in factors(mixed).values())
    moments = [t for state in mixed.optimizer.optimizer.state.values() for n, t in state.items() if n != "step"]
    assert moments and all(moment.dtype == torch.float32 for moment in moments)
    assert logged(mixed, "loss") != logged(exact, "loss")  # autocast was in force
    for a, b in zip(logged(mixed, "loss"), logged(exact, "loss"), strict=True):
        assert math.isclose(a, b, rel_tol=2e-2)


def test_scheduler_drives_the_optimizer(tmp_path: Path):
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    used: list[float] = []
    spy = At("on_pre_optimizer_step", lambda optimizer, **_: used.extend({g["lr"] for g in optimizer.param_groups}))
    trainer = run(tmp_path / "a", build_with={"callbacks": [spy]}, **settings)
    plain = run(tmp_path / "b", Trainer, **settings)
    assert logged(trainer, "learning_rate") == logged(plain, "learning_rate")
    assert used == logged(plain, "learning_rate") and used[0] == 0.0 and max(used) == 1e-2


# ---- logs ----


def test_metrics_reach_every_reporter(tmp_path: Path):
    records: list[dict] = []
    args = arguments(tmp_path, LoRAProTrainingArguments, eval_strategy="steps", eval_steps=6)
    trainer = build(LoRAProTrainer, args)
    # the reporters come first
    trainer.callback_handler.callbacks.insert(0, At("on_log", lambda logs, **_: records.append(dict(logs))))
    result = trainer.train()
    of_steps = [r for r in records if "loss" in r]
    assert len(of_steps) == 6 and "epoch" in result.metrics
    for record in of_steps:
        assert record["lora_pro_grad_norm"] > 0 and record["lora_pro_skipped_steps"] == 0
        assert isinstance(record["lora_pro_grad_norm"], float)
    others = [r for r in records if "loss" not in r]
    assert len(others) == 2 and not any("lora_pro" in key for record in others for key in record)


def test_logged_norm_is_that_of_the_equivalent_gradients(tmp_path: Path):
    norms: list[float] = []

    def adjust(model: Any, **_: Any) -> None:
        from lorapro_hf.factors.pairs import find_lora_pairs
        from lorapro_hf.optim.projected_gradients import project_pair_gradients_

        pairs = find_lora_pairs(model)
        kept = {p: p.grad.clone() for pair in pairs for p in (pair.A, pair.B)}
        project_pair_gradients_(pairs, LoRAProConfig())
        moves = [equivalent_gradient(pair.A, pair.B, pair.A.grad, pair.B.grad, pair.scaling) for pair in pairs]
        norms.append(math.sqrt(sum(float(move.double().square().sum()) for move in moves)))
        for parameter, gradient in kept.items():
            parameter.grad = gradient

    trainer = run(tmp_path, build_with={"callbacks": [At("on_pre_optimizer_step", adjust)]}, max_steps=3)
    for a, b in zip(logged(trainer, "lora_pro_grad_norm"), norms, strict=True):
        assert math.isclose(a, b, rel_tol=1e-4)


def test_skipped_steps_are_counted(tmp_path: Path):
    before: list[dict] = []

    def spoil(state: Any, model: Any, **_: Any) -> None:
        if state.global_step == 2:
            before.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
            next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("nan"))

    def after(state: Any, model: Any, **_: Any) -> None:
        if state.global_step == 3:
            before.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    callbacks = [At("on_pre_optimizer_step", spoil), At("on_step_end", after)]
    trainer = run(tmp_path, build_with={"callbacks": callbacks})
    assert logged(trainer, "lora_pro_skipped_steps") == [0, 0, 1, 1, 1, 1]
    assert_same(*before)


def test_start_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="lorapro_hf.trainer.trainer")
    settings = {"lora_pro_mode": "full", "lora_pro_x_mode": "zero", "lora_pro_trust_region": 0.03}
    trainer = run(tmp_path, max_steps=2, **settings)
    trainer.train()
    messages = [r.getMessage() for r in caplog.records if r.name == "lorapro_hf.trainer.trainer"]
    size = readable_bytes(trainer.optimizer.optimizer.estimated_state_bytes())
    assert messages == [
        f"LoRA-Pro: 14 pairs, mode=full, update=linear (zero), trust_region=0.03, optimizer state about {size}"
    ]
    assert size.endswith("KiB")


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_readable_bytes(count: int, expected: str):
    assert readable_bytes(count) == expected


# ---- what is saved is plain PEFT ----


def test_adapter_is_plain_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = run(tmp_path / "run", max_steps=2)
    trainer.save_model(str(tmp_path / "adapter"))
    model = trainer.model.eval()
    with torch.no_grad():
        logits = model(torch.arange(3, 11)[None]).logits
        with model.disable_adapter():
            assert not torch.allclose(logits, model(torch.arange(3, 11)[None]).logits, atol=1e-3)

    plain = run(tmp_path / "plain", Trainer, max_steps=2)
    plain.save_model(str(tmp_path / "plain_adapter"))
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("adapter", "plain_adapter")]
    assert json.loads(texts[0]) == json.loads(texts[1]) and "pro" not in json.loads(texts[0])
    assert "lora_pro" not in texts[0] and "lorapro" not in texts[0]

    for name in [name for name in sys.modules if name.split(".")[0] == "lorapro_hf"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    loaded = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(torch.arange(3, 11)[None]).logits, logits, rtol=1e-5, atol=1e-6)


# ---- optimizers and factories handed in ----


def test_factory_in_a_plain_trainer_equals_lorapro_trainer(tmp_path: Path):
    if Version(transformers.__version__) < Version("5"):
        pytest.skip("transformers 4 knows no optimizer factories")
    kwargs = {"lr": 1e-2, "mode": "efficient", "betas": (0.8, 0.9), "weight_decay": 0.1}
    factory = {"optimizer_cls_and_kwargs": (LoRAProOptimizerFactory, kwargs)}
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.9, "weight_decay": 0.1}
    expected = run(tmp_path / "a", lora_pro_mode="efficient", max_steps=3, **settings)
    assert_same(factors(expected), factors(run(tmp_path / "b", Trainer, factory, max_steps=3)))


def test_memory_is_checked_for_factories_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    factory = {"optimizer_cls_and_kwargs": (LoRAProOptimizerFactory, {"lr": 1e-2})}
    with pytest.raises(StateTooLargeError, match="lora_pro_check_memory=False"):
        run(tmp_path / "a", build_with=factory, max_steps=1)
    run(tmp_path / "b", build_with=factory, lora_pro_check_memory=False, max_steps=1)


def test_factory_and_optimizer_in_lorapro_trainer(tmp_path: Path):
    steps = {"max_steps": 3}
    expected = run(tmp_path / "a", lora_pro_mode="efficient", **steps)
    factory = {"optimizer_cls_and_kwargs": (LoRAProOptimizerFactory, {"lr": 1e-2})}
    assert_same(factors(expected), factors(run(tmp_path / "b", build_with=factory, lora_pro_mode="efficient", **steps)))
    factory = {"optimizer_cls_and_kwargs": (LoRAProOptimizerFactory, {"lr": 1e-2, "mode": "efficient"})}
    assert_same(factors(expected), factors(run(tmp_path / "d", PlainArgsTrainer, factory, **steps)))
    model = tiny_lora()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config=EFFICIENT)
    given = run(tmp_path / "c", PlainArgsTrainer, {"model": model, "optimizers": (optimizer, None)}, **steps)
    assert given.lora_pro_config == EFFICIENT and given.optimizer.optimizer is optimizer
    assert_same(factors(expected), factors(given))
    assert len(logged(given, "lora_pro_grad_norm")) == 3
