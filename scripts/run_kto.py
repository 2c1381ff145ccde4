r"""Align a language model with good and bad answers by KTO, with LoRA-Pro and TRL.

Rows have `prompt`, `completion` and `label`, which is true for a good answer; prompt and completion are both texts or
both lists of messages.

    python scripts/run_kto.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/kto-mix-14k --learning_rate 1e-5 --output_dir runs/kto

The reference is the base model, or with `--adapter_name_or_path` and newer versions of TRL the adapter before the
training.
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

from dataclasses import dataclass, field
from functools import partial

from datasets import Dataset, Value

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows, require_columns
from lorapro_hf.recipes.data import DataArguments, load_splits
from lorapro_hf.recipes.endings import one_line_errors
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.language import complete, parts, require_chat_template, with_turns
from lorapro_hf.recipes.model import AdapterArguments, ModelArguments, load_tokenizer
from lorapro_hf.recipes.parser import RecipeParser

with one_line_errors():
    from lorapro_hf import LoRAProKTOConfig, LoRAProKTOTrainer


@dataclass
class JudgedArguments(DataArguments):
    """The data set of judged answers."""

    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt."})
    completion_column: str = field(default="completion", metadata={"help": "Column with the answer."})
    label_column: str = field(default="label", metadata={"help": "Column with the judgement: true or 1 is good."})


@dataclass
class KTOSettings(LoRAProKTOConfig):
    """`trl.KTOConfig` with LoRA-Pro's settings."""

    trust_remote_code: bool = field(default=False, init=False)  # `ModelArguments` has it


def judged(rows: Dataset, split: str, data: JudgedArguments) -> Dataset:
    """Return the columns by TRL's names, without blank rows."""
    names = {data.prompt_column: "prompt", data.completion_column: "completion", data.label_column: "label"}
    require_columns(rows, names, " Name them by --prompt_column, --completion_column and --label_column.")
    where, label = f"the {split} set", data.label_column
    rows = complete_rows(rows.select_columns([*names]), (label,), where)
    strange = sorted(set(map(repr, rows.unique(label))) - {"True", "False", "1", "0", "1.0", "0.0"})
    if strange:
        raise UsageError(f"the column {label} of {where} must hold true and false, or 1 and 0, and has {strange[0]}.")
    rows = with_turns(rows, (data.prompt_column, data.completion_column), where, data.map_kwargs)
    rows = rows.cast_column(label, Value("bool"))
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train and evaluate as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, JudgedArguments, KTOSettings),
        "run_kto.py",
        can_dry_run=True,
        description=__doc__,
    )
    model_args, adapter, data, training = parser.parse(argv)
    if training.do_predict:
        raise UsageError("--do_predict: judged answers have nothing to predict; use --do_eval.")
    if training.loss_type == "kto" and training.per_device_train_batch_size < 2:
        raise UsageError("--per_device_train_batch_size 1: KTO compares the rows of a batch; take 2 or more.")
    complete(training, model_args, data)
    start(training, parser)
    tokenizer = load_tokenizer(model_args)
    splits = load_splits(data, training, model_args.cache_dir, prepare=partial(judged, data=data))
    for rows in splits.values():
        require_chat_template(tokenizer, rows, "prompt", model_args)
    trainer = LoRAProKTOTrainer(
        args=training,
        train_dataset=splits.get("train", splits.get("validation")),  # TRL requires one
        eval_dataset=splits.get("validation"),
        **parts(training, model_args, adapter, tokenizer),
    )
    run(trainer, parser, card={"dataset_name": data.described})


if __name__ == "__main__":
    main()
