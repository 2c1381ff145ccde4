"""Does a random model of the shapes of Llama-3.2-1B train, and does it take the memory that was estimated?"""

from __future__ import annotations

import math
import os
import socket
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from gpu_parts.record import Record
from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.commands.bench.probes import memory_of
from lorapro_hf.commands.bench.settings import MODELS, ModelShapes
from lorapro_hf.commands.bench.training import llama_config
from lorapro_hf.commands.common.meters import state_bytes
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.optim.memory import scratch_bytes

STEPS, SEQUENCES, RANK, RATE = 10, 4, 8, 1e-4


def check_training(record: Record) -> None:
    """Ten steps of `LoRAProTrainer` in bf16, and the memory of the optimizer."""
    record.attempt("training", lambda: _check_memory(record, _train(record, "training")))


def check_ddp(record: Record) -> None:
    """The same under DistributedDataParallel on one rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with mock.patch.dict(os.environ, {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}):
        record.attempt("training under DDP", lambda: _train_wrapped(record))
        if dist.is_initialized():
            dist.destroy_process_group()


def _train_wrapped(record: Record) -> None:
    wrapper = type(_train(record, "DDP").model_wrapped).__name__
    record.check("DDP: the model is not wrapped", float(wrapper != "DistributedDataParallel"), 0)


def _model(shapes: ModelShapes, device: torch.device) -> PeftModel:
    """Random weights in bfloat16 with LoRA on all linear layers."""
    torch.manual_seed(0)
    with device:
        base = LlamaForCausalLM(llama_config(shapes)).to(torch.bfloat16)
    names = [name for name, _, _ in shapes.block]
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM"))


def _train(record: Record, name: str) -> Any:
    """The trainer after ten steps on one batch of random tokens, which it can learn by heart."""
    shapes, length = MODELS["tiny" if record.is_tiny else "llama-3.2-1b"], 16 if record.is_tiny else 512
    model = _model(shapes, record.device)
    tokens = torch.randint(shapes.vocabulary, (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        arguments = LoRAProTrainingArguments(
            output_dir=str(Path(folder)),
            max_steps=STEPS,
            per_device_train_batch_size=SEQUENCES,
            learning_rate=RATE * (10 if record.is_tiny else 1),
            lr_scheduler_type="constant",
            bf16=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not record.on_cuda,
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = LoRAProTrainer(model=model, args=arguments, train_dataset=data)
        before = _peak_memory(record, reset=True)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record.found.figures["losses"] = losses
    record.check(f"{name}: steps without a finite loss", float(STEPS - sum(map(math.isfinite, losses))), 0)
    record.check(f"{name}: last loss over first", losses[-1] / losses[0], 1)
    optimizer = unwrap_optimizer(trainer.optimizer)
    record.check(f"{name}: skipped steps", float(optimizer.skipped_steps), 0)
    if record.on_cuda:
        record.found.figures["peak of the training beyond the model, GB"] = _peak_memory(record) - before
    return trainer


def _peak_memory(record: Record, reset: bool = False) -> float:
    """The most GB that were allocated since the last reset, which leaves what is allocated now."""
    if not record.on_cuda:
        return 0.0
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 1e9


def _working_memory(record: Record, optimizer: LoRAProAdamW) -> int:
    """The bytes that a step takes beyond those before it."""
    if not record.on_cuda:
        return memory_of(optimizer.step, record.device).peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _check_memory(record: Record, trainer: Any) -> None:
    """The state and a step's working memory beside their estimates."""
    optimizer: LoRAProAdamW = unwrap_optimizer(trainer.optimizer)
    estimate, taken = optimizer.estimated_state_bytes(), state_bytes(optimizer)
    counters = 8 * len(optimizer.pairs)
    record.check("state: bytes beside the estimate", float(abs(taken - estimate)), counters)
    for pair in optimizer.pairs:
        for factor in (pair.A, pair.B):
            factor.grad = torch.full_like(factor, 1e-3)
    allowance = sum(scratch_bytes(optimizer.pairs, optimizer.config).values())
    peak = _working_memory(record, optimizer)
    record.check("step: working memory over the allowance", peak / allowance, 1)
    gradients = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    record.found.figures |= {
        "state, GB": taken / 1e9,
        "working memory of a step, GB": peak / 1e9,
        "estimate of state, gradients and working memory, GB": (estimate + gradients + allowance) / 1e9,
    }
