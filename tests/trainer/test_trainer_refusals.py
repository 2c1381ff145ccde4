"""What LoRAProTrainer refuses: each with the thing and the remedy named, before anything is trained or lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from transformers import Trainer

from grids import rest_slow
from lorapro_hf import (
    LoRAProCallback,
    LoRAProOptimizerFactory,
    LoRAProTrainer,
    LoRAProTrainerMixin,
    LoRAProTrainingArguments,
    create_lorapro_optimizer,
)
from trainer_helpers import EFFICIENT, arguments, assert_same, build, factors, run, sequences, tiny_base, tiny_lora


def frozen() -> Any:
    return tiny_lora(inference_mode=True)


@pytest.mark.parametrize(
    ("settings", "build_with", "message"),
    [
        ({}, {"model": tiny_base}, "no LoRA layer; wrap it first"),
        ({}, {"model": frozen}, "frozen, in inference mode.*is_trainable=True"),
        ({"optim": "adafactor"}, {}, "optim='adafactor' would be ignored.*default.*--no_lora_pro.*LoRAProCallback"),
        ({"optim_args": "a=1"}, {}, "optim_args='a=1' would be ignored.*unset.*--no_lora_pro.*LoRAProCallback"),
        ({"optim_target_modules": "all"}, {}, "optim_target_modules='all' would be ignored.*unset.*--no_lora_pro"),
        ({}, {"callbacks": lambda: [LoRAProCallback()]}, "project the gradients twice.*Drop the callback"),
        ({}, {"lora_pro_config": lambda: EFFICIENT}, "settings twice.*drop lora_pro_config="),
        (
            {},
            {"optimizers": lambda: (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), None)},
            "optimizers= holds a SGD.*LoRAProAdamW.*--no_lora_pro",
        ),
        (
            {},
            {"optimizer_cls_and_kwargs": lambda: (torch.optim.SGD, {"lr": 1.0})},
            "optimizer_cls_and_kwargs= names SGD.*LoRAProOptimizerFactory.*--no_lora_pro",
        ),
        (
            {"lora_pro_mode": "full"},
            {"optimizer_cls_and_kwargs": lambda: (LoRAProOptimizerFactory, {"lr": 1.0, "mode": "efficient"})},
            "optimizer_cls_and_kwargs= was built with .*'efficient'.*told .*'full'.*State the settings once",
        ),
    ],
)
def test_wrong_use_raises_at_construction(tmp_path: Path, settings: dict, build_with: dict, message: str):
    args = arguments(tmp_path, LoRAProTrainingArguments, **settings)
    with pytest.raises(ValueError, match=message):
        build(LoRAProTrainer, args, **{name: make() for name, make in build_with.items()})


def test_given_optimizer_of_another_mode_raises(tmp_path: Path):
    model = tiny_lora()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config=EFFICIENT)
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro_mode="full")
    with pytest.raises(ValueError, match=r"optimizers= was built with .*'efficient'.*told .*'full'"):
        build(LoRAProTrainer, args, model=model, optimizers=(optimizer, None))


def test_setting_without_a_meaning_in_the_mode_raises_at_construction(tmp_path: Path):
    with pytest.raises(ValueError, match=r"'efficient' does not know it, so rite_clip=0.1.*Leave it out"):
        build(LoRAProTrainer, arguments(tmp_path), lora_pro_config={"mode": "efficient", "rite_clip": 0.1})


def test_config_of_a_wrong_kind_raises(tmp_path: Path):
    with pytest.raises(TypeError, match=r"must be a LoRAProConfig or a dictionary of its settings .* got 'efficient'"):
        build(LoRAProTrainer, arguments(tmp_path), lora_pro_config="efficient")
    with pytest.raises(ValueError, match=r"'lr'.*no LoRA-Pro settings"):
        build(LoRAProTrainer, arguments(tmp_path), lora_pro_config={"lr": 1.0})


def test_model_init_is_checked_at_construction(tmp_path: Path):
    with pytest.raises(ValueError, match="no LoRA layer"):
        build(LoRAProTrainer, arguments(tmp_path), model_init=tiny_base)


def test_settings_changed_between_trainings_raise(tmp_path: Path):
    trainer = run(tmp_path, lora_pro_mode="full", max_steps=1)
    trainer.args.lora_pro_mode = "efficient"  # the optimizer stays, as in Trainer
    with pytest.raises(ValueError, match=r"built with .*'full'.*told .*'efficient'"):
        trainer.train()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="holds a SGD"):
        trainer.train()


@pytest.mark.parametrize("mode", rest_slow(["full", "efficient"]))
def test_lora_pro_turned_off_for_a_checkpoint_raises_before_anything_is_loaded(tmp_path: Path, mode: str):
    run(tmp_path, lora_pro_mode=mode, save_strategy="steps", save_steps=1, max_steps=1)
    trainer = build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False))
    before = factors(trainer)
    message = rf"optimizer\.pt: it was written with LoRA-Pro in mode '{mode}', but LoRA-Pro is off.*--no_lora_pro"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert_same(factors(trainer), before)


def test_lora_pro_turned_on_for_a_checkpoint_raises_before_anything_is_loaded(tmp_path: Path):
    run(tmp_path, lora_pro=False, save_strategy="steps", save_steps=1, max_steps=1)
    trainer = build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, lora_pro_mode="full"))
    before = factors(trainer)
    with pytest.raises(ValueError, match=r"the checkpoint is of another optimizer, but .* has LoRA-Pro mode 'full'"):
        trainer.train(resume_from_checkpoint=True)
    assert_same(factors(trainer), before)


def test_lora_pro_turned_off_leaves_other_checkpoints_to_the_parent(tmp_path: Path):
    run(tmp_path, lora_pro=False, save_strategy="steps", save_steps=1, max_steps=1, save_only_model=True)
    args = arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False, max_steps=2)
    trainer = build(LoRAProTrainer, args)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        build(LoRAProTrainer, arguments(tmp_path / "empty", LoRAProTrainingArguments, lora_pro=False)).train(True)


def test_lora_pro_turned_off_between_trainings_raises(tmp_path: Path):
    trainer = run(tmp_path, max_steps=1)
    trainer.args.lora_pro = False
    with pytest.raises(ValueError, match=r"lora_pro=False, but .* holds a LoRAProAdamW.*trainer\.optimizer = None"):
        trainer.train()
    trainer.optimizer = None
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"


def test_evaluation_needs_no_trainable_adapter(tmp_path: Path):
    trainer = LoRAProTrainer(frozen(), arguments(tmp_path, LoRAProTrainingArguments), eval_dataset=sequences(4))
    assert trainer.evaluate()["eval_loss"] > 0


def test_mixin_behind_the_trainer_raises():
    with pytest.raises(TypeError, match="LoRAProTrainerMixin must come before the trainer"):
        type("Wrong", (Trainer, LoRAProTrainerMixin), {})


def test_optimizer_of_an_overriding_subclass_raises(tmp_path: Path):
    class Overriding(LoRAProTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            return self.optimizer

    trainer = build(Overriding, arguments(tmp_path, LoRAProTrainingArguments, max_steps=1))
    with pytest.raises(RuntimeError, match="the trainer steps a AdamW: a create_optimizer overrides the mixin's"):
        trainer.train()


def test_optimizer_of_another_model_raises(tmp_path: Path):
    optimizer = create_lorapro_optimizer(tiny_lora(), lr=1e-2)
    trainer = build(LoRAProTrainer, arguments(tmp_path, max_steps=1), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"14 of the model are not in the optimizer, .*the optimizer of another model"):
        trainer.train()


def test_callback_added_later_raises(tmp_path: Path):
    trainer = build(LoRAProTrainer, arguments(tmp_path))
    trainer.add_callback(LoRAProCallback())
    with pytest.raises(ValueError, match="project the gradients twice"):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DistributedType.FSDP, "FSDP1.*fsdp_version: 2.*--no_lora_pro"),
        (DistributedType.MEGATRON_LM, "MEGATRON_LM.*FSDP2 or DeepSpeed, or .*--no_lora_pro"),
    ],
)
def test_engines_that_hide_gradients_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType, message: str
):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(RuntimeError, match=message):
        build(LoRAProTrainer, arguments(tmp_path))
    build(LoRAProTrainer, arguments(tmp_path, LoRAProTrainingArguments, lora_pro=False))
