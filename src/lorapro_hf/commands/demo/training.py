"""How is the adapter trained with one method, watched and, on Ctrl-C, stopped?"""

from __future__ import annotations

import gc
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
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
from lorapro_hf.hub.card import without_card_of_peft
from lorapro_hf.hub.settings import Settings
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
from lorapro_hf.trainer.trainer import LoRAProTrainer


@dataclass
class MethodResult:
    """The figures of one method; `heldout` is set when the model has been evaluated."""

    method: DemoMethod
    learning_rate: float
    adapter: Path
    train_losses: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    optimizer_state_mb: float = 0.0
    wall_time_s: float = 0.0
    interrupted: bool = False
    heldout: Score | None = None

    @property
    def train_loss(self) -> float | None:
        """The mean training loss of the last quarter of the steps."""
        losses = self.train_losses
        return statistics.fmean(losses[-max(1, len(losses) // 4) :]) if losses else None

    @property
    def median_optimizer_ms(self) -> float | None:
        """The median time of an optimizer step in milliseconds."""
        return statistics.median(self.optimizer_ms) if self.optimizer_ms else None


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the next Ctrl-C interrupts at once, as usual."""
    made = threading.Event()

    def make(*_: object) -> None:
        made.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping after this step; the adapter is kept. Ctrl-C again aborts.", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
        yield made
        return
    previous = signal.signal(signal.SIGINT, make)
    try:
        yield made
    finally:
        signal.signal(signal.SIGINT, previous)


class _Watcher(TrainerCallback):
    """Fills a `MethodResult` during a training, and stops it on request."""

    def __init__(self, result: MethodResult, stop: threading.Event, on_step: Callable[[float], None]) -> None:
        self.result, self.stop, self.on_step = result, stop, on_step
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
        control.should_training_stop |= self.stop.is_set()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.result.train_losses.append(logs["loss"])
            self.on_step(logs["loss"])


def training_arguments(settings: DemoSettings, method: DemoMethod) -> LoRAProTrainingArguments:
    """The arguments of one method: only the learning rate, the folder and LoRA-Pro's own settings differ."""
    mode = method.lora_pro_mode
    pro: Any = {} if mode is None else {"lora_pro_mode": mode, "lora_pro_trust_region": method.trust_region}
    return LoRAProTrainingArguments(
        output_dir=str(settings.output_dir / method.name),
        lora_pro=mode is not None,
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
    result = MethodResult(method, settings.learning_rate(method), settings.output_dir / method.name)
    set_peft_model_state_dict(model, dict(initial_adapter))
    with stop_request() as stop:
        trainer = LoRAProTrainer(
            model,
            args=training_arguments(settings, method),
            train_dataset=Dataset.from_list([example.features() for example in examples]),
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[_Watcher(result, stop, on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        try:
            trainer.train()
        except KeyboardInterrupt:
            if stop.is_set():
                raise
            stop.set()
        result.wall_time_s = time.perf_counter() - started
        if trainer.optimizer is not None:
            result.optimizer_state_mb = state_bytes(trainer.optimizer) / 1e6
        result.interrupted = stop.is_set()
        with without_card_of_peft(model):  # "auto" would ask the hub about the base model
            model.save_pretrained(str(result.adapter), save_embedding_layers=False)
        tokenizer.save_pretrained(str(result.adapter))
        if method.lora_pro_mode is not None:
            Settings.of(unwrap_optimizer(trainer.optimizer) or trainer.lora_pro_config).save(result.adapter)
            data = {"dataset": "word problems"} if settings.dataset is None else {"dataset_tags": settings.dataset}
            trainer.create_model_card(model_name=method.title, **data)
    del trainer
    gc.collect()  # the moments of full mode are as large as the model
    return result
