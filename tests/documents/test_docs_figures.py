"""Figures, settings and the picture in the documentation are those measured, computed and declared."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from docs_pages import DOCS, ROOT, loaded, tables
from lorapro_hf import LoRAProConfig, LoRAProTrainingArguments, find_lora_pairs
from lorapro_hf.config import TRUST_REGION
from lorapro_hf.optim.memory import state_bytes_by_device
from trainer_helpers import sequences, tiny_lora


class _Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4096, 4096, bias=False, device="meta")


def test_memory_figures_are_those_computed():
    pairs = find_lora_pairs(get_peft_model(_Square(), LoraConfig(r=8, target_modules=["linear"])))  # type: ignore[arg-type]
    rows = tables((DOCS / "speed.md").read_text(encoding="utf-8"))["How much memory a mode needs"]
    assert len(rows) == 5
    for mode, row in rows.items():
        settings: dict[str, Any] = {"mode": re.findall(r"`(\w+)`", mode)[0]}
        settings |= {"moments_dtype": "bfloat16"} if "bfloat16" in mode else {}
        (count,) = state_bytes_by_device(pairs, LoRAProConfig(**settings)).values()
        assert float(row["at m = n = 4096, r = 8"].removesuffix(" MB")) == pytest.approx(count / 1e6, rel=0.02)


def test_figures_of_the_comparisons_are_those_measured():
    default = {"whole": "pro_full_wide_limit"}  # too short for the limit that the others have
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = []
    for name in ("small", "long", "whole", "ranks"):
        summary = json.loads((DOCS / "results" / name / "summary.json").read_text(encoding="utf-8"))
        for comparison in summary["comparisons"]:
            found = {row["method"]: row["test"]["loss"] for row in comparison["methods"]}
            shown = ("lora", default.get(name, "pro_full_linear"), "pro_full_paper", "full")
            measured.append(" | ".join(f"{found[m]['mean']:.3f} ± {found[m]['std']:.3f}" for m in shown))
    assert len(measured) == 7
    assert all(f" | {figures} |" in readme for figures in measured)


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


def test_picture_shows_what_the_page_says(picture: ModuleType):
    content = json.loads((DOCS / "pictures" / "how_it_works.json").read_text(encoding="utf-8"))
    found, page = content["summary"], (DOCS / "how_it_works.md").read_text(encoding="utf-8")
    cosines = torch.tensor([row[1:] for row in content["cosines"]])
    assert len(cosines) == found["weights"] == found["lora_pro_closer"] == 210
    assert f"| {found['median_cosine_lora']:.2f} | {found['median_cosine_lora_pro']:.2f} |" in page
    assert f"| {found['median_angle_lora']}° | {found['median_angle_lora_pro']}° |" in page
    assert f"between {found['smallest_ratio']} and {found['largest_ratio']} times" in page
    assert cosines.median(dim=0).values.tolist() == pytest.approx(
        [found["median_cosine_lora"], found["median_cosine_lora_pro"]], abs=0.006
    )
    assert "python docs/pictures/how_it_works.py" in page


def test_trust_region_lets_go_when_the_page_says_so():
    found = json.loads((DOCS / "pictures" / "trust_region.json").read_text(encoding="utf-8"))
    page = (DOCS / "how_it_works.md").read_text(encoding="utf-8")
    assert float(min(found)) == TRUST_REGION and f"≤ {TRUST_REGION:g} ‖B hA + hB A‖" in page
    for limit, figures in found.items():
        assert 0 < figures["smallest_median"] < 0.5 and 1 < figures["half_from"] < figures["free_from"]
        assert f"from step {figures['free_from']} on" in page, limit


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
