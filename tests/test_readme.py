"""The code of the README runs: Python blocks as they are, diff blocks as they read after the change."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lorapro_hf import LoRAProAdamW
from lorapro_hf.callback import unwrap_optimizer
from trainer_helpers import sequences, tiny_lora

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|diff)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


class SFTTrainer(Trainer):
    """Takes what TRL's trainer of that name takes in the README; the model has its adapter already."""

    def __init__(self, *args: Any, peft_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def after_the_change(kind: str, block: str) -> str:
    if kind == "python":
        return block
    return "\n".join(line[1:] for line in block.splitlines() if not line.startswith("-"))


@pytest.mark.parametrize(("kind", "block"), BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_block_runs(kind: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    factory_known = "optimizer_cls_and_kwargs" in inspect.signature(Trainer.__init__).parameters
    if "LoRAProOptimizerFactory" in block and not factory_known:
        pytest.skip("this Trainer takes no optimizer factory")
    A, B = torch.randn(4, 6), torch.randn(5, 4)
    names: dict[str, Any] = {
        **{"Trainer": Trainer, "SFTTrainer": SFTTrainer, "torch": torch, "peft_config": None},
        **{"model": tiny_lora(), "data": sequences(8), "args": TrainingArguments("out", report_to=[])},
        **{"A": A, "B": B, "grad_A": torch.randn_like(A), "grad_B": torch.randn_like(B), "scaling": 2.0},
    }
    exec(compile(after_the_change(kind, block), "README.md", "exec"), names)
    if "trainer" in names:
        trainer = names["trainer"]
        trainer.create_optimizer()
        ends_with_the_callback = "LoRAProCallback()" in block
        assert isinstance(unwrap_optimizer(trainer.optimizer), LoRAProAdamW) != ends_with_the_callback
    if "optimizer" in names:
        assert isinstance(names["optimizer"], LoRAProAdamW)


def test_readme_has_the_examples():
    assert len(BLOCKS) >= 5
