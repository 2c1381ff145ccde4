"""The gradient gap in a `Trainer`: true figures, unchanged training, logs, the file, resuming, and its pictures."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from test_diagnostics import expected_gaps, true_gradients
from transformers import Trainer, TrainerCallback

from lorapro_hf import LoRAProCallback, LoRAProTrainer, LoRAProTrainingArguments, find_lora_pairs
from lorapro_hf.diagnostics import GradientGapCallback
from lorapro_hf.diagnostics import callback as callback_module
from lorapro_hf.diagnostics.records import FILE, keep_until
from trainer_helpers import arguments, assert_same, build, factors, logged, run, tiny_lora


class Watching(LoRAProTrainer):
    """Keeps each step's micro-batches and works out the true figures before the step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.expected = [], {}
        self.add_callback(_Oracle(self))

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


class _Oracle(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        batches, self.trainer.batches = self.trainer.batches, []

        def loss(merged):
            merged.gradient_checkpointing_disable()
            return sum(merged(**batch).loss for batch in batches)

        true = true_gradients(model.double(), loss)
        for pair in find_lora_pairs(model):
            g = true[pair.name]
            # clipping and averaging are one factor for all layers: that of the factors' own gradients
            own = pair.scaling * g @ pair.A.detach().mT
            scale = float((own * pair.B.grad).sum() / own.square().sum())
            self.trainer.expected[state.global_step + 1, pair.name] = expected_gaps(pair, scale * g)
        model.float()


def checkpointing(reentrant: bool):
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


def records(folder: Path):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01, **checkpointing(False)},
        {"lora_pro": False, **checkpointing(True)},
    ],
    ids=["accumulated and clipped", "plain LoRA"],
)
def test_figures_are_true_and_lora_pro_is_closer(tmp_path, settings):
    """On every layer and step measured, whoever takes the steps."""
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro_log_gap=2, max_steps=3, **settings)
    model = tiny_lora()
    model.enable_input_require_grads()  # transformers 4 leaves it to the user, and reentrant checkpointing needs it
    trainer = build(Watching, args, model)
    trainer.train()
    found = records(tmp_path)
    assert {record["step"] for record in found} == {1, 3}
    assert len(found) == 2 * 14
    for record in found:
        for name, value in trainer.expected[record["step"], record["layer"]].items():
            assert record[name] == pytest.approx(value, rel=2e-3), name
        assert record["residual"] < 1e-4
        assert record["lora_pro_gap"] < record["lora_scaled_gap"] - 1e-3
        assert record["lora_pro_gap"] < record["lora_gap"] - 1e-3
        assert record["lora_pro_cosine"] > record["lora_cosine"]
        assert record["step_error"] is not None
    assert all(not pair.layer._forward_hooks for pair in find_lora_pairs(trainer.model))


@pytest.mark.parametrize(
    "settings",
    [checkpointing(False), pytest.param({"lora_pro": False}, marks=pytest.mark.slow)],
    ids=["LoRA-Pro", "LoRA"],
)
def test_training_is_the_same_to_the_bit(tmp_path, settings):
    without = run(tmp_path / "without", max_steps=3, **settings)
    measured = run(tmp_path / "with", max_steps=3, lora_pro_log_gap=1, **settings)
    assert_same(factors(without), factors(measured))
    assert logged(without, "loss") == logged(measured, "loss")
    assert logged(without, "grad_norm") == logged(measured, "grad_norm")


class Reporter(TrainerCallback):
    """What a reporter such as TensorBoard's is handed."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def test_metrics_reach_reporters_at_their_step(tmp_path):
    reporter = Reporter()
    trainer = run(tmp_path, lora_pro_log_gap=3, lora_pro_gap_layers=["q_proj"], build_with={"callbacks": [reporter]})
    found = {step: logs for step, logs in reporter.seen if "lora_pro_gap/lora_pro_gap" in logs}
    assert sorted(found) == [1, 4]
    assert len(logged(trainer, "loss")) == 6  # none of the ordinary logs is lost
    of_step = [record for record in records(tmp_path) if record["step"] == 4]
    assert [record["layer"].rpartition(".")[2] for record in of_step] == ["q_proj"] * 2
    mean = sum(record["lora_scaled_gap"] for record in of_step) / 2  # the median of two
    assert found[4]["lora_pro_gap/lora_scaled_gap"] == pytest.approx(mean)
    assert set(found[4]) - {"epoch"} == {
        f"lora_pro_gap/{name}"
        for name in (
            "lora_gap",
            "lora_scaled_gap",
            "lora_cosine",
            "lora_pro_gap",
            "lora_pro_cosine",
            "residual",
            "step_error",
            "step_length",
            "step_share",
        )
    }


def test_callback_alone_in_a_plain_trainer(tmp_path):
    callback = GradientGapCallback(every=2)
    trainer = run(tmp_path, Trainer, {"callbacks": [callback]}, max_steps=3)
    assert [record["step"] for record in records(tmp_path)] == [1] * 14 + [3] * 14
    assert {record["optimizer"] for record in records(tmp_path)} == {"AdamW"}
    assert len(logged(trainer, "lora_pro_gap/lora_gap")) == 2
    assert len(logged(trainer, "loss")) == 3


def test_resumed_run_has_the_file_of_an_uninterrupted_one(tmp_path):
    settings = {"lora_pro_log_gap": 1, "lora_pro_gap_layers": ["v_proj"], "save_strategy": "steps", "save_steps": 2}
    settings["max_steps"] = 3
    run(tmp_path, **settings)
    file = tmp_path / FILE
    whole = file.read_text()
    with file.open("a") as out:
        out.write('{"step": 7, "lay')  # killed while writing
    trainer = build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, **settings))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert file.read_text() == whole


def test_dropout_and_layers_left_out_are_told_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lorapro_hf"):
        callback = GradientGapCallback(every=1, layers=["q_proj", "up_proj"], max_bytes=32 * 32 * 4)
        run(tmp_path, Trainer, {"model": tiny_lora(lora_dropout=0.3), "callbacks": [callback]}, max_steps=2)
    assert len([r for r in caplog.records if "an estimate" in r.message]) == 1
    (told,) = [r.message for r in caplog.records if "not measured" in r.message]
    assert "layers.0.mlp.up_proj and 1 more not measured: its gradient takes 6,144 bytes" in told


def test_rewritten_gradients_are_refused_after_and_seen_before(tmp_path):
    with pytest.raises(RuntimeError, match="LoRAProCallback rewrites the gradients before"):
        run(tmp_path, Trainer, {"callbacks": [LoRAProCallback(), GradientGapCallback()]})
    trainer = build(Trainer, arguments(tmp_path), callbacks=[LoRAProCallback()])
    trainer.args.max_steps = 1
    GradientGapCallback(every=3).attach(trainer)
    trainer.train()
    assert max(record["residual"] for record in records(tmp_path)) < 1e-4


@pytest.mark.parametrize("every", [0, True])
def test_callback_refuses_steps_that_are_none(every):
    with pytest.raises(ValueError, match="must be a whole number of steps"):
        GradientGapCallback(every=every)


@pytest.mark.parametrize("settings", [{"layers": "q_proj"}, {"max_bytes": 0}])
def test_callback_refuses_settings_of_another_type(settings):
    with pytest.raises(ValueError, match=r"must be a (list of names|positive whole number)"):
        GradientGapCallback(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_pro_log_gap": -1}, "lora_pro_log_gap=-1 must be a whole number"),
        ({"lora_pro_gap_layers": ["q_proj"]}, "lora_pro_gap_layers would be ignored"),
        ({"lora_pro_gap_max_bytes": 10}, "lora_pro_gap_max_bytes would be ignored"),
        ({"lora_pro_log_gap": 1, "lora_pro_gap_layers": "q_proj"}, "lora_pro_gap_layers='q_proj' must be a list"),
        ({"lora_pro_log_gap": 1, "lora_pro_gap_max_bytes": 0}, "lora_pro_gap_max_bytes=0 must be a positive"),
    ],
)
def test_arguments_refuse(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, LoRAProTrainingArguments, **settings)


def test_two_callbacks_are_refused(tmp_path):
    trainer = build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, lora_pro_log_gap=1))
    with pytest.raises(ValueError, match="has a GradientGapCallback already"):
        GradientGapCallback().attach(trainer)


def test_a_second_callback_is_refused_before_it_writes(tmp_path):
    with pytest.raises(ValueError, match="has a GradientGapCallback already"):
        run(tmp_path, Trainer, {"callbacks": [GradientGapCallback(1), GradientGapCallback(1)]})
    assert not (tmp_path / FILE).exists()


def test_the_same_callback_may_train_again_and_starts_the_file_anew(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1, "layer": "old", "lora_gap": 1.0}\n')
    trainer = build(Trainer, arguments(tmp_path, max_steps=1), callbacks=[GradientGapCallback(1)])
    trainer.train()
    trainer.train()
    assert len(records(tmp_path)) == 14 and "old" not in {record["layer"] for record in records(tmp_path)}


def test_a_pattern_without_a_layer_is_refused_when_the_trainer_is_built(tmp_path):
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro_log_gap=1, lora_pro_gap_layers=["query"])
    with pytest.raises(ValueError, match=r"lora_pro_gap_layers\): 'query' matches .* here: q_proj, k_proj, v_proj"):
        build(LoRAProTrainer, args)


def test_layers_take_turns_over_measured_steps(tmp_path, caplog):
    settings = {"lora_pro_log_gap": 2, "lora_pro_gap_layers": ["q_proj"], "lora_pro_gap_max_bytes": 32 * 32 * 4}
    with caplog.at_level(logging.WARNING, logger="lorapro_hf"):
        run(tmp_path, max_steps=5, **settings)
    (told,) = [r.message for r in caplog.records if "take turns" in r.message]
    assert "there are 2, so that each layer is measured every 4 steps" in told and "--lora_pro_gap_max_bytes" in told
    layers = [(record["step"], int(record["layer"].split(".")[4])) for record in records(tmp_path)]
    assert layers == [(1, 0), (3, 1), (5, 0)]


def test_a_file_that_cannot_be_written_ends_no_training(tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(callback_module, "append", full)
    with caplog.at_level(logging.WARNING, logger="lorapro_hf"):
        trainer = run(tmp_path, lora_pro_log_gap=1, max_steps=2)
    assert len([r for r in caplog.records if "No space left on device" in r.message]) == 1
    assert len(logged(trainer, "lora_pro_gap/lora_gap")) == 2


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=rf"{FILE} is not text.* Move it away"):
        keep_until(tmp_path / FILE, 0)


def test_an_interrupted_rewriting_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / FILE
    file.write_text('{"step": 1, "layer": "one"}\n')

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        keep_until(file, 0)
    assert file.read_text() == '{"step": 1, "layer": "one"}\n'


class _Arguments:
    torch_compile, n_gpu = False, 1


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("torch_compile", True, "in a compiled model"), ("n_gpu", 2, "under nn.DataParallel")],
)
def test_refuses_where_gradients_cannot_be_seen(setting, value, message):
    args = _Arguments()
    setattr(args, setting, value)
    with pytest.raises(RuntimeError, match=message):
        GradientGapCallback().on_train_begin(args, None, None, model=tiny_lora())


def test_refuses_deepspeed(monkeypatch):
    class State:
        distributed_type = "DEEPSPEED"

    monkeypatch.setattr(callback_module, "is_initialized", lambda: True)
    monkeypatch.setattr(callback_module, "AcceleratorState", State)
    with pytest.raises(RuntimeError, match="cannot be measured under DeepSpeed"):
        GradientGapCallback().on_train_begin(_Arguments(), None, None, model=tiny_lora())


def test_no_hook_is_left_behind_by_a_training_that_fails(tmp_path):
    class Failing(LoRAProTrainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            raise KeyboardInterrupt

    trainer = build(Failing, arguments(tmp_path, LoRAProTrainingArguments, lora_pro_log_gap=1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(not pair.layer._forward_hooks for pair in find_lora_pairs(trainer.model))
