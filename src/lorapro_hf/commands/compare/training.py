"""How is one run trained and measured?

A plain loop, the same for every method, so that nothing differs but what the method is: the batches and their order,
the number of steps, the course of the learning rate, the dropout masks (drawn anew from seed and step), no weight
decay. Where a task has a head, an AdamW of its own trains it at one rate for all methods, so that a method's rate says
nothing about the head.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from lorapro_hf.commands.common.records import environment
from lorapro_hf.commands.compare.adapters import layers_to_adapt, make_trainable
from lorapro_hf.commands.compare.meters import PeakMemory, state_bytes
from lorapro_hf.commands.compare.optimizers import build_optimizer
from lorapro_hf.commands.compare.plan import Run, digest, source_hash
from lorapro_hf.commands.compare.settings import CompareSettings
from lorapro_hf.commands.compare.store import DIVERGED, FAILED, FINISHED
from lorapro_hf.commands.compare.tasks.base import Batch, Task, to_device

GRADIENT_BATCHES = 4  # of the first that the run trains on: what LoRA-GA starts from
_STEP_SEEDS = 1_000_003


@dataclass
class Trained:
    """What comes out of a training loop."""

    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    state_bytes: int = 0
    diverged_at: int | None = None


def train_run(
    task: Task, run: Run, settings: CompareSettings, device: torch.device, on_step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train and evaluate one run; what goes wrong is in the record, whatever it is.

    Args:
        task: The run's task.
        run: What to train.
        settings: Of the comparison.
        device: Where.
        on_step: Called after each step.

    Returns:
        A record of plain values, with `status` `"finished"`, `"diverged"` (the loss was NaN or infinite) or `"failed"`
        (an exception).
    """
    started = time.perf_counter()
    record: dict[str, Any] = {**run.entry(), "status": FAILED}
    gc.freeze()  # what is there now need not be searched for garbage of this run
    try:
        record.update(_train_and_score(task, run, settings, device, on_step))
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"[:2000]
        record["traceback"] = traceback.format_exc()[-4000:]
    gc.collect()  # the moments of full mode are as large as the model
    gc.unfreeze()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    where = {"environment": environment(), "source": source_hash()}
    return {**record, "wall_s": time.perf_counter() - started, "finished_at": finished, **where}


def _train_and_score(
    task: Task, run: Run, settings: CompareSettings, device: torch.device, on_step: Callable[[], None]
) -> dict[str, Any]:
    memory = PeakMemory(device)
    started = time.perf_counter()
    order = task.order(run.seed)
    model = copy.deepcopy(task.model).to(device)
    head = task.head_of(model)
    if head is not None:
        start_head(head, run.seed)
    layers = layers_to_adapt(model, task.settings.target_modules, head)

    def take_gradients() -> None:
        for indices in order[:GRADIENT_BATCHES]:
            loss, _ = task.loss_of(model, _batch(task, indices, model))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook")  # PEFT's, on a model whose inputs need no grads
                loss.backward()

    trained_model = make_trainable(
        model,
        run.method,
        layers,
        rank=run.rank,
        scaling=settings.scaling,
        seed=run.seed,
        take_gradients=take_gradients,
    )
    optimizer = build_optimizer(run.method, trained_model, run.learning_rate)
    trainable = sum(p.numel() for p in trained_model.parameters() if p.requires_grad)
    setup_s, started = time.perf_counter() - started, time.perf_counter()
    loop = _Loop(task, run, settings, trained_model, head, optimizer)
    trained = loop.train(order, on_step)
    train_s, started = time.perf_counter() - started, time.perf_counter()
    scores = task.score(trained_model) if trained.diverged_at is None else None
    finite = scores is not None and all(math.isfinite(value) for part in scores.values() for value in part.values())
    return {
        "status": FINISHED if finite else DIVERGED,
        "diverged_at": trained.diverged_at,
        "scores": scores,
        "losses": trained.losses,
        "examples": task.digest,
        "data": digest([[list(task.sets["train"][index]["input_ids"]) for index in step] for step in order]),
        "adapted_layers": len(layers),
        "trainable": trainable,
        "state_bytes": trained.state_bytes,
        "peak_bytes": memory.read(),
        "step_ms": _median(trained.step_ms),
        "optimizer_ms": _median(trained.optimizer_ms),
        "setup_s": setup_s,
        "train_s": train_s,
        "evaluation_s": time.perf_counter() - started,
    }


class _Loop:
    """The steps of one run."""

    def __init__(
        self, task: Task, run: Run, settings: CompareSettings, model: Any, head: nn.Module | None, optimizer: Any
    ) -> None:
        self.task, self.run, self.model = task, run, model
        self.optimizers = [optimizer]
        if head is not None:
            # after the method's optimizer was built, which is to know nothing of the head
            head.requires_grad_(True)
            rate = task.settings.head_learning_rate
            self.optimizers.append(torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0, fused=True))
        steps = task.settings.steps
        warmup = round(settings.warmup * steps)
        self.schedulers = [get_scheduler(settings.schedule, each, warmup, steps) for each in self.optimizers]
        self.head = head
        of_head = [] if head is None else list(head.parameters())
        theirs = set(of_head)
        own = [p for p in model.parameters() if p.requires_grad and p not in theirs]
        # apart from each other, so that the head's step does not depend on what else a method trains
        self.clipped = [part for part in (own if run.method.clips else [], of_head) if part]
        self.max_grad_norm = settings.max_grad_norm
        self.precision = settings.precision

    def train(self, order: list[list[int]], on_step: Callable[[], None]) -> Trained:
        """All steps, or those until the loss is no number."""
        trained = Trained()
        self.model.train()
        for step, indices in enumerate(order):
            # methods that draw numbers of their own must not change the dropout of later steps
            torch.manual_seed(self.run.seed * _STEP_SEEDS + step)
            started = self._now()
            with self._autocast():
                loss, _ = self.task.loss_of(self.model, _batch(self.task, indices, self.model))
            value = float(loss.detach())
            trained.losses.append(value)
            if not math.isfinite(value):
                trained.diverged_at = step + 1
                return trained
            loss.backward()
            trained.optimizer_ms.append(self._step())
            trained.step_ms.append((self._now() - started) * 1e3)
            on_step()
        trained.state_bytes = state_bytes(self.optimizers[0])
        return trained

    def _step(self) -> float:
        """Step and clear the gradients; the milliseconds of the method's own step."""
        if self.max_grad_norm > 0.0:
            for part in self.clipped:
                nn.utils.clip_grad_norm_(part, self.max_grad_norm)
        for optimizer in self.optimizers[1:]:
            optimizer.step()
        if self.head is not None:
            self.head.zero_grad(set_to_none=True)  # LoRA-FA steps whatever has a gradient
        started = self._now()
        self.optimizers[0].step()
        elapsed = (self._now() - started) * 1e3
        for scheduler in self.schedulers:
            scheduler.step()
        self.model.zero_grad(set_to_none=True)
        return elapsed

    def _autocast(self) -> AbstractContextManager[Any]:
        kind = self.model.device.type
        return torch.autocast(kind, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def start_head(head: nn.Module, seed: int) -> None:
    """Give the head its initial values: those of the seed."""
    torch.manual_seed(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _batch(task: Task, indices: list[int], model: Any) -> Batch:
    return to_device(task.collate([task.sets["train"][index] for index in indices]), model)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
