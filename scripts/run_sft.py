r"""Fine-tune a language model on conversations or instructions with LoRA-Pro and TRL.

Conversations (a column `messages`, or `conversations` in ShareGPT's form), prompts with completions (columns `prompt`
and `completion`) and plain text (a column `text`) need no more flags:

    python scripts/run_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/Capybara --packing --learning_rate 2e-4 --output_dir runs/capybara

Other columns need their names:

    python scripts/run_sft.py --model_name_or_path meta-llama/Llama-2-7b-hf --dataset_name meta-math/MetaMathQA \
        --prompt_column query --completion_column response --prompt_template alpaca \
        --learning_rate 2e-4 --output_dir runs/metamath

Rows with a column `image`, or `images` with a list, beside messages or prompts with completions train a
vision-language model such as llava-hf/llava-interleave-qwen-0.5b-hf.

From a recipe: python scripts/run_sft.py configs/smollm2-135m.yaml --learning_rate 3e-4
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows, holds_messages
from lorapro_hf.recipes.data import load_splits
from lorapro_hf.recipes.endings import one_line_errors
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.instructions import ALPACA, CHAT, InstructionArguments, prepared
from lorapro_hf.recipes.language import complete, parts, with_turns
from lorapro_hf.recipes.model import AdapterArguments, ModelArguments, load_tokenizer
from lorapro_hf.recipes.parser import RecipeParser
from lorapro_hf.recipes.pictures import load_vision_processor, picture_column, with_pictures

with one_line_errors():
    from lorapro_hf import LoRAProSFTConfig, LoRAProSFTTrainer

TEMPLATES = {"alpaca": ALPACA}  # the prompt of gsm8k_alpaca and humaneval_alpaca in `lorapro evaluate`


@dataclass
class SFTSettings(LoRAProSFTConfig):
    """`trl.SFTConfig` with LoRA-Pro's settings."""

    trust_remote_code: bool = field(default=False, init=False)  # `ModelArguments` has it


def is_conversation(rows: Dataset, data: InstructionArguments) -> bool:
    """Return whether the rows need a chat template."""
    if data.prompt_column is not None:
        return data.prompt_template == CHAT
    if {"messages", "conversations"} & set(rows.column_names):
        return True
    return "prompt" in rows.column_names and not isinstance(rows[0]["prompt"], str)


def trainable(rows: Dataset, split: str, text_column: str, map_kwargs: dict[str, Any]) -> Dataset:
    """Return the rows without blank ones, if TRL can train on their columns."""
    names, where = rows.column_names, f"the {split} set"
    ready = next((column for column in ("messages", "conversations", "input_ids") if column in names), None)
    if ready == "input_ids":
        return complete_rows(rows, (ready,), where)
    if ready is not None:
        if len(rows) and not holds_messages(rows, ready):
            raise UsageError(f"the column {ready} of {where} must hold lists of messages with a role and a content.")
        return with_turns(rows, (ready,), where, map_kwargs)
    columns = ("prompt", "completion") if {"prompt", "completion"} <= set(names) else (text_column,)
    if not set(columns) <= set(names):
        raise UsageError(
            f"the columns {rows.column_names} hold neither messages, prompt and completion, nor {text_column}; name "
            "them by --prompt_column and --completion_column, or by --dataset_text_field."
        )
    return with_turns(rows, columns, where, map_kwargs, need_text=columns[1:])


def require_trainable_pictures(splits: DatasetDict, training: SFTSettings) -> None:
    """Refuse settings and columns that TRL does not combine with pictures."""
    for name in ("packing", "padding_free"):
        if getattr(training, name):
            raise UsageError(f"--{name}: TRL packs texts alone, and the rows have pictures; leave it out.")
    for split, rows in splits.items():
        if picture_column(rows) is None:
            raise UsageError(f"the {split} set has no column image or images, only {rows.column_names}.")
        if "conversations" in rows.column_names:
            raise UsageError(
                "pictures need a column `messages`, with role and content in each message, and not `conversations`."
            )


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train and evaluate as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, InstructionArguments, SFTSettings),
        "run_sft.py",
        can_dry_run=True,
        description=__doc__,
    )
    model_args, adapter, data, training = parser.parse(argv)
    if training.do_predict:
        raise UsageError("--do_predict: use `lorapro evaluate`, which generates answers and marks them.")
    complete(training, model_args, data)
    start(training, parser)
    tokenizer = load_tokenizer(model_args)

    def prepare(rows: Dataset, split: str) -> Dataset:
        rows = prepared(rows, split, data, tokenizer, TEMPLATES)
        rows = trainable(rows, split, training.dataset_text_field, data.map_kwargs)
        return with_pictures(rows, split, data)

    splits = load_splits(data, training, model_args.cache_dir, prepare=prepare)
    processor: Any = tokenizer
    if any(map(picture_column, splits.values())):
        require_trainable_pictures(splits, training)
        processor = load_vision_processor(model_args)
    for rows in splits.values():
        has_template = processor.chat_template or training.chat_template_path
        if is_conversation(rows, data) and not has_template:
            raise UsageError(
                f"{model_args.model_name_or_path} has no chat template for conversations: name one by "
                "--chat_template_path, or take the model's instruction-tuned variant or another --prompt_template."
            )
        # TRL does not recognize ShareGPT's form here
        if training.assistant_only_loss and ("conversations" in rows.column_names or not is_conversation(rows, data)):
            raise UsageError("--assistant_only_loss needs conversations (a column `messages`).")
    trainer = LoRAProSFTTrainer(
        args=training,
        train_dataset=splits.get("train", splits.get("validation")),  # TRL requires one
        eval_dataset=splits.get("validation"),
        **parts(training, model_args, adapter, processor),
    )
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        if rows is not None and not len(rows):
            raise UsageError(f"--max_length {training.max_length} cuts off every completion; raise it.")
    run(trainer, parser, card={"dataset_name": data.described})


if __name__ == "__main__":
    main()
