"""A throw-away method, and trainings with it in the processes of `killable`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from lorapro_hf import (
    BeamLoRACallback,
    BoostingCallback,
    LoRAProTrainer,
    LoRAProTrainingArguments,
    LoRASB,
    find_lora_pairs,
)
from lorapro_hf.methods import LoRAMethod, found_inf
from trainer_helpers import arguments, build, factors, tiny_base, tiny_lora


class NoisyAverage(LoRAMethod):
    """Trains under noise on the output of each layer, from a generator of its own, and exports the factors' average."""

    name = "noisy_average"
    conflicts: ClassVar = {"other": "Keep one.", "lora_pro_mode=full_8bit": "Use full."}

    def __init__(self, decay: float = 0.5) -> None:
        self.decay, self.generator = decay, torch.Generator().manual_seed(3)
        self.average: dict[str, torch.Tensor] = {}
        self.model: Any = None
        self.calls: list[Any] = []

    def _factors(self) -> dict[str, torch.Tensor]:
        return {f"{p.name}.{x}": f.data for p in find_lora_pairs(self.model) for x, f in (("A", p.A), ("B", p.B))}

    def before_training(self, model, batches) -> None:
        self.model, self.average = model, {}
        self.calls.append(None if batches is None else len(next(iter(batches))["input_ids"]))

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        def disturb(layer: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
            return output + 0.01 * torch.randn(output.shape, generator=self.generator)

        handles = [pair.layer.register_forward_hook(disturb) for pair in find_lora_pairs(self.model)]
        yield
        for handle in handles:
            handle.remove()

    def after_step(self, optimizer, step) -> None:
        left_out = found_inf(optimizer)
        self.calls.append((step, bool(left_out)))
        for name, value in self._factors().items():
            average = self.average.get(name, value)
            self.average[name] = torch.lerp(average, value, 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "generator": self.generator.get_state()}

    def load_state_dict(self, state) -> None:
        self.average = state["average"]
        self.generator.set_state(state["generator"])

    @contextlib.contextmanager
    def export(self, model) -> Iterator[None]:
        trained = {name: value.clone() for name, value in self._factors().items()}
        for values in (self.average, trained):
            for name, value in self._factors().items():
                value.copy_(values[name])
            if values is self.average:
                yield


def trainer_of(folder: Path, *callbacks: TrainerCallback, cls: type = LoRAProTrainer, **settings: Any) -> Any:
    """A trainer whose steps have two micro-batches, and which saves every second step."""
    kind = LoRAProTrainingArguments if cls is LoRAProTrainer else TrainingArguments
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    args = arguments(folder, kind, **{**steps, "per_device_train_batch_size": 2, **settings})
    return build(cls, args, model=tiny_lora(lora_dropout=0.1), callbacks=[*callbacks])


def train(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """A training on two ranks with the method, perhaps from a checkpoint on."""
    method = NoisyAverage()
    trainer = trainer_of(Path(job["folder"]), method, per_device_train_batch_size=1, ddp_backend="gloo")
    trainer.train(resume_from_checkpoint=job.get("resume"))
    return {"factors": factors(trainer), "average": method.average, "calls": json.dumps(method.calls)}


def start(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """A training of factors from gradients or of LoRA-SB's matrices, perhaps from a checkpoint on."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **job["settings"]}
    if job["ranks"] > 1:
        settings["ddp_backend"] = "gloo"
    args = arguments(
        Path(job["folder"]), LoRAProTrainingArguments, per_device_train_batch_size=4 // job["ranks"], **settings
    )
    callbacks = [] if args.lora_pro else [LoRASB(samples=8)]
    trainer = build(LoRAProTrainer, args, model=get_peft_model(tiny_base(), config), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def boost(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """A training by XGBLoRA on one of both blocks at a time, perhaps from a checkpoint on: what the adapter changes."""
    config = LoraConfig(r=1, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, **job["settings"]}
    if job["ranks"] > 1:
        settings["ddp_backend"] = "gloo"
    args = arguments(
        Path(job["folder"]), LoRAProTrainingArguments, per_device_train_batch_size=4 // job["ranks"], **settings
    )
    method = BoostingCallback(2, layers=1)
    trainer = build(LoRAProTrainer, args, model=get_peft_model(tiny_base(), config), callbacks=[method])
    trainer.train(resume_from_checkpoint=job.get("resume"))
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {pair.name: pair.layer.get_delta_weight("default").detach() for pair in find_lora_pairs(model)}


def beamlora(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """A training with BeamLoRA, perhaps from a checkpoint on: the factors and gates."""
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3, **job["settings"]}
    if job["ranks"] > 1:
        settings["ddp_backend"] = "gloo"
    args = arguments(
        Path(job["folder"]), LoRAProTrainingArguments, per_device_train_batch_size=4 // job["ranks"], **settings
    )
    callbacks = [BeamLoRACallback(4, keep=0.6, until=1.0)]
    model = tiny_lora().to(torch.bfloat16 if args.lora_pro_master_factors else torch.float32)
    trainer = build(LoRAProTrainer, args, model=model, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    model = trainer.accelerator.unwrap_model(trainer.model)
    gates = {f"gate of {p.name}": p.layer.beamlora_gates["default"] for p in find_lora_pairs(model)}
    return {**gates, **{name: value for name, value in model.state_dict().items() if "lora_" in name}}


def flat(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """A training under noise on the weights, perhaps from a checkpoint on."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4}
    if job["ranks"] > 1:
        settings["ddp_backend"] = "gloo"
    settings |= {"flat_lora_sigma": 0.5, "flat_lora_beta": 0.1, "lora_pro_mode": "efficient"}
    args = arguments(
        Path(job["folder"]), LoRAProTrainingArguments, per_device_train_batch_size=4 // job["ranks"], **settings
    )
    trainer = build(LoRAProTrainer, args, model=tiny_lora())
    trainer.train(resume_from_checkpoint=job.get("resume"))
    return factors(trainer)
