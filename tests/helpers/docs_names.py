"""What may the code of the documentation take for granted? Tiny stand-ins for what a reader has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hub_helpers import tokenizer
from lorapro_hf import create_lorapro_optimizer
from trainer_helpers import sequences, tiny_base, tiny_lora


class Names:
    """Makes the names that a block assumes, afresh for every block.

    Args:
        folder: where the base model lies, with its tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        tiny_base().save_pretrained(self.base)
        tokenizer().save_pretrained(self.base)

    def make(self, name: str, block: str) -> Any:
        """The object of this name for a block with this code."""
        makers: dict[str, Callable[[str], Any]] = {
            "torch": lambda _: torch,
            "Trainer": lambda _: Trainer,
            "SFTTrainer": lambda _: _sft().SFTTrainer,
            "base_model": lambda _: self.base_model(),
            "model": lambda code: self.base_model() if "peft_config" in code else tiny_lora(),
            "tokenizer": lambda _: tokenizer(),
            "peft_config": lambda _: self.peft_config(),
            "data": lambda _: _rows(),
            "dataset": lambda _: _rows(),
            "loader": lambda _: DataLoader(sequences(8), batch_size=4),  # type: ignore[arg-type]
            "batches": lambda _: DataLoader(sequences(100), batch_size=20),  # type: ignore[arg-type]
            "args": self.arguments,
            "optimizer": lambda _: create_lorapro_optimizer(tiny_lora(), lr=1e-4),
            "scaling": lambda _: 2.0,
        }
        return torch.randn(_SHAPES[name]) if name in _SHAPES else makers[name](block)

    def base_model(self) -> Any:
        """Loaded from a folder, as TRL needs it to find the tokenizer."""
        return AutoModelForCausalLM.from_pretrained(self.base)

    @staticmethod
    def arguments(block: str) -> TrainingArguments:
        """Those of the trainer that the block uses."""
        if "SFTTrainer" not in block:
            return TrainingArguments("out", report_to="none", use_cpu=True)
        return _sft().SFTConfig("out", report_to="none", use_cpu=True, bf16=False, max_length=8)

    @staticmethod
    def peft_config() -> Any:
        """An adapter for the trainer to make."""
        from peft import LoraConfig

        return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def _rows() -> Dataset:
    """Tokenized sequences."""
    return Dataset.from_list([{key: value.tolist() for key, value in row.items()} for row in sequences(8)])


_SHAPES = {"A": (4, 6), "B": (5, 4), "grad_A": (4, 6), "grad_B": (5, 4)}


def _sft() -> Any:
    import trl

    return trl
