"""XGBLoRA in trainers: resumed to the bit, saved as one plain adapter, on two ranks, and refused where it must be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer

from grids import rest_slow
from killable import Nursery
from lorapro_hf import (
    BoostingCallback,
    GradientStart,
    LoRAMethod,
    LoRAProCallback,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    find_lora_pairs,
    save_adapter,
)
from lorapro_hf.hub import compose
from lorapro_hf.methods.boosters import boosters_of
from trainer_helpers import arguments, assert_same, build, factors, logged, sequences, tiny_base


def rank_one(**settings: Any) -> PeftModel:
    settings = {"r": 1, "lora_alpha": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(tiny_base(), LoraConfig(**settings))


def trainer_of(folder: Path, model: Any = None, callbacks: Any = (), **settings: Any) -> Any:
    """A trainer whose boosters take two steps each."""
    settings = {"max_steps": 5, "booster_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}
    args = arguments(folder, LoRAProTrainingArguments, **settings)
    return build(LoRAProTrainer, args, model=model or rank_one(), callbacks=[*callbacks])


def boosters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in trainer.model.named_buffers() if ".boosters." in name}


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=sequences(1)[0]["input_ids"][None]).logits


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A training that was not interrupted: two whole boosters, and a third of one step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder, rank_one(lora_dropout=0.1), lora_pro_mode="full")
    trainer.train()
    return folder, trainer


def test_every_save_is_one_adapter_that_stock_peft_loads(whole, tmp_path):
    folder, trainer = whole
    expected, base = output(trainer.model), tiny_base()
    trainer.model.save_pretrained(tmp_path)
    for saved in (folder / "checkpoint-5", tmp_path):
        loaded = PeftModel.from_pretrained(tiny_base(), saved)
        torch.testing.assert_close(output(loaded), expected, rtol=1e-6, atol=1e-6)
        assert loaded.peft_config["default"].r == 3 and not loaded.peft_config["default"].rank_pattern
        assert set(load_file(saved / "adapter_model.safetensors")) == set(get_peft_model_state_dict(loaded))
    for number, rank in ((1, 1), (2, 1), (3, 2), (4, 2)):  # none begins before the step that trains it
        assert LoraConfig.from_pretrained(folder / f"checkpoint-{number}").r == rank
    assert all(
        torch.equal(p, trainer.model.base_model.model.get_parameter(name.replace("proj.", "proj.base_layer.")))
        for name, p in base.named_parameters()
    )
    merged = loaded.merge_and_unload()
    for pair in find_lora_pairs(trainer.model):
        name = pair.name.removeprefix("base_model.model.")
        change = merged.get_parameter(f"{name}.weight").double() - base.get_parameter(f"{name}.weight").double()
        assert 1 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 3


def test_evaluation_sees_all_boosters_and_the_card_tells_of_them(whole, monkeypatch):
    folder, trainer = whole
    loaded = PeftModel.from_pretrained(tiny_base(), folder / "checkpoint-5")
    alone = build(Trainer, arguments(folder / "eval"), model=loaded)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6)
    monkeypatch.setattr(compose, "draw_curves", lambda *_: False)  # which takes seconds
    trainer.create_model_card()
    for card in (folder / "checkpoint-5" / "README.md", folder / "README.md"):
        text = card.read_text()
        assert "one of rank 1 in each 2 steps, on all layers" in text and "| rank r | 3 |" in text


@pytest.mark.parametrize("step", [2, 3])  # a booster is due, and amid one
def test_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path, step):
    folder, trainer = whole
    resumed = trainer_of(tmp_path, rank_one(lora_dropout=0.1), lora_pro_mode="full", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same(factors(resumed), factors(trainer))
    assert_same(boosters(resumed), boosters(trainer))
    assert logged(resumed, "loss") == logged(trainer, "loss")


@pytest.mark.parametrize("settings", rest_slow([{"lora_pro": False}, {"lora_pro_mode": "efficient"}]))
def test_one_booster_is_plain_lora_to_the_bit(tmp_path, settings):
    settings = {"save_strategy": "no", "max_steps": 3, **settings}
    boosted = trainer_of(tmp_path, booster_steps=3, **settings)
    plain = trainer_of(tmp_path, booster_steps=None, **settings)
    for trainer in (boosted, plain):
        trainer.train()
    assert_same(factors(boosted), factors(plain))
    assert not boosters(boosted)


@pytest.mark.slow
def test_without_lora_pro_some_layers_resume_as_well(tmp_path):
    def trainer(folder: Path) -> Any:
        method = BoostingCallback(2, layers=1)
        return trainer_of(folder, callbacks=[method], booster_steps=None, lora_pro=False, max_steps=6)

    one, resumed = trainer(tmp_path), trainer(tmp_path / "again")
    one.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(factors(resumed), factors(one))
    assert_same(boosters(resumed), boosters(one))
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "checkpoint-6")
    torch.testing.assert_close(output(loaded), output(one.model), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_micro_batches_are_no_steps(tmp_path):
    settings = {"save_strategy": "no", "max_steps": 3, "lora_pro_mode": "efficient"}
    parts = trainer_of(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, **settings)
    whole = trainer_of(tmp_path, **settings)
    for trainer in (parts, whole):
        trainer.train()
    assert_same(boosters(parts), boosters(whole), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output(parts.model), output(whole.model), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_beside_a_method_that_reads_moments_in_the_forward_pass(tmp_path):
    has_moments = []

    class Reading(LoRAMethod):
        name, has_state = "reading", False

        def forward_context(self) -> Any:
            state = trainer.optimizer.optimizer.state
            has_moments.append(any(state.get(pair.A) for pair in find_lora_pairs(trainer.model)))
            return super().forward_context()

    trainer = trainer_of(tmp_path, callbacks=[Reading()], lora_pro=False, mgpo_rho=0.05)
    trainer.train()
    assert has_moments == [False, True, False, True, False]
    resumed = trainer_of(tmp_path / "again", lora_pro=False, mgpo_rho=0.05, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(factors(resumed), factors(trainer))


@pytest.mark.slow
def test_the_best_model_has_the_boosters_of_its_step(tmp_path):
    scores = iter([1.0, 0.5, 0.1, 1.0, 1.0])
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": False}
    trainer = trainer_of(tmp_path, metric_for_best_model="score", **settings)
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    trainer.train()
    saved = PeftModel.from_pretrained(tiny_base(), tmp_path / "checkpoint-3")
    torch.testing.assert_close(output(trainer.model), output(saved), rtol=1e-6, atol=1e-6)
    assert {len(value) for name, value in boosters(trainer).items() if name.endswith("A")} == {1}


def test_a_plain_trainer_saves_all_boosters(tmp_path):
    args = arguments(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    callbacks = [BoostingCallback(2), LoRAProCallback()]  # the second one examines each checkpoint
    trainer = build(Trainer, args, model=rank_one(), callbacks=callbacks)
    trainer.train()
    save_adapter(trainer.model, {"mode": "efficient"}, tmp_path / "saved")
    for saved in (tmp_path / "checkpoint-3", tmp_path / "saved"):
        loaded = PeftModel.from_pretrained(tiny_base(), saved)
        torch.testing.assert_close(output(loaded), output(trainer.model), rtol=1e-6, atol=1e-6)
        assert loaded.peft_config["default"].r == 2


@pytest.mark.slow
def test_an_adapter_that_transformers_has_added(tmp_path):
    model = tiny_base()
    model.add_adapter(LoraConfig(r=1, target_modules=["q_proj", "down_proj"]), adapter_name="mine")
    trainer = trainer_of(tmp_path, model, max_steps=3, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path)
    torch.testing.assert_close(output(loaded), output(trainer.model), rtol=1e-6, atol=1e-6)
    assert loaded.peft_config["default"].r == 2


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("settings", [{"lora_pro": False}, {"lora_pro_mode": "full"}])
def test_two_ranks_train_as_one_and_resume_to_the_bit(tmp_path, nursery: Nursery, settings):
    job = {"jobs": "method_jobs", "do": "boost", "settings": {**settings, "learning_rate": 1e-4}}
    (alone,) = nursery.finish(tmp_path / "one", **job)
    both = nursery.finish(tmp_path / "two", ranks=2, **job)
    resumed = nursery.finish(tmp_path / "again", ranks=2, resume=str(tmp_path / "two" / "checkpoint-3"), **job)
    for of_rank in (*both, *resumed):
        assert_same(of_rank, both[0])
    assert_same(both[0], alone, rtol=2e-2, atol=2e-5)


# ---- refused ----


def test_settings_without_meaning_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"booster_steps=0 must be a whole number of optimizer steps, 1 or more"):
        LoRAProTrainingArguments(str(tmp_path), booster_steps=0)
    with pytest.raises(ValueError, match=r"the rank of its adapter is 4, but that of a booster 1\. Set r=1 in Lora"):
        trainer_of(tmp_path, rank_one(r=4)).train()
    with pytest.raises(ValueError, match=r"'xgblora' cannot be combined with gradient_start: each booster starts from"):
        trainer_of(tmp_path, callbacks=[GradientStart()]).train()
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False, booster_steps=2)
    with pytest.raises(ValueError, match=r"Trainer does not read booster_steps=2.* callbacks=\[BoostingCallback\(2\)"):
        build(Trainer, args, model=rank_one()).train()
    args = arguments(tmp_path, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps")
    with pytest.raises(ValueError, match=r"cannot load the boosters of its best checkpoint\. Use LoRAProTrainer"):
        build(Trainer, args, model=rank_one(), callbacks=[BoostingCallback(2)]).train()


def test_a_training_without_it_is_refused_while_the_model_has_boosters(whole, tmp_path):
    args = arguments(tmp_path, LoRAProTrainingArguments)
    with pytest.raises(ValueError, match=r"boosters from an earlier training by XGBLoRA.*Set booster_steps"):
        build(LoRAProTrainer, args, model=copy.deepcopy(whole[1].model)).train()


def test_an_adapter_that_was_copied_without_the_boosters_is_refused(whole):
    model = copy.deepcopy(whole[1].model)
    BoostingCallback(2).before_training(model, [])
    model.add_adapter("ref", model.peft_config["default"])
    with pytest.raises(
        ValueError,
        match=r"the adapter 'ref', such as TRL's reference, has no part of its boosters\. Save the model before",
    ):
        BoostingCallback(2).before_training(model, [])


def test_a_checkpoint_of_other_layers_is_refused(whole):
    method = BoostingCallback(2)
    method.before_training(rank_one(target_modules=["q_proj"]), None)
    with pytest.raises(ValueError, match="holds boosters of another shape, or of a layer without an adapter"):
        method.load_state_dict(whole[1].lora_methods[0].state_dict())
    assert not any(boosters_of(pair.layer) for pair in method._pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"booster_steps": 3}, r"XGBLoRA's steps_per_booster=2, but this training has 3\. Resume with steps_per_boos"),
        ({"booster_steps": None, "layers": 1}, r"XGBLoRA's layers=None, but this training has 1\. Resume with layers="),
        ({"booster_steps": None}, r"the method 'xgblora', .* Add the method, or start a new .* is_trainable=True\)\.$"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(whole, tmp_path, settings, message):
    layers = settings.pop("layers", None)
    callbacks = [] if layers is None else [BoostingCallback(2, layers=layers)]
    trainer = trainer_of(tmp_path, callbacks=callbacks, lora_pro_mode="full", **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-3"))
