"""The page on the trainer gets a table of every argument, and the picture on the method shows what autograd gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import TrainingArguments

from docs_pages import DOCS, loaded, tables
from lorapro_hf import LoRAProTrainingArguments, find_lora_pairs
from trainer_helpers import sequences, tiny_lora


def test_arguments_are_all_listed():
    page = (DOCS / "api" / "trainer.md").read_text(encoding="utf-8")
    listed = tables(loaded(DOCS / "option_tables.py").on_page_markdown(page))["Trainer side"]
    rows = {name.strip("`-").split()[0]: (name, row) for name, row in listed.items()}
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    fields = {f.name: f for f in dataclasses.fields(LoRAProTrainingArguments) if f.name not in inherited}
    assert rows.keys() == fields.keys() | {"no_lora_pro", "no_lora_pro_check_memory"}
    for name, field in fields.items():
        shown, row = rows[name]
        assert row["default"] == ("" if field.default is None or field.default is False else str(field.default))
        assert all(choice in shown for choice in field.metadata.get("choices", ())), name
        assert row["meaning"] == field.metadata["help"]


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    return loaded(DOCS / "pictures" / "how_it_works.py")


def test_picture_is_of_the_full_gradient(picture: ModuleType, tmp_path: Path):
    batches = [
        {k: torch.stack([row[k] for row in sequences(4, seed)]) for k in ("input_ids", "labels")} for seed in (0, 1, 2)
    ]
    model = tiny_lora()
    found = picture.measure(model, batches)
    assert len(found) == 14 and all(0 < c.LoRA < c.LoRA_Pro < 1 for c in found)
    for pair in find_lora_pairs(model):  # what autograd gives the factors is what it gives the weight, projected
        g = pair.layer.get_base_layer().weight.grad
        assert pair.A.grad is not None and pair.B.grad is not None
        torch.testing.assert_close(pair.A.grad, pair.scaling * pair.B.detach().T @ g, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(pair.B.grad, pair.scaling * g @ pair.A.detach().T, rtol=1e-3, atol=1e-5)
    picture.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
