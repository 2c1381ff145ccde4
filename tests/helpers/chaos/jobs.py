"""The training of a chaos run on each engine, in processes of `killable`."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

import lorapro_hf
from killable_jobs import SCHEDULE, model_of
from launch_script import environment_of, prepare, set_environment
from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from trainer_helpers import arguments, build

from .instants import Instants
from .settings import END, SAVED_EVERY, STEPS


class Said(logging.Handler):
    """Collects the warnings of a training."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def train(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train on `job["engine"]`, disturbed by `job["plan"]`; what was said is written beside the checkpoints."""
    instants, said = Instants(job.get("plan", []), rank), Said()
    logging.getLogger("lorapro_hf").addHandler(said)
    transformers.logging.set_verbosity_error()
    error, trainer, before = None, None, {}
    try:
        trainer = _trainer(job, instants)
        before = _trainable(trainer)
        instants.arm()
        trainer.train(resume_from_checkpoint=job.get("resume"))
        _save_end(trainer, Path(job["folder"], END))
    except BaseException as caught:
        instants.lift()
        error = _described(caught)
        error["loaded"] = trainer is not None and not _same(before, _trainable(trainer))
        raise
    finally:
        instants.lift()
        report = {"instants": instants.kinds, "warnings": said.messages, "error": error}
        Path(job["folder"], f"said-{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    return {}


def nothing(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return when everything has been imported."""
    return {}


def _trainer(job: dict[str, Any], instants: Instants) -> LoRAProTrainer:
    engine, ranks = job["engine"], job["ranks"]
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED_EVERY, **SCHEDULE}
    settings |= {"per_device_train_batch_size": 4 // ranks, "log_level": "error"}
    if engine == "ddp":
        settings["ddp_backend"] = "gloo"
    elif ranks > 1:
        set_environment(environment_of(engine))
        settings |= prepare(engine)
    args = arguments(Path(job["folder"]), LoRAProTrainingArguments, **settings)
    return build(LoRAProTrainer, args, model=model_of(job), callbacks=[instants])


def _save_end(trainer: LoRAProTrainer, folder: Path) -> None:
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))


def _trainable(trainer: LoRAProTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether nothing has been loaded or wrapped meanwhile."""
    return one.keys() == other.keys() and all(
        type(tensor) is type(other[name]) and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def _described(error: BaseException) -> dict[str, Any]:
    """The error, and whether this package has raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(lorapro_hf.__file__).parent)
    is_ours = bool(frames) and frames[-1].filename.startswith(package) and isinstance(error, (ValueError, RuntimeError))
    return {"type": type(error).__name__, "message": str(error), "ours": is_ours}
