"""BeamLoRA in trainers: resumed to the bit, on two ranks, saved as plain LoRA and set by a flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from lorapro_hf import (
    BeamLoRACallback,
    FlatLoRACallback,
    LoRAProCallback,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    LoRASB,
)
from lorapro_hf.checkpoints.method_states import load_method_file
from trainer_helpers import arguments, assert_same, build, factors, sequences, tiny_base, tiny_lora

SETTINGS: dict[str, Any] = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3}
MODES = [
    {"lora_pro_mode": "efficient"},
    *(
        pytest.param(settings, marks=pytest.mark.slow)
        for settings in (
            {"lora_pro": False},
            {"lora_pro": False, "flat_lora_sigma": 0.05},
            {"lora_pro_mode": "full"},
            {"lora_pro_mode": "rite"},
            {"lora_pro_mode": "factored", "lora_pro_master_factors": True},
        )
    ),
]


def trainer_of(folder: Path, cls: type = LoRAProTrainer, method: Any = None, **settings: Any) -> Any:
    method = method or BeamLoRACallback(4, keep=0.6, until=1.0)
    kind = LoRAProTrainingArguments if cls is LoRAProTrainer else None
    settings = {**SETTINGS, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **settings}
    args = arguments(folder, *([kind] if kind else []), **settings)
    model = tiny_lora(rank_pattern={"q_proj": 3}, lora_dropout=0.1)
    model = model.to(torch.bfloat16) if settings.get("lora_pro_master_factors") else model
    return build(cls, args, model=model, callbacks=[method])


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=sequences(1)[0]["input_ids"][None]).logits


def gates(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        name: module.beamlora_gates["default"]
        for name, module in trainer.model.named_modules()
        if "beamlora_gates" in vars(module)
    }


@pytest.mark.parametrize("settings", MODES)
def test_resumed_equals_uninterrupted_to_the_bit_and_saves_are_plain_lora(tmp_path, settings):
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    # between a snapshot and a replacement; step 6 is that of a snapshot
    for step in (3,) if settings == {"lora_pro_mode": "efficient"} else (3, 6):
        resumed = trainer_of(tmp_path / f"from-{step}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(factors(resumed), factors(whole))
        assert_same(gates(resumed), gates(whole))
    assert len(gates(whole)) == 14 and any(gate.any() for gate in gates(whole).values())
    whole.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "whole" / "checkpoint-12"):
        loaded = PeftModel.from_pretrained(tiny_base(), folder).to(next(whole.model.parameters()).dtype)
        torch.testing.assert_close(output(loaded), output(whole.model), rtol=1e-5, atol=1e-6)


def test_a_flag_adds_it_and_the_card_tells(tmp_path):
    args = arguments(tmp_path, LoRAProTrainingArguments, beamlora_every=2, lora_pro_mode="efficient")
    trainer = build(LoRAProTrainer, args)
    (method,) = trainer.lora_methods
    assert isinstance(method, BeamLoRACallback) and method.every == 2
    trainer.train()
    assert len(gates(trainer)) == 14
    trainer.create_model_card()
    assert "| BeamLoRA | every=2, keep=0.95, temperature=0.05, until=0.666667 |" in (tmp_path / "README.md").read_text()


def test_what_cannot_be_combined_or_resumed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="beamlora_every=3 must be an even number of steps, 2 or more"):
        arguments(tmp_path, LoRAProTrainingArguments, beamlora_every=3)
    with pytest.raises(ValueError, match=r"Trainer does not read beamlora_every=2\. .* callbacks=\[BeamLoRACallback"):
        build(Trainer, arguments(tmp_path, LoRAProTrainingArguments, beamlora_every=2, lora_pro=False)).train()
    with pytest.raises(ValueError, match="'beamlora' was given twice"):
        trainer_of(tmp_path, beamlora_every=2).train()
    with pytest.raises(ValueError, match="'beamlora' cannot be combined with lora_sb: LoRA-SB fixes both factors"):
        build(
            LoRAProTrainer,
            arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False),
            callbacks=[BeamLoRACallback(2), LoRASB()],
        ).train()
    with pytest.raises(ValueError, match=r"^every=4 leaves BeamLoRA no time .* in 6 steps: set every to 2 or"):
        trainer_of(tmp_path, max_steps=6).train()
    with pytest.raises(ValueError, match=r"max_steps=8, but the trainer takes 12 steps\. Leave max_steps out"):
        trainer_of(tmp_path, method=BeamLoRACallback(4, max_steps=8)).train()
    with pytest.raises(ValueError, match="LoRAProCallback rewrites the gradients from which BeamLoRA learns"):
        build(Trainer, arguments(tmp_path), callbacks=[BeamLoRACallback(2), LoRAProCallback()]).train()

    first = trainer_of(tmp_path, max_steps=8, save_steps=2)
    first.train()
    state = first.lora_methods[0].state_dict()
    with pytest.raises(ValueError, match=r"BeamLoRA's keep=0\.6, but this training has 0\.7\. Resume with"):
        trainer_of(tmp_path, method=BeamLoRACallback(4, keep=0.7, until=1.0)).train(resume_from_checkpoint=True)
    other = BeamLoRACallback(4, keep=0.6, until=1.0)
    other.before_training(tiny_lora(), None)
    with pytest.raises(ValueError, match=r"q_proj\.default: the checkpoint holds no gate of it, or of another rank"):
        other.load_state_dict(state)


@pytest.mark.parametrize("settings", [{"lora_pro": False}, {"lora_pro_mode": "efficient"}])
def test_noise_sized_by_the_weight_alone_does_not_depend_on_the_order_of_both_methods(tmp_path, settings):
    found = []
    for places in ((0, 1), (1, 0)):
        both = [BeamLoRACallback(2, keep=0.6, until=1.0), FlatLoRACallback(0.05, seed=1)]
        args = arguments(tmp_path, LoRAProTrainingArguments, max_steps=4, save_strategy="no", **settings)
        trainer = build(LoRAProTrainer, args, callbacks=[both[place] for place in places])
        trainer.train()
        found.append(factors(trainer))
    assert_same(*found)
    args = arguments(tmp_path, LoRAProTrainingArguments, beamlora_every=2, flat_lora_sigma=0.1, flat_lora_beta=0.01)
    with pytest.raises(ValueError, match=r"beamlora: .* Leave out beta \(flat_lora_beta\), or BeamLoRA \(beam"):
        build(LoRAProTrainer, args).train()


def test_a_plain_trainer_trains_with_it(tmp_path):
    found = []
    for cls, settings in ((Trainer, {}), (LoRAProTrainer, {"lora_pro": False})):
        trainer = trainer_of(tmp_path, cls, save_strategy="no", **settings)
        trainer.train()
        found.append(factors(trainer))
    assert_same(*found)


@pytest.mark.slow
def test_the_best_model_has_its_gates(tmp_path):
    scores = iter([0.1, 1.0, 1.0, 1.0])
    settings = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": False}
    trainer = trainer_of(tmp_path, metric_for_best_model="score", lora_pro_mode="efficient", **settings)
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    saved = PeftModel.from_pretrained(tiny_base(), tmp_path / "checkpoint-3")
    torch.testing.assert_close(output(trainer.model), output(saved), rtol=1e-5, atol=1e-6)
    state = load_method_file(tmp_path / "checkpoint-3", "beamlora", trainer.model)
    for name, gate in gates(trainer).items():
        assert torch.equal(gate, state["gates"][f"{name}.default"]["q"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [{"lora_pro": False}, {"lora_pro_mode": "efficient"}, {"lora_pro_mode": "rite", "lora_pro_master_factors": True}],
)
def test_two_ranks_train_as_one_and_resume_to_the_bit(tmp_path, nursery, settings):
    job = {"jobs": "method_jobs", "do": "beamlora", "settings": {**settings, "learning_rate": 1e-3}}
    (alone,) = nursery.finish(tmp_path / "one", **job)
    whole = nursery.finish(tmp_path / "two", ranks=2, **job)
    for step in (3, 6):
        resume = str(tmp_path / "two" / f"checkpoint-{step}")
        for of_rank in nursery.finish(tmp_path / f"from-{step}", ranks=2, resume=resume, **job):
            assert_same(of_rank, whole[0])
    assert_same(whole[1], whole[0])
    if "lora_pro_master_factors" not in settings:  # rounded gradients of halves of a batch
        assert_same(whole[0], alone, rtol=1e-3, atol=1e-5)
