"""Resuming under an engine from checkpoints of other engines and damaged ones, as a job for several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine_checkpoints import STEP
from launch_script import environment_of, finish, prepare, set_environment
from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from trainer_helpers import arguments, build

# What the trainings set that are refused, by the name of the checkpoint.
SETTINGS: dict[str, dict[str, Any]] = {"mode": {"lora_pro_mode": "efficient"}}


def trainer_of(folder: Path, batch: int = 2, **settings: Any) -> Any:
    settings = {"max_steps": STEP, "per_device_train_batch_size": batch, **settings}
    return build(LoRAProTrainer, arguments(folder, LoRAProTrainingArguments, **settings))


def message_of_refusal(folder: Path, checkpoint: Path, **settings: Any) -> str:
    """What the exception says; nothing of the checkpoint may have been loaded then."""
    trainer = trainer_of(folder, **settings)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except ValueError as error:
        assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
        return str(error)
    return "it was not refused"


def resume(folder: Path, checkpoint: Path, **settings: Any) -> None:
    """One more step, after which the adapter is saved."""
    trainer = trainer_of(folder, max_steps=STEP + 1, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def resume_under(rank: int, ranks: int, recipe: str, place: str) -> dict[str, torch.Tensor]:
    """What a process does that `accelerate launch` has started with a recipe; rank 0 writes down all messages."""
    folder = Path(place)
    set_environment(environment_of(recipe))
    engine = prepare(recipe)
    trainer_of(folder / "own", save_strategy="steps", save_steps=STEP, **engine).train()
    found = {}
    for checkpoint in sorted((folder / "refused").iterdir()):
        messages = [""] * dist.get_world_size()
        settings = {**engine, **SETTINGS.get(checkpoint.name, {})}
        dist.all_gather_object(messages, message_of_refusal(folder / "out", checkpoint, **settings))
        found[checkpoint.name] = messages
    if recipe == "fsdp2":
        resume(folder / "from weights", folder / "weights", **engine)
    else:
        for stage in ("zero1", "zero2"):
            set_environment(environment_of(stage))
            resume(folder / stage, folder / "own" / f"checkpoint-{STEP}", **engine)
    finish(folder, found)
    return {}
