"""What a training leaves out in silence is said once: pairs without gradients, and steps that are never taken."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration, Trainer

from grids import rest_slow
from lorapro_hf import (
    LoRAProAdamW,
    LoRAProCallback,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    create_lorapro_optimizer,
    find_lora_pairs,
)
from lorapro_hf.distributed.ownership import PairOwnership
from lorapro_hf.optim import first_steps
from lorapro_hf.optim.first_steps import FIRST_STEPS
from optimizer_helpers import backward, both_modes, small_model
from trainer_helpers import arguments, build, run, sequences, tiny_lora


class TwoTowers(nn.Module):
    """Images are optional, as in models of text and vision."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, images=None):
        return self.text(x) if images is None else self.text(x) + self.vision(images)


class Checkpointed(nn.Module):
    """The first layer is checkpointed in the reentrant way, with inputs that need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.text(checkpoint(self.vision, x, use_reentrant=True))


def two_layers(cls):
    model = get_peft_model(cls(), LoraConfig(r=2, target_modules=["vision", "text"]))
    return model, lambda: model(torch.ones(2, 6)).square().sum(), "base_model.model.vision"


def t5():
    config = T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=2, target_modules=["shared", "q"]))
    ids = torch.arange(1, 7)[None]
    return model, lambda: model(input_ids=ids, labels=ids).loss, "base_model.model.shared"


CASES = {"tower": lambda: two_layers(TwoTowers), "checkpointing": lambda: two_layers(Checkpointed), "shared of T5": t5}


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lorapro_hf.optim.first_steps"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_pairs_without_gradients_are_named_once(case, caplog):
    model, loss, name = CASES[case]()
    optimizer = create_lorapro_optimizer(model, lr=1e-3, mode="efficient")
    for step in range(1, FIRST_STEPS + 4):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(warnings_in(caplog)) == (step >= FIRST_STEPS)
    optimizer.finish_training()
    (said,) = warnings_in(caplog)
    number = len(optimizer.pairs)
    assert said.startswith(
        f"1 of {number} LoRA pairs had no gradient in the first 10 steps and were not trained: {name}."
    )
    assert caplog.records[-1].levelno == logging.WARNING


def test_a_pair_that_has_a_gradient_now_and_then_is_not_named(caplog):
    model, _, _ = two_layers(TwoTowers)
    optimizer = create_lorapro_optimizer(model, lr=1e-3, mode="efficient")
    for step in range(FIRST_STEPS):
        model(torch.ones(2, 6), images=torch.ones(2, 6) if step == 7 else None).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish_training()
    assert not warnings_in(caplog)


def test_a_pair_that_was_frozen_after_all_is_not_named(caplog):
    model, loss, _ = two_layers(TwoTowers)
    optimizer = create_lorapro_optimizer(model, lr=1e-3, mode="efficient")
    for factor in (optimizer.pairs[0].A, optimizer.pairs[0].B):
        factor.requires_grad_(False)
    loss().backward()
    optimizer.step()
    optimizer.finish_training()
    assert not warnings_in(caplog)


def test_a_long_list_of_names_is_cut(caplog):
    body = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)))
    model = get_peft_model(body, LoraConfig(r=1, target_modules=[str(index) for index in range(8)]))
    optimizer = create_lorapro_optimizer(model, 1e-3)
    model.base_model.model[0](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.finish_training()
    names = ", ".join(f"base_model.model.{index}" for index in range(1, 5))
    assert (
        f"7 of 8 LoRA pairs had no gradient in the first 1 steps and were not trained: {names} and 3 more."
        in (warnings_in(caplog)[0])
    )


def train(optimizer, model, broken, steps=FIRST_STEPS):
    for step in range(steps):
        backward(model, step)
        if step < broken:
            optimizer.pairs[0].B.grad.fill_(float("nan"))
        optimizer.step()


@both_modes
@pytest.mark.parametrize("broken", rest_slow([5, 4, 10]))
def test_steps_left_out_are_counted_once(mode, broken, caplog):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-3, mode=mode)
    train(optimizer, model, broken)
    assert len(warnings_in(caplog)) == (broken >= 5)
    train(optimizer, model, broken=10)
    optimizer.finish_training()
    (said,) = warnings_in(caplog)
    expected = f"{broken} of the first 10" if broken >= 5 else "14 of the first 20"
    assert said.startswith(f"{expected} steps were left out, because a gradient held NaN or Inf, or was")
    assert optimizer.skipped_steps == broken + 10


@pytest.mark.parametrize("zero", [9, 10])
def test_gradients_that_are_all_zero_are_told(zero, caplog):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-3)
    for step in range(3 * FIRST_STEPS):
        backward(model, step)
        if step < zero:
            optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    expected = ["the gradients of all LoRA pairs were zero in the first 10 steps"] if zero == 10 else []
    assert [said[:63] for said in warnings_in(caplog)] == expected


def test_a_training_that_goes_on_counts_anew(caplog):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-3)
    train(optimizer, model, broken=9, steps=9)
    saved = optimizer.state_dict()
    resumed = create_lorapro_optimizer(model, lr=1e-3)
    resumed.load_state_dict(saved)
    train(resumed, model, broken=0)
    assert resumed.skipped_steps == 9 and not warnings_in(caplog)
    resumed.finish_training()
    train(resumed, model, broken=6)
    assert [said[:23] for said in warnings_in(caplog)] == ["6 of the first 10 steps"]


def test_the_host_waits_for_the_device_at_one_step_alone(monkeypatch):
    model = small_model()
    optimizer = create_lorapro_optimizer(model, lr=1e-3)
    read = []
    monkeypatch.setattr(LoRAProAdamW, "skipped_steps", property(lambda self: read.append(self.first_steps.steps) or 0))
    train(optimizer, model, broken=0, steps=3 * FIRST_STEPS)
    assert read == [FIRST_STEPS]


def test_only_the_first_rank_speaks(monkeypatch, caplog):
    model, loss, _ = two_layers(TwoTowers)
    optimizer = create_lorapro_optimizer(model, lr=1e-3)
    loss().backward()
    optimizer.step()
    monkeypatch.setattr(first_steps, "everyone", lambda: SimpleNamespace(rank=lambda: 1))
    optimizer.finish_training()
    assert not warnings_in(caplog)


def test_gradients_that_an_engine_holds_are_known_by_pair():
    """FSDP2 and ZeRO: what `Access.gradients` finds counts, not the `.grad` of this rank's part."""
    pairs = find_lora_pairs(small_model())
    held = [None, None, torch.ones(2, 7), torch.ones(5, 2)]
    access = SimpleNamespace(
        in_place=False,
        group=None,
        dtype=lambda parameter: parameter.dtype,
        gradients=lambda parameters: held,
        values=lambda parameters: [parameter.detach() for parameter in parameters],
    )
    assert PairOwnership(pairs, access, shared=False).fetch() == [False, True]


# ---- the Trainer side ----


def model_with_an_idle_layer():
    model = tiny_lora()
    layer = find_lora_pairs(model)[3].layer
    layer.forward = layer.base_layer.forward
    return model


@pytest.mark.parametrize("steps", rest_slow([12, 3]))
@pytest.mark.parametrize("way", ["trainer", "callback"])
def test_trainings_short_and_long_are_told(tmp_path: Path, caplog, way, steps):
    if way == "trainer":
        run(tmp_path, build_with={"model": model_with_an_idle_layer()}, max_steps=steps)
    else:
        settings = {"model": model_with_an_idle_layer(), "callbacks": [LoRAProCallback()]}
        build(Trainer, arguments(tmp_path, max_steps=steps), **settings).train()
    (said,) = warnings_in(caplog)
    assert said.startswith(f"1 of 14 LoRA pairs had no gradient in the first {min(steps, 10)} steps")
    assert find_lora_pairs(tiny_lora())[3].name in said


def test_a_trainer_whose_labels_are_all_ignored(tmp_path: Path, caplog):
    rows = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in sequences(16)]
    args = arguments(tmp_path, LoRAProTrainingArguments, max_steps=3)
    LoRAProTrainer(model=tiny_lora(), args=args, train_dataset=rows).train()
    (said,) = warnings_in(caplog)
    assert said.startswith("the gradients of all LoRA pairs were zero in the first 3 steps")
    assert "all labels are -100" in said


def test_a_trainer_whose_scaler_leaves_out_all_steps(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(LoRAProAdamW, "step", lambda self, closure=None: None)
    run(tmp_path, max_steps=12)
    (said,) = warnings_in(caplog)
    assert said.startswith("no step has reached LoRA-Pro's optimizer up to step 10: the gradient scaler of fp16")


def test_a_resumed_trainer_whose_scaler_leaves_out_one_step(tmp_path: Path, caplog, monkeypatch):
    run(tmp_path, max_steps=12, save_strategy="steps", save_steps=12)
    step, left_out = LoRAProAdamW.step, []
    monkeypatch.setattr(
        LoRAProAdamW, "step", lambda self, closure=None: step(self) if left_out else left_out.append(self)
    )
    resumed = build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, max_steps=14))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert left_out and not warnings_in(caplog)
