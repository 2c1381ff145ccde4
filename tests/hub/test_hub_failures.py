"""Cards that cannot be written, and values that no card can show: neither ends a training nor loses a text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hub_server import card_problems
from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.hub import compose, create_model_card, push, push_adapter, save_adapter
from lorapro_hf.hub.curves import loss_curves
from lorapro_hf.hub.logs import evaluations_by_step
from lorapro_hf.trainer import hub_mixin
from trainer_helpers import arguments, build, tiny_lora

BROKEN = {
    "no YAML": b"---\nlicense: [mit\n---\n\n# By hand\n",
    "no mapping": b"---\n- mit\n---\n\n# By hand\n",
    "no names": b"---\n1: mit\n---\n\n# By hand\n",
    "latin-1": "---\nlicense: mit\n---\n\n# Größe\n".encode("latin-1"),
}
NO_NUMBERS = [[0.1, 0.2], {"a": 1.0}, None, "0.5", True, 10**400, torch.ones(2), np.ones(2), float("nan"), 1j]


class CardAtEachCheckpoint(LoRAProTrainer):
    """Writes a card at each checkpoint, as TRL's trainers do."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.create_model_card()
        super()._save_checkpoint(*args, **kwargs)


def trainer_in(folder: Path, **more: Any) -> CardAtEachCheckpoint:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    return build(CardAtEachCheckpoint, arguments(folder, LoRAProTrainingArguments, **settings), **more)


def warnings_of_cards(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record for record in caplog.records if record.name.startswith("lorapro_hf.hub")]
    return [record.getMessage() for record in found if record.levelname == "WARNING"]


def test_what_is_no_number_stays_out_of_curves_and_evaluations() -> None:
    for value in NO_NUMBERS:
        assert loss_curves(log_with(value)) == {
            "loss": [(2, 2.0), (3, 1.0)], "eval_loss": [(2, 1.5), (3, 0.5)], "eval_a_loss": [(2, 1.25)]
        }  # fmt: skip
        second = next(row for row in evaluations_by_step(log_with(value)) if row["step"] == 2)
        assert second == {"step": 2, "epoch": 1.0, "training loss": 2.0, "loss": 1.5, "a_loss": 1.25}


@pytest.mark.parametrize("value", [[0.1, 0.2], *(pytest.param(v, marks=pytest.mark.slow) for v in NO_NUMBERS[1:])])
def test_what_is_no_number_stays_out_of_the_card(value: Any, tmp_path: Path) -> None:
    log, metrics = log_with(value), {"good": 0.25, "bad": value}
    card = create_model_card(tiny_lora(), None, tmp_path, log_history=log, metrics=metrics, with_picture=False)
    assert card_problems(card.content) == []
    assert [result.metric_type for result in card.data.eval_results] == ["good"]
    assert "| 2 | 1 | 2 | 1.5 | 1.25 |" in re.sub(" +", " ", card.text)


def log_with(value: Any) -> list[dict[str, Any]]:
    return [
        {"step": 1, "loss": value, "eval_loss": value, "eval_a_loss": value, "eval_accuracy": value, "epoch": value},
        {"step": 2, "loss": 2.0, "eval_loss": 1.5, "eval_a_loss": 1.25, "epoch": 1.0},
        {"step": 3, "loss": 1.0, "eval_loss": 0.5},
        {"step": value, "loss": 4.0, "eval_loss": 4.0},
    ]


def test_numbers_of_any_library_are_shown(tmp_path: Path) -> None:
    values = {"python": 0.5, "numpy": np.float32(0.5), "torch": torch.tensor(0.5), "one": torch.tensor([0.5])}
    card = create_model_card(tiny_lora(), None, tmp_path, metrics=values)
    assert [result.metric_value for result in card.data.eval_results] == [0.5] * 4
    assert all(f"| {name} | 0.5 |" in card.text for name in values)


def test_metrics_that_are_no_numbers_end_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = {"per_class_loss": [0.1, 0.2], "none_loss": None, "digits": 10**400, "accuracy": 0.5}
    trainer = trainer_in(tmp_path, compute_metrics=lambda prediction: dict(odd))
    trainer.train()
    assert trainer.state.global_step == 2 and warnings_of_cards(caplog) == []
    text = (tmp_path / "README.md").read_text()
    assert "| accuracy | 0.5 |" in text and "per_class" not in text.replace("per class", "per_class")


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_card_that_cannot_be_read_is_kept(content: bytes, tmp_path: Path) -> None:
    card, model = tmp_path / "README.md", tiny_lora()
    card.write_bytes(content)
    save_adapter(model, None, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    with pytest.raises(FileExistsError, match="stays as it is"):
        create_model_card(model, None, tmp_path)
    assert card.read_bytes() == content


def test_trainer_keeps_a_card_that_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card, content = tmp_path / "README.md", BROKEN["no YAML"]
    card.write_bytes(content)
    trainer = trainer_in(tmp_path)
    trainer.save_model()  # PEFT would read the card first
    trainer.train()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    assert card.read_bytes() == content and len(warnings_of_cards(caplog)) == 1


def test_folder_in_the_place_of_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "README.md").mkdir()
    trainer = trainer_in(tmp_path)
    trainer.train()
    (warning,) = warnings_of_cards(caplog)  # of two checkpoints
    assert str(tmp_path / "README.md") in warning and "IsADirectoryError" in warning
    trainer.save_model()  # after the training each failure is told
    trainer.create_model_card()
    assert len(warnings_of_cards(caplog)) == 3
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "README.md").is_dir()


def test_card_that_fails_is_one_warning_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_in(tmp_path)
    trainer.create_model_card()
    before = sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())

    def fail(*args: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(hub_mixin, "compose_card", fail)
    trainer.train()
    (warning,) = warnings_of_cards(caplog)
    assert "README.md could not be written (RuntimeError: no such luck)" in warning
    assert sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir() if file.is_file()) == before
    assert (tmp_path / "checkpoint-2" / "lorapro_config.json").is_file()


def test_ctrl_c_is_no_failure_of_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    trainer = trainer_in(tmp_path)
    monkeypatch.setattr(hub_mixin, "compose_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.create_model_card()


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="licence"):
        trainer_in(tmp_path).create_model_card(licence="mit")


def test_card_does_without_a_picture_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> bool:
        raise ValueError("no font")

    monkeypatch.setattr(compose, "draw_curves", fail)
    trainer = trainer_in(tmp_path)
    trainer.train()
    (warning,) = warnings_of_cards(caplog)
    assert "training_curves.png could not be written (ValueError: no font)" in warning
    text = (tmp_path / "README.md").read_text()
    assert "training_curves" not in text and "held-out loss" in text


def test_card_that_fails_ends_no_push(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Repository:
        repo_id = "me/adapter"

    monkeypatch.setattr(push, "create_repo", lambda *args, **kwargs: Repository())
    monkeypatch.setattr(push, "upload_folder", lambda **kwargs: "pushed")
    (tmp_path / "README.md").mkdir()
    assert push_adapter(tiny_lora(), None, "me/adapter", tmp_path) == "pushed"
    assert len(warnings_of_cards(caplog)) == 1
    with pytest.raises(TypeError, match="licence"):
        push_adapter(tiny_lora(), None, "me/adapter", tmp_path, licence="mit")
