"""Running the programs of scripts/ in this process on tiny inputs, and looking at what they leave."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

ROOT = Path(__file__).parents[2]
SCRIPTS, CONFIGS = ROOT / "scripts", ROOT / "configs"
INPUTS = "build/smoke"  # what the recipes in configs/smoke say
QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
TINY = [*QUIET, "--max_steps", "2", "--per_device_train_batch_size", "2", "--lora_r", "2", "--learning_rate", "1e-3"]
CLASSES = {
    "run_clm.py": AutoModelForCausalLM,
    "run_dpo.py": AutoModelForCausalLM,
    "run_glue.py": AutoModelForSequenceClassification,
    "run_grpo.py": AutoModelForCausalLM,
    "run_image_classification.py": AutoModelForImageClassification,
    "run_kto.py": AutoModelForCausalLM,
    "run_reward.py": AutoModelForSequenceClassification,
    "run_seq2seq.py": AutoModelForSeq2SeqLM,
    "run_sft.py": AutoModelForCausalLM,
    "run_speech_recognition.py": AutoModelForCTC,
}


class Lines(logging.Handler):
    """What a logger that it is added to has said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def script(name: str) -> ModuleType:
    """A program of scripts/ as a module."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return importlib.import_module(name.removesuffix(".py"))


def make_inputs(folder: Path) -> Path:
    """The tiny models and data below a folder; the folder, which is to be the current directory."""
    script("make_smoke_inputs.py").main(str(folder / INPUTS))
    return folder


def results(folder: Path) -> dict[str, Any]:
    """All metrics that a program has left."""
    found: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return found


def factors(folder: Path) -> dict[str, torch.Tensor]:
    """The saved adapter."""
    return load_file(folder / "adapter_model.safetensors")


def check_adapter(folder: Path, program: str) -> None:
    """The adapter has moved from where it started, and stock PEFT loads all of it."""
    saved = factors(folder)
    moved = [name for name, values in saved.items() if "lora_B" in name and values.any()]
    assert moved, "no B has left zero"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    heads = {name.split(".")[-2]: len(values) for name, values in saved.items() if name.endswith(".weight")}
    sizes = {"vocab_size": heads["lm_head"]} if program == "run_speech_recognition.py" else {}
    for head in {"classifier", "score"} & heads.keys():
        sizes = {"num_labels": heads[head]}
    auto_class = AutoModelForImageTextToText if "llava" in base else CLASSES[program]
    model = auto_class.from_pretrained(base, **sizes, ignore_mismatched_sizes=bool(sizes))
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, folder), save_embedding_layers=False)
    assert loaded.keys() == saved.keys()
    for name, values in saved.items():
        torch.testing.assert_close(loaded[name].to(values.dtype), values, rtol=0, atol=0)
