r"""Fine-tune a causal language model on plain text with LoRA-Pro: a data set of the Hub, or your own files.

python scripts/run_clm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
    --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 \
    --do_train --do_eval --learning_rate 2e-4 --output_dir runs/wikitext
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, default_data_collator
from transformers.hf_argparser import HfArg

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import holds_messages, with_texts
from lorapro_hf.recipes.data import DataArguments, load_splits
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.metrics import load_metric
from lorapro_hf.recipes.model import AdapterArguments, ModelArguments, add_adapter, load_model, load_tokenizer
from lorapro_hf.recipes.parser import RecipeParser

DEFAULT_BLOCK = 1024
TEXT = "text"


@dataclass
class TextArguments(DataArguments):
    """The data set of texts."""

    text_column: str | None = HfArg(default=None, help="Column with the texts; by default `text`, else the first.")
    block_size: int | None = HfArg(
        default=None, help=f"Tokens of an example; by default the model's longest, at most {DEFAULT_BLOCK}."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("block_size")


def texts(rows: Dataset, split: str, data: TextArguments) -> Dataset:
    """Return the column of texts without blank cells; an empty line is a text."""
    names = rows.column_names
    conversations = next((name for name in ("messages", "conversations") if name in names), names[0])
    column = data.text_column or (TEXT if TEXT in names else conversations)
    if column not in names:
        raise UsageError(f"--text_column {column}: the columns are {names}.")
    if holds_messages(rows, column):
        raise UsageError(
            f"the column {column} of the {split} set holds messages: train on them by run_sft.py, or name a column of "
            "plain text by --text_column."
        )
    rows = with_texts(rows.select_columns([column]), (column,), f"the {split} set", map_kwargs=data.map_kwargs)
    return rows if column == TEXT else rows.rename_column(column, TEXT)


def blocks(splits: DatasetDict, tokenizer: Any, block_size: int, data: TextArguments) -> DatasetDict:
    """Join the texts of each split and cut them into blocks of equal length, without the remainder."""

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return dict(tokenizer(batch[TEXT], return_attention_mask=False, verbose=False))

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        end = len(ids) - len(ids) % block_size
        pieces = [ids[start : start + block_size] for start in range(0, end, block_size)]
        return {"input_ids": pieces, "labels": [list(piece) for piece in pieces]}

    tokens = splits.map(tokenize, batched=True, remove_columns=TEXT, **data.map_kwargs)
    others = [name for name in next(iter(tokens.values())).column_names if name != "input_ids"]
    cut_up = tokens.map(cut, batched=True, remove_columns=others, **data.map_kwargs)
    for split, rows in cut_up.items():
        if not len(rows):
            raise UsageError(f"the {split} set has fewer than {block_size} tokens; lower --block_size.")
    return cut_up


def chosen_tokens(logits: Any, labels: Any) -> Any:
    """Return the likeliest token at each position, which takes less memory than the logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train and evaluate as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, TextArguments, LoRAProTrainingArguments),
        "run_clm.py",
        can_dry_run=True,
        description=__doc__,
    )
    model_args, adapter, data, training = parser.parse(argv)
    if training.do_predict:
        raise UsageError("--do_predict: a language model on plain text has nothing to predict; use --do_eval.")
    start(training, parser)
    splits = load_splits(data, training, model_args.cache_dir, prepare=partial(texts, data=data))
    tokenizer = load_tokenizer(model_args)
    model = load_model(AutoModelForCausalLM, model_args)
    # Mamba and BLOOM have no limit of positions
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    longest = min(positions, tokenizer.model_max_length)
    block_size = data.block_size or min(longest, DEFAULT_BLOCK)
    if block_size > longest:
        raise UsageError(f"--block_size {block_size}: the model takes at most {longest} tokens.")
    model = add_adapter(model, adapter, "CAUSAL_LM", training.gradient_checkpointing)
    with training.main_process_first(desc="tokenizing"):
        splits = blocks(splits, tokenizer, block_size, data)

    accuracy = load_metric("accuracy")

    def token_accuracy(prediction: Any) -> dict[str, float]:
        predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        return accuracy(np.ravel(predicted), np.ravel(labels))

    trainer = LoRAProTrainer(
        model,
        training,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=token_accuracy,
        preprocess_logits_for_metrics=chosen_tokens,
    )

    def with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
        loss = metrics["eval_loss"]
        return {**metrics, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    card = {"finetuned_from": model_args.model_name_or_path, "tasks": "text-generation", "dataset": data.described}
    run(trainer, parser, card=card, finish_metrics=with_perplexity)


if __name__ == "__main__":
    main()
