"""Tiny models, data and trainings for the tests of the Trainer side; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from lorapro_hf import LoRAProConfig, LoRAProTrainer, LoRAProTrainerMixin, LoRAProTrainingArguments

VOCABULARY, LENGTH = 48, 8
EFFICIENT = LoRAProConfig(mode="efficient")


class PlainArgsTrainer(LoRAProTrainerMixin, Trainer):
    """A trainer with LoRA-Pro that gets transformers' own arguments."""


def tiny_base() -> LlamaForCausalLM:
    """A two-layer Llama with seeded weights."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def tiny_lora(**settings: Any) -> PeftModel:
    """The same with an adapter, whose B is not 0, so that both factors matter from the first step."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(tiny_base(), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def sequences(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Counting sequences, all of one length and without ignored labels, so that every mean has equal weights."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(3, VOCABULARY - LENGTH, (count,), generator=generator)
    rows = [start + torch.arange(LENGTH) for start in starts]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
    """Arguments of a run of six steps on the CPU that logs every step and reports and saves nothing."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "seed": 7,
    }
    return cls(**{**defaults, **settings})


def build(cls: type[Trainer], args: TrainingArguments, model: Any = None, **settings: Any) -> Any:
    """A trainer on the tiny model and data."""
    if "model_init" not in settings:
        settings["model"] = tiny_lora() if model is None else model
    return cls(args=args, train_dataset=sequences(16), eval_dataset=sequences(4, seed=1), **settings)


def factors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trainable parameters of a trainer's model, by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer: Trainer, key: str) -> list[float]:
    """All logged values of one metric."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **tolerance: float) -> None:
    """The same names and values: bitwise, unless `rtol` and `atol` are given."""
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether any parameter has another value."""
    return any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def run(folder: Path, cls: type[Trainer] = LoRAProTrainer, build_with: dict | None = None, **settings: Any) -> Any:
    """Train and return the trainer."""
    kind = LoRAProTrainingArguments if cls is LoRAProTrainer else TrainingArguments
    trainer = build(cls, arguments(folder, kind, **settings), **(build_with or {}))
    trainer.train()
    return trainer
