"""After a training with `load_best_model_at_end` the model has the best checkpoint's weights, and the card tells so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from grids import rest_slow
from lorapro_hf import LoRAProTrainer, LoRAProTrainerMixin, LoRAProTrainingArguments, create_lorapro_optimizer
from trainer_helpers import arguments, assert_same, build, differ, factors, tiny_base, tiny_lora

BEST, LAST = 1, 3
SETTINGS: dict[str, Any] = {
    "max_steps": LAST,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
}


class Kept(TrainerCallback):
    """What was trained as it was when the best checkpoint was saved, and at the last step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.at[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def prepared(folder: Path, model: nn.Module, cls: type[Trainer] = LoRAProTrainer, **settings: Any) -> tuple[Any, Kept]:
    """A trainer whose first evaluation is its best, and a look at its weights."""
    kept, scores = Kept(), iter([3.0, 2.0, 1.0])
    build_with = {"callbacks": [kept], "compute_metrics": lambda _: {"score": next(scores)}}
    build_with |= {name: settings.pop(name) for name in ("optimizers",) if name in settings}
    given = arguments(folder, LoRAProTrainingArguments, **{**SETTINGS, **settings})
    return build(cls, given, model=model, **build_with), kept


def two(**of_other: Any) -> nn.Module:
    model = tiny_lora(target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **of_other}))
    return model


def other_active() -> nn.Module:
    model = two()
    model.set_adapter("other")
    return model


def other_shape_active() -> nn.Module:
    model = two(r=2)
    model.set_adapter("other")
    return model


def both_active() -> nn.Module:
    model = two(r=2)
    model.base_model.set_adapter(["other", "default"])
    return model


def named_mine(name: str = "mine") -> nn.Module:
    return get_peft_model(tiny_base(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name)


def with_a_slash() -> nn.Module:
    """As adapters of the Hub are often named, which PEFT saves in a folder within a folder."""
    return named_mine("me/mine")


def added() -> nn.Module:
    model = tiny_base()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "mine")
    return model


MODELS = [other_active, other_shape_active, both_active, named_mine, with_a_slash, added, tiny_lora]


@pytest.mark.parametrize("make", rest_slow(MODELS))
def test_best_weights_to_the_bit(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, kept = prepared(tmp_path, make())
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert differ(kept.at[LAST], kept.at[BEST])
    assert_same(factors(trainer), kept.at[BEST])
    assert_same({n: p.detach() for n, p in trainer.model.named_parameters() if not p.requires_grad}, frozen)
    assert trainer.loaded_best_checkpoint == str(tmp_path / f"checkpoint-{BEST}")
    assert not trainer.model.training  # as Trainer leaves a PEFT model that it has loaded
    assert not [each for each in caplog.records if "best" in each.getMessage()]


def test_saved_is_what_was_best(tmp_path: Path) -> None:
    trainer, _ = prepared(tmp_path, other_active())
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    files = [tmp_path / name / "other" / "adapter_model.safetensors" for name in ("final", f"checkpoint-{BEST}")]
    assert_same(*map(load_file, files))


# ---- and the training goes on ----


@pytest.mark.parametrize(
    ("dtype", "masters", "is_given"),
    rest_slow([(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float16, False, False)]),
)
def test_training_goes_on_from_the_best_weights(
    dtype: torch.dtype, masters: bool, is_given: bool, tmp_path: Path
) -> None:
    """To the bit as after the same values have been written into the parameters by hand."""

    def trained_once(folder: Path, **settings: Any) -> tuple[Any, Kept]:
        settings |= {"lora_pro_master_factors": masters}
        model = tiny_lora(target_modules=["q_proj"]).to(dtype)
        if is_given:
            config = LoRAProTrainingArguments(str(folder), **settings, use_cpu=True).lora_pro_config
            settings["optimizers"] = (create_lorapro_optimizer(model, lr=1e-2, config=config), None)
        trainer, kept = prepared(folder, model, **settings)
        trainer.train()
        return trainer, kept

    def goes_on(trainer: Any) -> dict[str, torch.Tensor]:
        trainer.args.load_best_model_at_end = False
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.train()
        return factors(trainer)

    trainer, kept = trained_once(tmp_path / "best")
    parameters = list(map(id, trainer.model.parameters()))
    assert_same(factors(trainer), kept.at[BEST])
    assert differ(kept.at[BEST], kept.at[LAST])
    by_hand, _ = trained_once(tmp_path / "by hand", load_best_model_at_end=False)
    by_hand.model.load_state_dict(kept.at[BEST], strict=False)
    assert_same(goes_on(trainer), goes_on(by_hand))
    assert list(map(id, trainer.model.parameters())) == parameters
    assert {p.dtype for p in trainer.model.parameters()} == {dtype}
    assert trainer.loaded_best_checkpoint is None  # the second training has loaded nothing


# ---- what cannot be loaded ----


def lost(folder: Path) -> None:
    shutil.rmtree(folder / "other")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def of_other_shape(folder: Path) -> None:
    shutil.copy(folder / "adapter_model.safetensors", folder / "other")


def cut_off(folder: Path) -> None:
    file = folder / "other" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


class Damaging(TrainerCallback):
    def __init__(self, damage: Any, folder: Path) -> None:
        self.damage, self.folder = damage, folder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == LAST:
            self.damage(self.folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    rest_slow(
        [
            (lost, "trains the adapter 'other', but the checkpoint holds ['default']"),
            (gone, None),  # of which transformers warns
            (of_other_shape, "has shape [4, 32] in the checkpoint, but has shape [2, 32] in the model"),
            (cut_off, "could not be loaded"),
        ],
        fast=2,
    ),
)
def test_a_training_does_not_end_in_an_exception(
    damage: Any, says: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, kept = prepared(tmp_path, other_shape_active())
    trainer.add_callback(Damaging(damage, tmp_path / f"checkpoint-{BEST}"))
    trainer.train()
    warnings = [each.getMessage() for each in caplog.records if each.name == "lorapro_hf.trainer.loading"]
    if says is not None:
        assert len(warnings) == 1 and says in warnings[0] and "keeps the weights of its last step" in warnings[0]
    assert_same(factors(trainer), kept.at[LAST])
    assert trainer.loaded_best_checkpoint is None


@pytest.mark.parametrize(("damage", "score"), [(None, 3.0), (lost, 1.0)], ids=["loaded", "not loaded"])
def test_card_tells_of_the_weights_that_are_there(damage: Any, score: float, tmp_path: Path) -> None:
    trainer, _ = prepared(tmp_path, other_active())
    if damage is not None:
        trainer.add_callback(Damaging(damage, tmp_path / f"checkpoint-{BEST}"))
    trainer.train()
    trainer.create_model_card(dataset_tags="me/sums")
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {result.metric_type: result.metric_value for result in results}["score"] == score


# ---- parents ----


class Parent(Trainer):
    """Loads something of its own, too."""

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.own = "best"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.own = "resumed"


class ProParent(LoRAProTrainerMixin, Parent):
    pass


def test_a_parent_loads_its_own(tmp_path: Path) -> None:
    trainer, kept = prepared(tmp_path, other_active().to(torch.bfloat16), ProParent)
    trainer.train()
    assert_same(factors(trainer), kept.at[BEST])
    assert trainer.own == "best"
    again, _ = prepared(tmp_path, other_active().to(torch.bfloat16), ProParent, load_best_model_at_end=False)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{BEST}"))
    assert_same(factors(again), kept.at[LAST])
    assert again.own == "resumed"


class WritingLate(Trainer):
    """Saves no weights before the best checkpoint is looked for, as under FSDP."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        pass


class ProWritingLate(LoRAProTrainerMixin, WritingLate):
    pass


def test_the_newest_checkpoint_can_be_the_best_before_its_weights_are_written(tmp_path: Path) -> None:
    """Else some ranks would know of it and others not, according to who has made the folder by then."""
    trainer, _ = prepared(tmp_path, tiny_lora(), ProWritingLate, max_steps=BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{BEST}")
    assert trainer.loaded_best_checkpoint is None  # it holds no weights


def test_without_lora_pro_it_is_the_parents(tmp_path: Path) -> None:
    """Which loads `default` over the adapter that was trained."""
    trainer, _ = prepared(tmp_path, other_active(), lora_pro=False)
    untrained = load_adapter_of(trainer.model, "default")
    trainer.train()
    assert_same(load_adapter_of(trainer.model, "other"), untrained)


def load_adapter_of(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The factors of an adapter, by the names of their layers."""
    named = {n: p.detach().clone() for n, p in model.named_parameters() if f".{adapter}." in n}
    return {name.replace(f".{adapter}.", "."): tensor for name, tensor in named.items()}
