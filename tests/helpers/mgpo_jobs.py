"""Trainings with MGPO in the processes of `killable`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments, MGPOCallback
from trainer_helpers import arguments, build, factors, tiny_lora


def train(job: dict[str, Any], rank: int) -> dict[str, torch.Tensor]:
    """The factors after a training in float64 on one rank or more, with the same batches."""
    settings: dict[str, Any] = {"lora_pro": False} if job["mode"] is None else {"lora_pro_mode": job["mode"]}
    if job["ranks"] > 1:
        settings["ddp_backend"] = "gloo"
    args = arguments(
        Path(job["folder"]),
        LoRAProTrainingArguments,
        per_device_train_batch_size=4 // job["ranks"],
        max_steps=4,
        **settings,
    )
    trainer = build(LoRAProTrainer, args, model=tiny_lora().double(), callbacks=[MGPOCallback(0.5)])
    trainer.train()
    trainer.model = trainer.accelerator.unwrap_model(trainer.model)
    return factors(trainer)
