"""What the processes of `killable` do: trainings by a `Trainer` or by a loop of one's own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
import transformers
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from lorapro_hf import (
    LoRAProCallback,
    LoRAProOptimizerFactory,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    create_lorapro_optimizer,
)
from lorapro_hf.distributed.ownership import PairOwnership
from trainer_helpers import arguments, build, factors, sequences, tiny_lora

SCHEDULE = {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5}
STEPS, SAVED_EVERY = 8, 3  # in epochs of four steps


def model_of(job: dict[str, Any]) -> Any:
    """A model whose training also depends on random numbers and on parameters of no pair."""
    model = tiny_lora(lora_dropout=job.get("dropout", 0.1), modules_to_save=["lm_head"], **job.get("adapter", {}))
    return model.to(getattr(torch, job.get("dtype", "float32")))


def trainer_of(job: dict[str, Any], callbacks: list[TrainerCallback] | None = None) -> Trainer:
    """A trainer as `job` describes it, in a folder of its own."""
    kind, ranks = job.get("kind", "own"), job.get("ranks", 1)
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED_EVERY, **SCHEDULE}
    settings |= {"per_device_train_batch_size": 4 // ranks, **job.get("settings", {})}
    if ranks > 1:
        settings["ddp_backend"] = "gloo"
    folder, model, callbacks = Path(job["folder"]), model_of(job), [*(callbacks or [])]
    if kind == "own":
        args = arguments(folder, LoRAProTrainingArguments, **settings)
        return build(LoRAProTrainer, args, model=model, callbacks=callbacks)
    args = arguments(folder, TrainingArguments, **settings)
    if kind == "callback":
        return build(Trainer, args, model=model, callbacks=[*callbacks, LoRAProCallback()])
    kwargs = {"lr": 1e-2, "weight_decay": 0.1, "config": job.get("config")}
    return build(
        Trainer, args, model=model, callbacks=callbacks, optimizer_cls_and_kwargs=(LoRAProOptimizerFactory, kwargs)
    )


def train(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train, perhaps from a checkpoint, perhaps not to the end."""
    transformers.logging.set_verbosity_error()
    fatal = Fatal()
    trainer = trainer_of(job, [fatal])
    kill = job.get("kill")
    if kill is not None and kill.get("rank", 0) == rank:
        fatal.arm(trainer, kill["when"], kill["step"])
    trainer.train(resume_from_checkpoint=job.get("resume"))
    optimizer = trainer.optimizer.optimizer
    own = sum(tensor.numel() for tensor in optimizer.pair_state().values()) if hasattr(optimizer, "pair_state") else 0
    saved = optimizer.state_dict()
    return {
        "parameters": factors(trainer),
        "state": {f"{key}.{name}": value for key, state in saved["state"].items() for name, value in state.items()},
        "own": own,
        "history": json.dumps([entry for entry in trainer.state.log_history if "train_runtime" not in entry]),
    }


def examine(job: dict[str, Any], rank: int) -> dict[str, str]:
    """What this rank would resume from in each case, or why it would not."""

    def fail(_: Any) -> bool:
        raise ValueError(f"rank {rank} has found something")

    found = {}
    for name, resume in job["cases"].items():
        trainer = trainer_of(job)
        if name == f"rank {rank} alone":
            trainer._has_fitting_state = fail
        try:
            found[name] = str(trainer._examine(resume))
        except ValueError as error:
            found[name] = f"refused: {error}"
    return found


class Fatal(TrainerCallback):
    """Kills its own process at a chosen moment of a training."""

    moment: tuple[str, int] | None = None

    def arm(self, trainer: Trainer, when: str, step: int) -> None:
        """`when` is an event of the callback, "publish" (pairs are stepped, and no rank knows it) or a file's name."""
        self.moment = (when, step)
        original = PairOwnership.publish

        def publish(ownership: PairOwnership) -> None:
            if self.moment == ("publish", trainer.state.global_step + 1):
                die()
            original(ownership)

        PairOwnership.publish = publish  # type: ignore[method-assign]
        end = f"checkpoint-{step}/{when}"
        torch.save = _cutting(torch.save, lambda _, path, *rest, **more: path, end)
        safe_save = peft.peft_model.safe_save_file
        peft.peft_model.safe_save_file = _cutting(safe_save, lambda _, path, *rest, **more: path, end)
        TrainerState.save_to_json = _cutting(TrainerState.save_to_json, lambda _, path: path, end)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.moment == ("gradients", state.global_step + 1):
            die()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.moment == ("step_end", state.global_step):
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _cutting(write: Callable[..., Any], path_of: Callable[..., Any], end: str) -> Callable[..., Any]:
    """`write`, whose process dies halfway through the file whose path ends so."""

    def writing(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        path = str(path_of(*args, **kwargs))
        if path.endswith(end):
            os.truncate(path, os.path.getsize(path) // 2)
            die()
        return result

    return writing


def loops(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Loops of one's own with accelerate's save_state and load_state: which went on as if nothing had happened."""
    found = {}
    for name, config in job["configs"].items():
        folder = f"{job['folder']}/{name}"
        accelerator, model, run = _loop(job, config)
        run()
        accelerator.save_state(folder)
        middle = factors_of(model)
        run()
        expected = factors_of(model)
        torch.manual_seed(99)
        accelerator, model, run = _loop(job, config)
        run()  # to somewhere else: what is loaded replaces a state
        run()
        accelerator.load_state(folder)
        run()
        again = factors_of(model)
        found[name] = all(torch.equal(expected[key], again[key]) for key in expected)
        found[f"{name} moved"] = all(not torch.equal(expected[key], middle[key]) for key in expected)
        accelerator.wait_for_everyone()
    return found


def factors_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what is trained."""
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _loop(job: dict[str, Any], config: dict[str, Any]) -> tuple[Accelerator, Any, Callable[[], None]]:
    accelerator = Accelerator(cpu=True)
    model = model_of(job).train()
    optimizer = create_lorapro_optimizer(model, lr=1e-2, weight_decay=0.1, config=config)
    loader = DataLoader(sequences(16), batch_size=4 // job["ranks"])  # type: ignore[arg-type]
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    def run() -> None:
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    return accelerator, model, run
