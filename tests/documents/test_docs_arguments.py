"""The table of arguments names every field, and the picture on the method shows what autograd gives."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch

from docs_pages import DOCS, loaded, tables
from lorapro_hf import LoRAProTrainingArguments, find_lora_pairs
from trainer_helpers import sequences, tiny_lora


def test_arguments_are_all_listed():
    listed = tables((DOCS / "api" / "trainer.md").read_text(encoding="utf-8"))["Trainer side"]
    fields = {f.name: f for f in dataclasses.fields(LoRAProTrainingArguments) if f.name.startswith("lora_pro")}
    assert {name.strip("`") for name in listed} == fields.keys()
    for name, row in listed.items():
        field = fields[name.strip("`")]
        assert ast.literal_eval(row["default"].strip("`")) == field.default
        assert all(f"`{choice}`" in row["values"] for choice in field.metadata.get("choices", ())), name


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
