"""How is the adapter trained with one method, watched and, on Ctrl-C, stopped?"""

from __future__ import annotations

import gc
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lorapro_hf.commands.common.meters import state_bytes
from lorapro_hf.commands.common.problems import Example
from lorapro_hf.commands.common.scoring import Score
from lorapro_hf.commands.demo.settings import DemoMethod, DemoSettings
from lorapro_hf.hub.card import CARD, kept_metadata, without_card_of_peft, write_or_warn
from lorapro_hf.hub.compose import CardFacts, compose_card
from lorapro_hf.hub.settings import Settings
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
from lorapro_hf.trainer.trainer import LoRAProTrainer

MB = 1e6


@dataclass
class MethodResult:
    """The figures of one method; `score` is set when the model has been evaluated."""

    method: DemoMethod
    learning_rate: float
    adapter: Path
    losses: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    optimizer_state_mb: float = 0.0
    wall_time_s: float = 0.0
    interrupted: bool = False
    score: Score | None = None

    @property
    def train_loss(self) -> float | None:
        """The mean training loss of the last quarter of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 4) :]) if self.losses else None

    @property
    def median_optimizer_ms(self) -> float | None:
        """The median time of an optimizer step in milliseconds."""
        return statistics.median(self.optimizer_ms) if self.optimizer_ms else None


class StopRequest:
    """While entered, the first Ctrl-C only sets `made`; the next one interrupts at once, as usual."""

    def __init__(self) -> None:
        self.made = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._make)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _make(self, signum: int, frame: FrameType | None) -> None:
        self.made = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping after this step; the adapter is kept. Ctrl-C again aborts.", file=sys.stderr)


class _Watcher(TrainerCallback):
    """Fills a `MethodResult` during a training, and stops it on request."""

    def __init__(self, result: MethodResult, stop: StopRequest, on_step: Callable[[float], None]) -> None:
        self.result = result
        self.stop = stop
        self.on_step = on_step
        self._started = 0.0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._started = self._now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.result.optimizer_ms.append((self._now() - self._started) * 1e3)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.made:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.result.losses.append(logs["loss"])
            self.on_step(logs["loss"])


def training_arguments(settings: DemoSettings, method: DemoMethod, output_dir: Path) -> LoRAProTrainingArguments:
    """The arguments of one method: only the learning rate and LoRA-Pro's own settings differ."""
    pro: dict[str, Any] = {}
    if method.lora_pro_mode is not None:
        pro = {"lora_pro_mode": method.lora_pro_mode, "lora_pro_trust_region": method.trust_region}
    return LoRAProTrainingArguments(
        output_dir=str(output_dir),
        lora_pro=method.lora_pro_mode is not None,
        learning_rate=settings.learning_rate(method),
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 10,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **pro,
    )


def train_method(
    model: PeftModel,
    initial_adapter: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: DemoSettings,
    method: DemoMethod,
    on_step: Callable[[float], None] = lambda loss: None,
) -> MethodResult:
    """Train `model` with `method` from the initial adapter on, and save the adapter in the folder `method.name`.

    The first Ctrl-C ends the training after the current step: the adapter is saved and the result is marked as
    interrupted.

    Raises:
        KeyboardInterrupt: on a second Ctrl-C.
    """
    folder = settings.output_dir / method.name
    result = MethodResult(method, settings.learning_rate(method), folder)
    set_peft_model_state_dict(model, dict(initial_adapter))
    with StopRequest() as stop:
        trainer = LoRAProTrainer(
            model,
            args=training_arguments(settings, method, folder),
            train_dataset=Dataset.from_list([example.features() for example in examples]),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[_Watcher(result, stop, on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        try:
            trainer.train()
        except KeyboardInterrupt:
            if stop.made:
                raise
            stop.made = True
        result.wall_time_s = time.perf_counter() - started
        if trainer.optimizer is not None:
            result.optimizer_state_mb = state_bytes(trainer.optimizer) / MB
        result.interrupted = stop.made
        with without_card_of_peft(model):  # "auto" would ask the hub about the base model
            model.save_pretrained(str(folder), save_embedding_layers=False)
        tokenizer.save_pretrained(str(folder))
        if method.lora_pro_mode is not None:
            Settings.of(unwrap_optimizer(trainer.optimizer) or trainer.lora_pro_config).save(folder)
            data = {"dataset": "word problems"} if settings.dataset is None else {"dataset_tags": settings.dataset}
            trainer.create_model_card(model_name=method.title, **data)
        else:
            log, card = trainer.state.log_history, folder / CARD
            write_or_warn(card, lambda: _write_plain_card(model, tokenizer, settings, method, log), set())
    del trainer
    gc.collect()  # the moments of full mode are as large as the model
    return result


def _write_plain_card(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, settings: DemoSettings, method: DemoMethod, log: list[Any]
) -> None:
    """Write the model card of an adapter of plain LoRA, which `LoRAProTrainer` leaves to its parent."""
    folder = settings.output_dir / method.name
    rows = {"learning rate": settings.learning_rate(method), "batch size": settings.batch_size, "seed": settings.seed}
    facts = CardFacts(
        model_name=method.title,
        datasets=settings.dataset or "",
        data="" if settings.dataset else "word problems",
        log_history=log,
        hyperparameters={name: f"{value:g}" for name, value in rows.items()},
        processing_class=tokenizer,
        metadata=kept_metadata(folder / CARD),
    )
    compose_card(model, None, folder, facts)
