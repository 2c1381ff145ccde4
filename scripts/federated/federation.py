"""The server and the clients of a federation that fine-tunes a language model on word problems with LoRA-Pro.

Each client has kinds of problems of its own, and the clients have from 40 to 320 problems. The server runs the same
rounds twice, with plain averaging and with LoRA-FAIR, and writes the held-out loss after each round to `losses.json`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import DataCollatorForSeq2Seq
from transformers.trainer_callback import PrinterCallback

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.commands.common.models import load_base_model
from lorapro_hf.commands.common.problems import encode
from lorapro_hf.commands.common.word_problems import TEMPLATES, word_problems
from lorapro_hf.federated import LoRAFairStrategy

SIZES = (320, 160, 80, 40)  # problems of each client, of a quarter of the kinds each
MAX_LENGTH = 128

server = ServerApp()
client = ClientApp()


@lru_cache(maxsize=1)
def model_and_tokenizer(name: str, rank: int) -> tuple[Any, Any]:
    """Return the model with a fresh adapter, the same in each process, and its tokenizer."""
    base = load_base_model(name or None)
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base.model, config), base.tokenizer


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the adapter's tensors."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def problems_of(partition: int) -> Dataset:
    """Return the problems of a client: the templates take turns in the training set."""
    kinds = len(TEMPLATES) // len(SIZES)
    train, _ = word_problems(SIZES[0] * len(SIZES), len(TEMPLATES) * 8)
    own = [row for row in range(len(train)) if row % len(TEMPLATES) // kinds == partition]
    return train.select(own[: SIZES[partition]])


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train the received adapter on the client's own problems."""
    settings, partition = context.run_config, int(context.node_config["partition-id"])
    model, tokenizer = model_and_tokenizer(settings["model"], settings["rank"])
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    examples = encode(problems_of(partition), tokenizer, MAX_LENGTH)
    trainer = LoRAProTrainer(
        model,
        args=LoRAProTrainingArguments(
            output_dir=f"{settings['output']}/client{partition}",
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch-size"],
            lora_pro_mode="efficient",  # the smallest state: four clients share a machine
            learning_rate=settings["learning-rate"],
            lr_scheduler_type="constant",
            seed=message.content["config"]["server-round"],  # other batches in each round
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([example.features() for example in examples]),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    metrics = MetricRecord({"num-examples": len(examples), "train-loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(adapter_of(model)), "metrics": metrics}), reply_to=message)


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, count: int) -> float:
    """Return the mean loss per answer token on problems of all kinds."""
    _, rows = word_problems(0, len(TEMPLATES) * 8)
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    examples = [example.features() for example in encode(rows.select(range(count)), tokenizer, MAX_LENGTH)]
    total = tokens = 0.0
    model.eval()
    for start in range(0, len(examples), 8):
        batch = collate(examples[start : start + 8])
        answered = float((batch["labels"] != -100).sum())
        total, tokens = total + float(model(**batch).loss) * answered, tokens + answered
    return total / tokens


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the rounds with both strategies, from the same adapter, and write the losses."""
    settings = context.run_config
    model, tokenizer = model_and_tokenizer(settings["model"], settings["rank"])
    start, nodes = adapter_of(model), len(SIZES)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        return MetricRecord({"loss": held_out_loss(model, tokenizer, settings["held-out"])})

    counts = {"fraction_evaluate": 0.0, "min_train_nodes": nodes, "min_available_nodes": nodes}
    found: dict[str, dict[str, Any]] = {}
    for name, strategy in (("plain averaging", FedAvg(**counts)), ("LoRA-FAIR", LoRAFairStrategy(**counts))):
        result = strategy.start(grid, ArrayRecord(start), settings["rounds"], evaluate_fn=evaluate)
        trained = result.train_metrics_clientapp
        found[name] = {
            "held-out loss": [result.evaluate_metrics_serverapp[k]["loss"] for k in range(settings["rounds"] + 1)],
            **{key: [each[key] for each in trained.values()] for key in next(iter(trained.values()))},
        }
        model.save_pretrained(Path(settings["output"]) / name.replace(" ", "_"), save_embedding_layers=False)
    (Path(settings["output"]) / "losses.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
