r"""Train a language model by GRPO on rewards for its own answers, with LoRA-Pro and TRL.

Rows have `prompt`, a text or a list of messages, and the columns that the rewards need. The reward `number` is 1 for an
answer whose last number is that of the column `answer`; FILE.py:FUNCTION and MODULE:FUNCTION name others, which TRL
calls with `prompts`, `completions` and all columns as keywords:

    python scripts/run_grpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k \
        --dataset_config_name main --prompt_column question --prompt_template chat --reward_funcs number \
        --learning_rate 1e-5 --output_dir runs/grpo

With `--beta` above 0 the reference is the base model, or with `--adapter_name_or_path` the adapter before the training.
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

import importlib
import inspect
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import require_columns
from lorapro_hf.recipes.data import DataArguments, load_splits
from lorapro_hf.recipes.endings import one_line_errors
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.language import complete, parts, require_chat_template, with_turns
from lorapro_hf.recipes.model import AdapterArguments, ModelArguments, load_tokenizer
from lorapro_hf.recipes.parser import RecipeParser

with one_line_errors():
    from lorapro_hf import LoRAProGRPOConfig, LoRAProGRPOTrainer

CHAT = "chat"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
BY_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


@dataclass
class RewardedArguments(DataArguments):
    """The data set of prompts, and the rewards of answers."""

    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "chat (the tokenizer's chat template) or a text with {instruction}."}
    )
    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards to add up: number, FILE.py:FUNCTION or MODULE:FUNCTION."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reward_funcs:
            raise UsageError("name a reward by --reward_funcs: number, FILE.py:FUNCTION or MODULE:FUNCTION.")
        if self.prompt_template not in (None, CHAT) and "{instruction}" not in str(self.prompt_template):
            raise UsageError(f"--prompt_template {self.prompt_template} must be chat or a text with {{instruction}}.")


@dataclass
class GRPOSettings(LoRAProGRPOConfig):
    """`trl.GRPOConfig` with LoRA-Pro's settings."""

    trust_remote_code: bool = field(default=False, init=False)  # `ModelArguments` has it


def last_number(text: str) -> float | None:
    """Return the last number of a text; `None` if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def number(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """Return 1 for each completion whose last number is that of the answer, otherwise 0."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    pairs = zip(texts, answer, strict=True)
    return [float(last_number(text) == last_number(str(right)) is not None) for text, right in pairs]


def reward_of(name: str) -> Callable[..., Any]:
    """Return the reward of a name."""
    if name == number.__name__:
        return number
    source, _, function = name.rpartition(":")
    if not source:
        raise UsageError(f"--reward_funcs {name} must be number, FILE.py:FUNCTION or MODULE:FUNCTION.")
    try:
        found = runpy.run_path(source) if source.endswith(".py") else vars(importlib.import_module(source))
    except (ImportError, OSError, SyntaxError) as error:
        raise UsageError(f"--reward_funcs {name}: cannot read {source}: {error}.") from error
    if not callable(found.get(function)):
        raise UsageError(f"--reward_funcs {name}: {source} has no function {function}.")
    return found[function]


def columns_for(reward: Callable[..., Any]) -> list[str]:
    """Return the columns that a reward cannot do without."""
    parameters = inspect.signature(reward).parameters.values()
    needed = [each for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    return [each.name for each in needed if each.name not in BY_TRL]


def prompts(rows: Dataset, split: str, data: RewardedArguments, rewards: list[Callable[..., Any]]) -> Dataset:
    """Return the rows with the prompt as the template says, without blank rows."""
    column, where = data.prompt_column, f"the {split} set"
    require_columns(rows, (column,), " Name the prompt's by --prompt_column.")
    for name, reward in zip(data.reward_funcs, rewards, strict=True):
        require_columns(rows, columns_for(reward), f" The reward {name} needs it.")
    rows = with_turns(rows, (column,), where, data.map_kwargs, need_text=(column,))
    if column != "prompt":
        rows = rows.remove_columns("prompt") if "prompt" in rows.column_names else rows
        rows = rows.rename_column(column, "prompt")
    template = data.prompt_template
    if template is None:
        return rows
    if not isinstance(rows[0]["prompt"], str):
        raise UsageError(f"the column {column} of {where} holds messages: leave out --prompt_template.")

    def filled(prompt: str) -> dict[str, Any]:
        turn = [{"role": "user", "content": prompt}]
        return {"prompt": turn if template == CHAT else template.replace("{instruction}", prompt)}

    return rows.map(filled, input_columns="prompt", remove_columns="prompt", **data.map_kwargs)


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train and evaluate as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, RewardedArguments, GRPOSettings), "run_grpo.py", description=__doc__
    )
    model_args, adapter, data, training = parser.parse(argv)
    if training.do_predict:
        raise UsageError("--do_predict: use `lorapro evaluate`, which generates answers and marks them.")
    rewards = [reward_of(name) for name in data.reward_funcs]
    complete(training, model_args, data)
    start(training, parser)
    tokenizer = load_tokenizer(model_args)
    splits = load_splits(data, training, model_args.cache_dir, prepare=partial(prompts, data=data, rewards=rewards))
    for rows in splits.values():
        require_chat_template(tokenizer, rows, "prompt", model_args)
    trainer = LoRAProGRPOTrainer(
        reward_funcs=rewards,
        args=training,
        train_dataset=splits.get("train", splits.get("validation")),  # TRL requires one
        eval_dataset=splits.get("validation"),
        **parts(training, model_args, adapter, tokenizer),
    )
    run(trainer, parser, card={"dataset_name": data.described})


if __name__ == "__main__":
    main()
