r"""Fine-tune a model to classify texts with LoRA-Pro: any GLUE task, or your own CSV, JSON or Parquet files.

    python scripts/run_glue.py --model_name_or_path FacebookAI/roberta-base --task_name mrpc \
        --do_train --do_eval --learning_rate 2e-4 --output_dir runs/mrpc

Files have a column `label` and one or two columns of text (`sentence1` and `sentence2`, or the first two others).
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    default_data_collator,
)
from transformers.hf_argparser import HfArg

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows, is_blank, is_number, require_columns, require_plain, with_texts
from lorapro_hf.recipes.data import DataArguments, keep_all_of, load_splits
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.metrics import GLUE_METRICS, labels_in, of_labels
from lorapro_hf.recipes.model import (
    AdapterArguments,
    ModelArguments,
    add_adapter,
    layers_without_weights,
    load_config,
    load_model,
    load_tokenizer,
)
from lorapro_hf.recipes.parser import RecipeParser

TEXT_COLUMNS = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}

REGRESSION_METRICS = ("pearson_and_spearman", "mse")


@dataclass
class GlueArguments(DataArguments):
    """The data set of texts and labels."""

    task_name: str | None = HfArg(default=None, help="GLUE task.", metadata={"choices": [*TEXT_COLUMNS]})
    max_seq_length: int = HfArg(default=128, help="Most tokens of a text, within the limit of the model.")
    pad_to_max_length: bool = HfArg(default=False, help="Pad to max_seq_length, not to the batch.")
    metric_for_labels: str | None = HfArg(
        default=None,
        help="Metric if no task is named.",
        metadata={"choices": [*dict.fromkeys(GLUE_METRICS.values()), "mse"]},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("max_seq_length")
        if self.task_name is None:
            return
        if self.dataset_name is None and not self._files():  # files may replace the download
            self.dataset_name, self.dataset_config_name = "nyu-mll/glue", self.task_name
        if self.task_name == "mnli" and self.dataset_name == "nyu-mll/glue":
            for name in ("validation", "test"):  # keep --validation_split validation_mismatched
                if getattr(self, f"{name}_split") == name:
                    setattr(self, f"{name}_split", f"{name}_matched")


def text_columns(data: GlueArguments, names: list[str]) -> tuple[str, str | None]:
    """Return the one or two columns of texts."""
    if data.task_name is not None:
        return TEXT_COLUMNS[data.task_name]
    others = [name for name in names if name not in ("label", "idx", "id")]
    if {"sentence1", "sentence2"} <= set(others):
        return "sentence1", "sentence2"
    if not others:
        raise UsageError(f"there is no column of text among {names}.")
    return others[0], others[1] if len(others) > 1 else None


def complete(rows: Dataset, split: str, data: GlueArguments) -> Dataset:
    """Return the rows that have texts and a label; a test set may hide its labels."""
    columns = [column for column in text_columns(data, rows.column_names) if column is not None]
    require_columns(rows, columns)
    guessed = data.task_name is None and columns != ["sentence1", "sentence2"]
    numbers = [column for column in columns if guessed and is_number(rows, column)]
    if numbers:
        raise UsageError(f"the column {numbers[0]} holds numbers: name the texts' columns sentence1 and sentence2.")
    where, keep_all = f"the {split} set", keep_all_of(split)
    has_labels = "label" in rows.column_names and not (split == "test" and hides_labels(rows))
    if has_labels:
        require_plain(rows, "label", where, scalars=True)
        rows = complete_rows(rows, ("label",), where, keep_all=keep_all)
    return with_texts(rows, columns, where, keep_all=keep_all, map_kwargs=data.map_kwargs)


def hides_labels(rows: Dataset) -> bool:
    """Return whether the labels of a test set are blank, or -1 as in GLUE."""
    return is_blank(rows, "label") or -1 in rows["label"]


def labels_of(splits: DatasetDict) -> list[str] | None:
    """Return the names of the labels in the order of their numbers; `None` for a regression."""
    for name, rows in splits.items():
        if "label" not in rows.column_names and name != "test":
            raise UsageError(f"the {name} set has no column `label`, only {rows.column_names}.")
    feature = splits["train"].features["label"]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if feature.dtype.startswith("float"):
        return None
    return [str(label) for label in sorted(set(splits["train"]["label"]))]


def tokenized(splits: DatasetDict, tokenizer: Any, labels: list[str] | None, data: GlueArguments) -> DatasetDict:
    """Return tokens and numbers of labels; a test set with hidden labels gets no labels."""
    are_numbers = labels is None or isinstance(splits["train"].features["label"], ClassLabel)
    numbers = {name: number for number, name in enumerate(labels or [])}

    def label_number(label: Any) -> Any:
        if not are_numbers and str(label) not in numbers:
            raise UsageError(f"the training set has no label {label!r}, only {labels}.")
        return label if are_numbers else numbers[str(label)]

    def tokenize(batch: dict[str, list[Any]], columns: tuple[str, str | None], has_labels: bool) -> dict[str, Any]:
        first, second = columns
        texts = (batch[first],) if second is None else (batch[first], batch[second])
        padding = "max_length" if data.pad_to_max_length else False
        longest = min(data.max_seq_length, tokenizer.model_max_length)
        result = tokenizer(*texts, padding=padding, max_length=longest, truncation=True)
        if has_labels:
            result["labels"] = [label_number(label) for label in batch["label"]]
        return dict(result)

    done = DatasetDict()
    for split, rows in splits.items():
        columns = text_columns(data, rows.column_names)
        has_labels = "label" in rows.column_names and not (split == "test" and hides_labels(rows))
        settings = {"fn_kwargs": {"columns": columns, "has_labels": has_labels}, **data.map_kwargs}
        done[split] = rows.map(tokenize, batched=True, remove_columns=rows.column_names, **settings)
    return done


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and predict as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, GlueArguments, LoRAProTrainingArguments),
        "run_glue.py",
        can_dry_run=True,
        description=__doc__,
    )
    model_args, adapter, data, training = parser.parse(argv)
    start(training, parser)
    splits = load_splits(
        *(data, training, model_args.cache_dir),
        also=("train",),  # for the numbers of the labels
        prepare=partial(complete, data=data),
    )
    labels = labels_of(splits)
    names = {"num_labels": 1, "problem_type": "regression"}
    if labels is not None:
        numbers = {name: number for number, name in enumerate(labels)}
        names = {"num_labels": len(labels), "label2id": numbers, "id2label": {n: name for name, n in numbers.items()}}
    source = model_args.model_name_or_path
    config = load_config(model_args, **names)
    tokenizer = load_tokenizer(model_args)
    model, report = load_model(AutoModelForSequenceClassification, model_args, config=config, output_loading_info=True)
    new_layers = layers_without_weights(model, report["missing_keys"])
    if model.config.pad_token_id is None:  # decoders classify the last token before the padding
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    model = add_adapter(model, adapter, "SEQ_CLS", training.gradient_checkpointing, new_layers=new_layers)

    with training.main_process_first(desc="tokenizing"):
        splits = tokenized(splits, tokenizer, labels, data)
    by_default = "mse" if labels is None else "accuracy"
    metric = GLUE_METRICS[data.task_name] if data.task_name else data.metric_for_labels or by_default
    if (metric in REGRESSION_METRICS) != (labels is None) or (metric == "accuracy_and_f1" and len(labels or ()) != 2):
        kind = "floats" if labels is None else f"{len(labels)} classes"
        raise UsageError(f"the metric {metric} does not fit labels that are {kind}; see --metric_for_labels.")
    trainer = LoRAProTrainer(
        model,
        training,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator if data.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        compute_metrics=of_labels(metric, is_regression=labels is None),
    )

    def lines_of(output: Any) -> list[str]:
        values = enumerate(labels_in(output.predictions, is_regression=labels is None))
        return ["index\tprediction", *(f"{n}\t{value if labels is None else labels[value]}" for n, value in values)]

    card = {"finetuned_from": source, "tasks": "text-classification", "dataset": data.task_name or data.described}
    run(trainer, parser, splits.get("test"), card, lines_of=lines_of)


if __name__ == "__main__":
    main()
