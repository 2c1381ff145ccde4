r"""Fine-tune an encoder-decoder such as T5 with LoRA-Pro: summaries, translations, or any text-to-text task.

python scripts/run_seq2seq.py --model_name_or_path google-t5/t5-small --dataset_name EdinburghNLP/xsum \
    --text_column document --summary_column summary --source_prefix "summarize: " \
    --do_train --do_eval --predict_with_generate --learning_rate 1e-4 --output_dir runs/xsum

python scripts/run_seq2seq.py --model_name_or_path google-t5/t5-small --dataset_name wmt/wmt16 \
    --dataset_config_name ro-en --source_lang en --target_lang ro --metric sacrebleu \
    --source_prefix "translate English to Romanian: " --do_train --predict_with_generate --output_dir runs/en-ro
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, Seq2SeqTrainer
from transformers import Seq2SeqTrainingArguments as Seq2SeqSettings
from transformers.hf_argparser import HfArg

from lorapro_hf import LoRAProTrainerMixin, LoRAProTrainingArguments
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows, is_blank, require_columns, with_texts
from lorapro_hf.recipes.data import DataArguments, keep_all_of, load_splits
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.metrics import load_metric
from lorapro_hf.recipes.model import AdapterArguments, ModelArguments, add_adapter, load_model, load_tokenizer
from lorapro_hf.recipes.parser import RecipeParser


class LoRAProSeq2SeqTrainer(LoRAProTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with LoRA-Pro."""


@dataclass
class TrainingSettings(Seq2SeqSettings, LoRAProTrainingArguments):
    """`Seq2SeqTrainingArguments` with LoRA-Pro's settings."""


@dataclass
class TextPairArguments(DataArguments):
    """The data set of pairs: a text to read and a text to write."""

    text_column: str | None = HfArg(default=None, help="Column to read; by default the first.")
    summary_column: str | None = HfArg(default=None, help="Column to write; by default the second.")
    source_lang: str | None = HfArg(default=None, help="Language to read from a column `translation`.")
    target_lang: str | None = HfArg(default=None, help="Language to write.")
    label_texts: list[str] | None = HfArg(
        default=None, help="Texts to write for the labels 0, 1, ... of a column of numbers."
    )
    source_prefix: str = HfArg(default="", help="Beginning of every text to read, as T5 expects it.")
    second_text_column: str | None = HfArg(default=None, help="Second column to read.")
    second_prefix: str = HfArg(default=" ", help="Text between the two texts to read.")
    max_source_length: int = HfArg(default=1024, help="Most tokens of a text to read.")
    max_target_length: int = HfArg(default=128, help="Most tokens of a text to write.")
    num_beams: int = HfArg(default=1, help="Beams of the generation.")
    metric: str = HfArg(
        default="rouge",
        help="Metric of the generated texts.",
        metadata={"choices": ["rouge", "sacrebleu", "exact_match"]},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("max_source_length", "max_target_length", "num_beams")
        if (self.source_lang is None) != (self.target_lang is None):
            raise UsageError("--source_lang and --target_lang go together.")


def columns_of(data: TextPairArguments, names: list[str]) -> tuple[str, str]:
    """Return the columns to read and to write, for a column `translation` by the names of `Dataset.flatten`."""
    if data.source_lang is not None:
        languages = [name.removeprefix("translation.") for name in names if name.startswith("translation.")]
        if not languages:
            raise UsageError(f"--source_lang needs a column `translation`; the columns are {names}.")
        if not {data.source_lang, data.target_lang} <= set(languages):
            raise UsageError(f"--source_lang and --target_lang must be among {sorted(languages)}.")
        return f"translation.{data.source_lang}", f"translation.{data.target_lang}"
    if len(names) < 2 and not (data.text_column and data.summary_column):
        raise UsageError(f"two columns of text are needed; the columns are {names}.")
    return data.text_column or names[0], data.summary_column or names[1]


def complete(rows: Dataset, split: str, data: TextPairArguments) -> Dataset:
    """Return the columns to read and to write without blank rows; a test set may hide the texts to write."""
    rows = rows if data.source_lang is None else rows.flatten()
    source, target = columns_of(data, rows.column_names)
    read = [source] if data.second_text_column is None else [source, data.second_text_column]
    require_columns(rows, [*read, target])
    where, keep_all = f"the {split} set", keep_all_of(split)
    rows = rows.select_columns([*dict.fromkeys((source, target, *read))])
    is_hidden = split == "test" and is_blank(rows, target)
    if data.label_texts is not None and not is_hidden:
        rows = complete_rows(rows, (target,), where, keep_all=keep_all)
    texts = read if is_hidden or data.label_texts is not None else [*read, target]
    need_text = (target,) if target in texts and split != "test" else ()
    return with_texts(rows, texts, where, need_text, keep_all, data.map_kwargs)


def texts_of(data: TextPairArguments, names: list[str]) -> Any:
    """Return a function from a row to the text to read and the text to write (`None` if it is hidden)."""
    source, target = columns_of(data, names)

    def texts(row: dict[str, Any]) -> tuple[str, str | None]:
        second = "" if data.second_text_column is None else data.second_prefix + row[data.second_text_column]
        read, written = row[source] + second, row[target]
        if written is None or data.label_texts is None:
            return read, written
        try:
            label = int(written)
        except ValueError as error:
            raise UsageError(f"--label_texts: {written!r} in the column {target} is no number of a label.") from error
        if label >= len(data.label_texts):
            raise UsageError(f"--label_texts has {len(data.label_texts)} texts, none for the label {label}.")
        return read, None if label < 0 else data.label_texts[label]  # hidden, as in GLUE's test sets

    return texts


def tokenized(splits: DatasetDict, tokenizer: Any, data: TextPairArguments) -> DatasetDict:
    """Return the tokens of the texts to read and, unless they are hidden, of the texts to write."""
    names = next(iter(splits.values())).column_names
    texts = texts_of(data, names)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        source, target = texts(row)
        result = tokenizer(data.source_prefix + source, max_length=data.max_source_length, truncation=True)
        if target is None:
            return dict(result)
        labels = tokenizer(text_target=target, max_length=data.max_target_length, truncation=True)
        return {**result, "labels": labels["input_ids"]}

    return splits.map(tokenize, remove_columns=names, **data.map_kwargs)


def of_texts(metric_name: str, tokenizer: Any) -> Any:
    """Return `compute_metrics` for generated tokens."""
    metric = load_metric(metric_name)

    def compute(prediction: Any) -> dict[str, float]:
        predictions, references = (
            [text.strip() for text in decoded(tokenizer, tokens)]
            for tokens in (prediction.predictions, prediction.label_ids)
        )
        return metric(predictions, references)

    return compute


def decoded(tokenizer: Any, tokens: Any) -> list[str]:
    """Return the texts of tokens, of which -100 is padding."""
    return list(tokenizer.batch_decode(np.where(tokens < 0, tokenizer.pad_token_id, tokens), skip_special_tokens=True))


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and predict as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, TextPairArguments, TrainingSettings),
        "run_seq2seq.py",
        can_dry_run=True,
        description=__doc__,
    )
    model_args, adapter, data, training = parser.parse(argv)
    if training.do_predict and not training.predict_with_generate:
        raise UsageError("--do_predict needs --predict_with_generate.")
    training.generation_max_length = training.generation_max_length or data.max_target_length
    training.generation_num_beams = training.generation_num_beams or data.num_beams
    start(training, parser)
    splits = load_splits(data, training, model_args.cache_dir, prepare=partial(complete, data=data))
    source = model_args.model_name_or_path
    tokenizer = load_tokenizer(model_args)
    if hasattr(tokenizer, "set_src_lang_special_tokens"):  # mBART, M2M100, NLLB
        raise UsageError(
            f"{source} marks languages by tokens of its own, which this script does not set; take a model such as T5, "
            "which reads the task in words."
        )
    model = load_model(AutoModelForSeq2SeqLM, model_args)
    model = add_adapter(model, adapter, "SEQ_2_SEQ_LM", training.gradient_checkpointing)
    with training.main_process_first(desc="tokenizing"):
        splits = tokenized(splits, tokenizer, data)
    pad = DataCollatorForSeq2Seq(tokenizer, model=model)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        # the trainer would take labels of `None` for labels
        return {name: values for name, values in pad(rows).items() if values is not None}

    trainer = LoRAProSeq2SeqTrainer(
        model,
        training,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=collate,
        compute_metrics=of_texts(data.metric, tokenizer) if training.predict_with_generate else None,
    )

    def lines_of(output: Any) -> list[str]:
        return [" ".join(text.split()) for text in decoded(tokenizer, output.predictions)]

    task = "translation" if data.source_lang else "summarization" if data.metric == "rouge" else "text2text-generation"
    card = {"finetuned_from": source, "tasks": task, "dataset": data.described}
    run(trainer, parser, splits.get("test"), card, lines_of=lines_of)


if __name__ == "__main__":
    main()
