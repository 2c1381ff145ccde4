"""Trainings with `Trainer` classes, as a script for torchrun; the test runs the same on one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from lorapro_hf import LoRAProCallback, LoRAProTrainer
from lorapro_hf.config import MODES
from trainer_helpers import factors, run, tiny_lora

BATCH = 4
SETTINGS = {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 100.0}
TRAININGS: dict[str, dict[str, Any]] = {
    **{mode: {"lora_pro_mode": mode} for mode in MODES},
    "rite": {"lora_pro_mode": "rite", "lora_pro_rite_clip": 0.1, "max_grad_norm": 0.0},
    "off": {"lora_pro": False},
    "accumulated": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 0.05},
    "callback": {"kind": "callback"},
}
LOGGED = ("loss", "grad_norm", "learning_rate", "lora_pro_grad_norm", "lora_pro_skipped_steps")


def train(folder: Path, ranks: int, kind: str = "own", gradient_accumulation_steps: int = 1, **settings: Any) -> Any:
    """One training with the same batches for any number of ranks."""
    settings = {**SETTINGS, **settings, "gradient_accumulation_steps": gradient_accumulation_steps}
    settings["per_device_train_batch_size"] = BATCH // ranks // gradient_accumulation_steps
    if ranks > 1:
        settings["ddp_backend"] = "gloo"
    build_with: dict[str, Any] = {"model": tiny_lora(modules_to_save=["lm_head"])}
    if kind == "callback":
        return run(folder, Trainer, {**build_with, "callbacks": [LoRAProCallback()]}, **settings)
    return run(folder, LoRAProTrainer, build_with, **settings)


def result(trainer: Any) -> dict[str, Any]:
    """Where the training has ended, what it has logged, and how much of the state this rank holds."""
    optimizer = trainer.optimizer.optimizer
    own = optimizer.pair_state() if hasattr(optimizer, "pair_state") else {}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": factors(trainer),
        "own": sum(tensor.numel() for tensor in own.values()),
        "history": json.dumps([{key: entry[key] for key in LOGGED if key in entry} for entry in history]),
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for name, settings in TRAININGS.items():
        trainer = train(folder / name, 2, **settings)
        found[name] = result(trainer)
    torch.save(found, folder / f"result-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
