"""Trainings under one of the recipes, as a script for `accelerate launch`; the test runs the same on one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from accelerate import DistributedType, PartialState
from accelerate.commands import launch
from packaging.version import Version
from peft import get_peft_model_state_dict
from torch.distributed.fsdp import StateDictType
from transformers import Trainer

from lorapro_hf import LoRAProCallback, LoRAProOptimizerFactory, LoRAProTrainer, LoRAProTrainingArguments
from trainer_helpers import arguments, build, tiny_lora
from trainer_script import BATCH, LOGGED, SETTINGS

MAX_GRAD_NORM = 0.05  # all gradients are longer
TRAININGS: dict[str, dict[str, Any]] = {
    "full": {"max_grad_norm": MAX_GRAD_NORM, "save_strategy": "steps", "save_steps": 3},
    "off": {"max_grad_norm": MAX_GRAD_NORM, "lora_pro": False},
}
# The loss falls, so that the highest is the first, of step 3.
BEST = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "greater_is_better": True}
TRAININGS["best"] = {**TRAININGS["full"], **BEST, "metric_for_best_model": "loss"}
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
    if plugin is not None and not args.lora_pro:  # the parent saves no whole model while checkpoints are sharded
        plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "history": [{key: entry[key] for key in LOGGED if key in entry} for entry in history],
        "wrapped": type(trainer.model_wrapped).__name__,
        "stage": trainer.deepspeed.zero_optimization_stage() if trainer.deepspeed else 0,
        "fsdp": plugin.fsdp_version if plugin else 0,
    }


def train_and_resume(folder: Path, **engine: Any) -> dict[str, Any]:
    """The first training, and once more from its first checkpoint on."""
    found = {"full": train(folder / "full", 2, **engine, **TRAININGS["full"])}
    resume = folder / "full" / "checkpoint-3"
    found["resumed"] = train(folder / "resumed", 2, resume=resume, **engine, **TRAININGS["full"])
    return found


def refuse(folder: Path, **engine: Any) -> dict[str, list[str]]:
    """The errors on all ranks of trainings under FSDP2 that would save no adapter, or not all of it."""
    settings = {**SETTINGS, **TRAININGS["full"], **engine, "save_steps": 1, "per_device_train_batch_size": BATCH // 2}

    def own() -> None:
        build(LoRAProTrainer, arguments(folder, LoRAProTrainingArguments, **settings)).train()

    def plain() -> None:
        if Version(transformers.__version__) < Version("5"):  # which knows no optimizer factories
            with_plain: dict[str, Any] = {"callbacks": [LoRAProCallback()]}
        else:
            with_plain = {"optimizer_cls_and_kwargs": (LoRAProOptimizerFactory, {"lr": 1e-2})}
        build(Trainer, arguments(folder, **settings), **with_plain).train()

    def without_last(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = get_peft_model_state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if "1.mlp.down_proj.lora_B" not in name}

    def error_of(train: Callable[[], None]) -> str:
        try:
            train()
        except (RuntimeError, ValueError) as error:
            return str(error)
        return ""

    with mock.patch.dict(os.environ, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}):
        found = {"own": error_of(own), "plain": error_of(plain)}
    with mock.patch("peft.get_peft_model_state_dict", without_last):
        found["sharded"] = error_of(own)
    with (
        mock.patch("peft.peft_model.get_peft_model_state_dict", without_last),
        mock.patch.dict(os.environ, {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
    ):
        found["full"] = error_of(own)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return {name: [each[name] for each in gathered] for name in found}


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


def environment_of(recipe: str) -> dict[str, str]:
    """What the launcher of accelerate hands to the processes that it starts with a recipe for FSDP2 or DeepSpeed."""
    file = Path(__file__).parents[2] / "configs" / "accelerate" / f"{recipe}.yaml"
    options = ["--config_file", str(file), "--num_processes", "2", "--mixed_precision", "no", "train.py"]
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(options))
    if recipe == "fsdp2":
        args.main_process_port = 0
        of_accelerate = launch.prepare_multi_gpu_env(args)
    else:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        of_accelerate = launch.prepare_deepspeed_cmd_env(args)[1]
    return {name: value for name, value in of_accelerate.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def set_environment(of_accelerate: dict[str, str]) -> None:
    """Put this in the place of what the launcher has handed to this process."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(of_accelerate)


def main(recipe: str, folder: Path) -> None:
    torch.set_num_threads(1)
    engine = prepare(recipe)
    found = {recipe: train_and_resume(folder / recipe, **engine)}
    found[recipe]["off"] = train(folder / recipe / "off", 2, **engine, **TRAININGS["off"])
    if recipe == "fsdp2":
        checkpointed = {**TRAININGS["full"], "gradient_checkpointing": True, "save_strategy": "no"}
        found[recipe]["checkpointed"] = train(folder / recipe / "checkpointed", 2, **engine, **checkpointed)
        train(folder / recipe / "first", 2, **engine, **TRAININGS["best"])
        resume = folder / recipe / "first" / "checkpoint-3"
        found[recipe]["best"] = train(folder / recipe / "best", 2, resume=resume, **engine, **TRAININGS["best"])
        found[recipe]["refused"] = refuse(folder / recipe / "refused", **engine)
    if recipe == "zero3":  # which then stands for the others: starting takes longer than all trainings
        for other in ("zero1", "zero2"):
            set_environment(environment_of(other))
            found[other] = train_and_resume(folder / other, **engine)
        for stage in (2, 3):
            set_environment({"ACCELERATE_USE_DEEPSPEED": "true"})  # as any other launcher would have started this
            zero = {**CONFIGURATION["zero_optimization"], "stage": stage}
            configuration = {**CONFIGURATION, "zero_optimization": zero}
            way = f"configuration{stage}"
            found[way] = train_and_resume(folder / way, deepspeed=configuration, **engine)
    finish(folder, found)


def finish(folder: Path, found: Any) -> None:
    """Leave for the test what rank 0 has found, and end the process group."""
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
