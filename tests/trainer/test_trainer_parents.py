"""Trainers whose signatures differ from transformers' own, below the mixin: on, off, and beside the parent alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from grids import rest_slow
from lorapro_hf import LoRAProAdamW, LoRAProTrainer, LoRAProTrainerMixin, LoRAProTrainingArguments
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from lorapro_hf.trainer.parents import handed, replaced
from trainer_helpers import arguments, assert_same, build, factors

TIMINGS = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


class Eager(Trainer):
    """Builds its optimizer before its `__init__` ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.early = self.create_optimizer()


class Bare(Trainer):
    """Takes no arguments where transformers' methods have some."""

    def train(self) -> Any:
        return super().train()

    def create_model_card(self) -> str:
        super().create_model_card(model_name="bare")
        return "written"


class Named(Trainer):
    """Has fewer parameters, under names of its own."""

    def _load_from_checkpoint(self, path: str) -> None:
        super()._load_from_checkpoint(path)

    def _save(self, folder: str) -> None:
        super()._save(folder)

    def _save_rng_state(self, folder: str) -> None:
        super()._save_rng_state(folder)

    def _save_optimizer_and_scheduler(self, folder: str) -> None:
        super()._save_optimizer_and_scheduler(folder)

    def _load_optimizer_and_scheduler(self, folder: str) -> None:
        super()._load_optimizer_and_scheduler(folder)
        self.loaded = folder

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir or self.args.output_dir)


class PassingOn(Trainer):
    """Hands on what it gets."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)


PARENTS = pytest.mark.parametrize("parent", rest_slow([Eager, Bare, Named, PassingOn]), ids=lambda cls: cls.__name__)


def mixed(parent: type[Trainer]) -> type[Trainer]:
    return type(f"LoRAPro{parent.__name__}", (LoRAProTrainerMixin, parent), {})


def trainer_of(cls: type[Trainer], folder: Path, **settings: Any) -> Any:
    kind = LoRAProTrainingArguments if issubclass(cls, LoRAProTrainerMixin) else TrainingArguments
    return build(cls, arguments(folder, kind, **{**SAVING, **settings}))


def history(trainer: Trainer) -> list[dict]:
    return [{k: v for k, v in entry.items() if k not in TIMINGS} for entry in trainer.state.log_history]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@PARENTS
def test_turned_off_it_is_the_parent(parent: type[Trainer], tmp_path: Path):
    alone = trainer_of(parent, tmp_path / "alone")
    off = trainer_of(mixed(parent), tmp_path / "off", lora_pro=False)
    for trainer in (alone, off):
        trainer.train()
        trainer.create_model_card()
    assert type(unwrap_optimizer(off.optimizer)) is torch.optim.AdamW
    assert_same(factors(off), factors(alone))
    assert history(off) == history(alone)
    assert files(tmp_path / "off") == files(tmp_path / "alone")
    if parent is Bare:
        return
    for trainer, name in ((alone, "alone"), (off, "off")):
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
    assert_same(factors(off), factors(alone))
    assert history(off) == history(alone)


@PARENTS
def test_turned_on_it_trains_saves_and_resumes_as_lorapro_trainer(parent: type[Trainer], tmp_path: Path):
    expected = trainer_of(LoRAProTrainer, tmp_path / "expected")
    on = trainer_of(mixed(parent), tmp_path / "on")
    for trainer in (expected, on):
        trainer.train()
        trainer.create_model_card()
    assert isinstance(unwrap_optimizer(on.optimizer), LoRAProAdamW)
    assert_same(factors(on), factors(expected))
    assert history(on) == history(expected)
    assert files(tmp_path / "on") == files(tmp_path / "expected")
    if parent is Bare:
        return
    resumed = trainer_of(mixed(parent), tmp_path / "resumed")
    resumed.train(str(tmp_path / "on" / "checkpoint-2"))
    assert_same(factors(resumed), factors(expected))
    assert parent is not Named or resumed.loaded == str(tmp_path / "on" / "checkpoint-2")


def test_an_optimizer_of_the_parents_init_is_the_one_that_steps(tmp_path: Path):
    trainer = trainer_of(mixed(Eager), tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    assert isinstance(trainer.early, LoRAProAdamW)
    assert unwrap_optimizer(trainer.optimizer) is trainer.early


@pytest.mark.parametrize("call", [{"resume_from_checkpoint": "somewhere"}, {"unheard_of": 1}])
@pytest.mark.parametrize("lora_pro", [True, False])
def test_arguments_that_the_parent_does_not_take_are_its_own_error(call: dict, lora_pro: bool, tmp_path: Path):
    (tmp_path / "somewhere").mkdir()
    trainer = trainer_of(mixed(Bare), tmp_path, lora_pro=lora_pro)
    trainer._examine = lambda asked: asked
    with pytest.raises(TypeError, match=f"got an unexpected keyword argument '{next(iter(call))}'"):
        trainer.train(**call)


def test_results_of_the_parent_are_handed_back(tmp_path: Path):
    trainer = trainer_of(mixed(Bare), tmp_path, max_steps=1)
    assert trainer.train().global_step == 1
    assert trainer.create_model_card() == "written"


def test_arguments_are_found_by_the_parents_names():
    class First(Trainer):
        def train(self, epochs: int, *args: Any, **kwargs: Any) -> Any:
            return super().train(*args, **kwargs)

    def given(parent: type, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return handed(mixed(parent), LoRAProTrainerMixin, "train", args, kwargs)

    assert given(Trainer, "here") == given(PassingOn, "here") == {"resume_from_checkpoint": "here"}
    assert given(Trainer, "here", None, ["loss"])["ignore_keys_for_eval"] == ["loss"]
    assert given(First, 3, resume_from_checkpoint=True) == {"epochs": 3, "resume_from_checkpoint": True}
    assert given(Bare, "too much") == {}

    def asked(parent: type, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return replaced(given(parent, *args, **kwargs), args, kwargs, "resume_from_checkpoint", "there")

    assert asked(Trainer, True, None) == (("there", None), {})
    assert asked(First, 3, resume_from_checkpoint=True) == ((3,), {"resume_from_checkpoint": "there"})


def test_a_push_during_training_asks_the_parent_for_no_more_than_it_takes(tmp_path: Path):
    class Pushing(Bare):
        def _push_from_checkpoint(self, folder: str) -> None:
            self.pushed = folder

    trainer = trainer_of(mixed(Pushing), tmp_path, max_steps=1)
    trainer.train()
    trainer._push_from_checkpoint("checkpoint-1")
    assert trainer.pushed == "checkpoint-1"
    assert "LoRA-Pro" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("lora_pro", [True, False])
def test_a_repository_that_cannot_be_made_is_explained_while_lora_pro_is_on(
    lora_pro: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    class Unreachable(Trainer):
        def init_hf_repo(self, token: str | None = None) -> None:
            raise ConnectionError("nothing there")

    with pytest.raises(ConnectionError, match="nothing there"):
        trainer_of(mixed(Unreachable), tmp_path, lora_pro=lora_pro, push_to_hub=True)
    assert ("No repository was made" in caplog.text) is lora_pro
