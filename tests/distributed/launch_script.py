"""Trainings under one of the recipes, as a script for `accelerate launch`; the test runs the same on one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from trainer_helpers import arguments, build, tiny_lora
from trainer_script import BATCH, LOGGED, SETTINGS

TRAININGS: dict[str, dict[str, Any]] = {
    "full": {},
    "efficient": {"lora_pro_mode": "efficient"},
    "off": {"lora_pro": False},
    "clipped": {"max_grad_norm": 0.05, "save_strategy": "steps", "save_steps": 3},
}
RESUMED = "clipped"
# The file that users of DeepSpeed have; stage 3 is to hand the adapter over when it is saved.
CONFIGURATION = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage3_gather_16bit_weights_on_model_save": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


def train(folder: Path, ranks: int = 1, resume: Path | None = None, **settings: Any) -> dict[str, Any]:
    """One training with the same batches for any number of ranks, whose adapter is saved in the folder."""
    settings = {**SETTINGS, **settings, "per_device_train_batch_size": BATCH // ranks}
    args = arguments(folder, LoRAProTrainingArguments, **settings)
    trainer = build(LoRAProTrainer, args, model=tiny_lora(modules_to_save=["lm_head"]))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "history": [{key: entry[key] for key in LOGGED if key in entry} for entry in history],
        "wrapped": type(trainer.model_wrapped).__name__,
        "stage": trainer.deepspeed.zero_optimization_stage() if trainer.deepspeed else 0,
        "fsdp": plugin.fsdp_version if plugin else 0,
    }


def train_all(folder: Path, **engine: Any) -> dict[str, Any]:
    """All trainings, and the one that has saved checkpoints once more from its first checkpoint on."""
    found = {name: train(folder / name, 2, **engine, **settings) for name, settings in TRAININGS.items()}
    first = folder / RESUMED / "checkpoint-3"
    found["resumed"] = train(folder / "resumed", 2, resume=first, **engine, **TRAININGS[RESUMED])
    return found


def prepare(recipe: str) -> dict[str, Any]:
    """What it takes to run an engine on the CPU: arguments of the training."""
    if recipe.startswith("zero"):
        import deepspeed.ops

        # What is found there would be compiled now, and nothing here needs it.
        deepspeed.ops.__compatible_ops__ = {}
    if recipe != "fsdp2":
        return {}
    # accelerate takes FSDP for GPUs only; fully_shard and everything that accelerate does with it need none.
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    return {"use_cpu": False}


def main(recipe: str, folder: Path) -> None:
    torch.set_num_threads(1)
    engine = prepare(recipe)
    found = {"recipe": train_all(folder / "recipe", **engine)}
    if recipe in ("zero2", "zero3"):
        # as any other launcher would have started this
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        zero = {**CONFIGURATION["zero_optimization"], "stage": int(recipe[-1])}
        configuration = {**CONFIGURATION, "zero_optimization": zero}
        found["configuration"] = train_all(folder / "configuration", deepspeed=configuration, **engine)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
