"""The model card of each saved folder: what a save writes before anybody asks for a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hub_helpers import model_of
from hub_server import card_problems
from lorapro_hf import LoRAProTrainer, LoRAProTrainerMixin, LoRAProTrainingArguments
from lorapro_hf.hub import create_model_card, save_adapter
from lorapro_hf.hub.describe import name_on_hub
from trainer_helpers import arguments, build, tiny_base, tiny_lora

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}


def trainer_in(folder: Path, model: Any = None, **settings: Any) -> Any:
    return build(LoRAProTrainer, arguments(folder, LoRAProTrainingArguments, **{**EVALUATED, **settings}), model)


def test_every_save_writes_our_card(tmp_path: Path) -> None:
    """Without the path of the base model, in the last folder and in that of a checkpoint."""
    run, base = tmp_path / "run", tmp_path / "base"
    trainer = trainer_in(run, model_of(base), save_strategy="steps", save_steps=1)
    trainer.save_model()
    early = (run / "README.md").read_text()
    assert f"| mode | {trainer.args.lora_pro_mode} |" in early and "held-out loss" not in early
    trainer.train()
    trainer.save_model()
    for folder, losses in ((run, 2), (run / "checkpoint-1", 1)):
        card = ModelCard.load(folder / "README.md")
        assert card_problems(card.content) == [] and str(tmp_path) not in card.content
        assert "More Information Needed" not in card.text and card.data.base_model is None
        assert card.text.startswith("\n# run\n\nA LoRA adapter for a local LlamaForCausalLM, trained with [LoRA-Pro]")
        assert {"lora-pro", "generated_from_trainer"} <= set(card.data.tags)
        assert f"| {losses} | 0.{25 * losses} |".replace("0.50", "0.5") in card.text and "| 3 |" not in card.text
        assert (folder / "training_curves.png").exists() == ("training_curves" in card.text) == (folder == run)


def test_save_renews_a_card_with_the_arguments_of_the_last(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.create_model_card(tags="mine", license="mit", dataset="sums")
    trainer.state.log_history.append({"step": 2, "eval_loss": 0.5})
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert "mine" in card.data.tags and card.data.license == "mit"
    assert "on sums." in card.text and "held-out loss" in card.text


@pytest.mark.parametrize("ours", [True, False])
def test_save_leaves_the_text_of_an_author(ours: bool, tmp_path: Path) -> None:
    trainer, card = trainer_in(tmp_path), tmp_path / "README.md"
    if ours:
        trainer.create_model_card()
    card.write_text((card.read_text() if ours else "") + "\nIt cannot swim.\n")
    before = card.read_bytes()
    trainer.save_model()
    save_adapter(tiny_lora(), None, tmp_path)
    assert card.read_bytes() == before


class OtherLibrary(Trainer):
    """A trainer whose saves write a card of its own kind."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        card = "---\nlibrary_name: other\nlicense: mit\n---\n\n# Theirs\n\n\nTwo lines apart.\n"
        Path(output_dir or self.args.output_dir, "README.md").write_text(card)


class InOtherLibrary(LoRAProTrainerMixin, OtherLibrary):
    pass


def test_card_of_another_library_gets_a_section_until_it_is_edited(tmp_path: Path) -> None:
    trainer, card = build(InOtherLibrary, arguments(tmp_path, LoRAProTrainingArguments)), tmp_path / "README.md"
    for _ in range(2):
        trainer.save_model()
        written = ModelCard.load(card)
        assert "# Theirs\n\n\nTwo lines apart.\n" in written.text and written.data.license == "mit"
        assert written.text.count("## LoRA-Pro\n") == 1 and f"| mode | {trainer.args.lora_pro_mode} |" in written.text
        assert "## Use it" not in written.text and "lora-pro" in written.data.tags
    edited = card.read_text().replace("Theirs", "Mine")
    card.write_text(edited)
    trainer.save_model()
    assert card.read_text() == edited


def test_save_to_another_folder(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run")
    trainer.save_model(str(tmp_path / "other"))
    assert (
        "LoRA-Pro" in (tmp_path / "other" / "README.md").read_text() and not (tmp_path / "run" / "README.md").exists()
    )


def test_off_is_the_parent_to_the_byte(tmp_path: Path) -> None:
    cards = []
    for cls, kind, off in (
        (LoRAProTrainer, LoRAProTrainingArguments, {"lora_pro": False}),
        (Trainer, TrainingArguments, {}),
    ):
        build(cls, arguments(tmp_path, kind, **off)).save_model()
        cards.append((tmp_path / "README.md").read_bytes())
        (tmp_path / "README.md").unlink()
    assert cards[0] == cards[1] and b"More Information Needed" in cards[0]


def test_save_adapter_writes_a_card_where_there_is_none(tmp_path: Path) -> None:
    model = tiny_lora()
    save_adapter(model, {"mode": "factored"}, tmp_path)
    card = tmp_path / "README.md"
    assert "| mode | factored |" in card.read_text()
    create_model_card(model, {"mode": "factored"}, tmp_path, tags="mine")
    before = card.read_bytes()
    save_adapter(model, {"mode": "factored"}, tmp_path)
    assert card.read_bytes() == before
    assert "create_or_update_model_card" not in vars(model)


def test_model_out_of_the_cache_has_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--someone--tiny-llama" / "snapshots" / "0a1b2c"
    tiny_base().save_pretrained(folder)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    card = create_model_card(model, None, tmp_path)
    assert card.data.base_model == "someone/tiny-llama" and str(tmp_path) not in card.content
    assert 'AutoModelForCausalLM.from_pretrained("someone/tiny-llama")' in card.text


def test_paths_are_no_names(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run")
    (tmp_path / "data").mkdir()
    trainer.create_model_card(finetuned_from=str(tmp_path), dataset_tags=[str(tmp_path / "data"), "me/sums"])
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model is None and card.data.datasets == ["me/sums"]
    assert card_problems(card.content) == [] and str(tmp_path) not in card.content


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("gpt2", "gpt2"), ("me/model", "me/model"), ("", None), (None, None), ("/data/llama", None), ("./base", None),
        ("../base", None), ("out/run/base", None), ("~/base", None), ("tests", None),
    ],
)  # fmt: skip
def test_name_on_the_hub(name: str | None, known: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert name_on_hub(name) == known
