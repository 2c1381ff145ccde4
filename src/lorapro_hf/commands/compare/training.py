"""How is one run trained and measured?

`LoRAProTrainer` trains every method; for the methods of others it is plain `Trainer` with their optimizer. Runs differ
in the method alone: batches and their order, number of steps, schedule and dropout masks (drawn anew from seed and
step) are the same, and nothing decays. Where a task has a head, an AdamW of its own trains it at one rate for all
methods, so that a method's rate says nothing about the head.
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
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.trainer_callback import PrinterCallback

from lorapro_hf.commands.common.meters import state_bytes
from lorapro_hf.commands.common.optimizers import build
from lorapro_hf.commands.common.records import environment
from lorapro_hf.commands.compare.adapters import layers_to_adapt, make_trainable
from lorapro_hf.commands.compare.plan import PlannedRun, digest
from lorapro_hf.commands.compare.settings import CompareSettings
from lorapro_hf.commands.compare.store import DIVERGED, FINISHED, RunRecord
from lorapro_hf.commands.compare.tasks.base import LoadedTask, to_device
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
from lorapro_hf.trainer.trainer import LoRAProTrainerMixin

GRADIENT_BATCHES = 4  # of the first that the run trains on: LoRA-GA starts from their gradients
_STEP_SEEDS = 1_000_003


class _DivergedError(Exception):
    """The loss is NaN or infinite."""


class _StepTimes(TrainerCallback):
    """Times the steps of a `Trainer` and the optimizer's part in them, in ms, and calls `on_step` after each."""

    def __init__(self, device: torch.device, on_step: Callable[[], None]) -> None:
        self.device, self.on_step = device, on_step
        self.begun: dict[str, float] = {}
        self.times: dict[str, list[float]] = {"step_ms": [], "optimizer_ms": []}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun["step_ms"] = self._now()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.begun["optimizer_ms"] = self._now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._end("optimizer_ms")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._end("step_ms")
        self.on_step()

    def medians(self) -> dict[str, float | None]:
        return {name: statistics.median(times) if times else None for name, times in self.times.items()}

    def _end(self, name: str) -> None:
        self.times[name].append((self._now() - self.begun[name]) * 1e3)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _TaskTrainer(Trainer):
    """A `Trainer` with the loss of a task."""

    task: LoadedTask

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.task.loss_of(model, inputs)[0]

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing is made of their number, and counting them takes as long as a small layer."""
        return 0


class RunTrainer(LoRAProTrainerMixin, _TaskTrainer):
    """Takes the batches of a run in their order and leaves the head to an optimizer of its own.

    The gradient of the head is clipped to `max_head_norm`; 0 for no clipping.
    """

    def __init__(
        self, task: LoadedTask, run: PlannedRun, head: nn.Module | None, max_head_norm: float, **kwargs: Any
    ) -> None:
        indices: Any = [index for step in task.order(run.seed)[: run.steps] for index in step]
        super().__init__(train_dataset=indices, **kwargs)
        _change_modes_once(self.model)
        self.task, self.run, self.head, self.max_head_norm = task, run, head, max_head_norm
        self.losses: list[float] = []
        if head is not None:
            rate = task.settings.head_learning_rate
            self.head_optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0, fused=True)
            steps = (self.args.get_warmup_steps(self.args.max_steps), self.args.max_steps)
            self.head_scheduler = get_scheduler(self.args.lr_scheduler_type, self.head_optimizer, *steps)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The examples by their indices, which are in their order already."""
        dataset: Any = self.train_dataset

        def collate(indices: list[int]) -> Any:
            return to_device(self.task.batch(indices), self.model)

        return DataLoader(dataset, batch_size=self.args.train_batch_size, collate_fn=collate)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer of the method, after its callbacks have prepared the model."""
        method = self.run.method
        if self.optimizer is None and not method.is_lora_pro:
            self.optimizer = build(method.optimizer, self.model, self.run.learning_rate, method.settings)
        return super().create_optimizer(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the parent, with fixed dropout masks, a step of the head, and the loss stored."""
        # methods that draw numbers of their own must not change the dropout of later steps
        torch.manual_seed(self.run.seed * _STEP_SEEDS + self.state.global_step)
        if self.head is not None:
            self.head.requires_grad_(True)  # only now: the method's optimizer is built and does not hold the head
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        if not math.isfinite(self.losses[-1]):
            raise _DivergedError
        if self.head is not None:
            if self.max_head_norm > 0.0:  # apart, so that the step does not depend on what else a method trains
                nn.utils.clip_grad_norm_(self.head.parameters(), self.max_head_norm)
            self.head_optimizer.step()
            self.head_scheduler.step()
            self.head.zero_grad(set_to_none=True)  # LoRA-FA steps all parameters that have a gradient
        return loss


def _change_modes_once(model: nn.Module) -> None:
    """Put a model into training mode, and let further calls of `train` return at once where they change nothing.

    `Trainer` makes one in each step, which takes a tenth of the step of a tiny model with adapters.
    """
    change = model.train().train

    def train(mode: bool = True) -> nn.Module:
        return model if model.training is mode else change(mode)

    model.train = train  # type: ignore[method-assign]


def train_run(
    task: LoadedTask,
    run: PlannedRun,
    settings: CompareSettings,
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> RunRecord:
    """Train and evaluate one run, and call `on_step` after each step; any exception ends up in the record."""
    started = time.perf_counter()
    record = RunRecord(**run.entry())
    gc.freeze()  # objects that are there now need not be searched for garbage of this run
    try:
        _train_and_score(record, task, run, settings, _StepTimes(device, on_step))
    except Exception as error:
        record.error = f"{type(error).__name__}: {error}"[:2000]
        record.traceback = traceback.format_exc()[-4000:]
    gc.collect()  # the moments of full mode are as large as the model
    gc.unfreeze()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    record.finished_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record.wall_s, record.environment = time.perf_counter() - started, environment()
    return record


def _train_and_score(
    record: RunRecord, task: LoadedTask, run: PlannedRun, settings: CompareSettings, times: _StepTimes
) -> None:
    on_cuda = times.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(times.device)
    begun = time.perf_counter()
    trainer = _trainer(record, task, run, settings, times)
    ready = time.perf_counter()
    try:
        trainer.train()
        record.state_bytes = state_bytes(unwrap_optimizer(trainer.optimizer))
    except _DivergedError:
        record.diverged_at = len(trainer.losses)
    trained = time.perf_counter()
    record.losses = trainer.losses
    of_head = set() if trainer.head is None else set(trainer.head.parameters())
    # after the training: LoRA-FA's optimizer freezes A
    record.trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad and p not in of_head)
    status = DIVERGED
    if record.diverged_at is None:
        # without the wrapper for mixed precision
        record.scores = task.score(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
        if all(math.isfinite(value) for metrics in record.scores.values() for value in metrics.values()):
            status = FINISHED
    record.status = status
    record.setup_s, record.train_s = ready - begun, trained - ready
    record.evaluation_s = time.perf_counter() - trained
    record.peak_bytes = torch.cuda.max_memory_allocated(times.device) if on_cuda else None
    medians = times.medians()
    record.step_ms, record.optimizer_ms = medians["step_ms"], medians["optimizer_ms"]


def _trainer(
    record: RunRecord, task: LoadedTask, run: PlannedRun, settings: CompareSettings, times: _StepTimes
) -> RunTrainer:
    """The trainer of a run; the record gets the data and the number of layers."""
    order = task.order(run.seed)[: run.steps]
    model = copy.deepcopy(task.model).to(times.device)
    head = task.start_head(model, run.seed)
    layers = layers_to_adapt(model, task.settings.target_modules, head)

    def take_gradients() -> None:
        for indices in order[:GRADIENT_BATCHES]:
            loss, _ = task.loss_of(model, to_device(task.batch(indices), model))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook")  # PEFT's, on a model whose inputs need no grads
                loss.backward()

    inputs = (
        {name: value for name, value in to_device(task.batch(indices), model).items() if name != "labels"}
        for indices in order
    )
    adapted = make_trainable(model, run, layers, settings.scaling, take_gradients, inputs)
    record.examples = task.digest
    record.data = digest([task.digest, order])
    record.adapted_layers = len(layers)
    trainer = RunTrainer(
        task,
        run,
        head,
        settings.max_grad_norm,
        model=adapted,
        args=_training_arguments(run, settings, times.device),
        callbacks=[times, *run.method.make_callbacks()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(run: PlannedRun, settings: CompareSettings, device: torch.device) -> LoRAProTrainingArguments:
    pro = asdict(LoRAProConfig(**run.method.settings)) if run.method.is_lora_pro else {}
    return LoRAProTrainingArguments(
        output_dir=str(settings.output_dir),
        lora_pro=run.method.is_lora_pro,
        **{f"lora_pro_{name}": value for name, value in pro.items()},
        learning_rate=run.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps(run.steps),
        max_steps=run.steps,
        per_device_train_batch_size=run.task.batch_size,
        max_grad_norm=settings.max_grad_norm if run.method.clips else 0.0,
        bf16=settings.precision == "bf16",
        seed=run.seed,
        use_cpu=device.type == "cpu",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # each loss is looked at anyway
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
