"""How do columns of instructions and answers become prompts and completions?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import require_columns, require_plain, with_texts
from lorapro_hf.recipes.data import DataArguments
from lorapro_hf.recipes.pictures import PICTURES

CHAT = "chat"
ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""


@dataclass
class InstructionArguments(DataArguments):
    """The data set: conversations, prompts with completions, or columns that become prompts and completions."""

    prompt_column: str | None = HfArg(default=None, help="Column with the instruction or question.")
    input_column: str | None = HfArg(default=None, help="Column with the instruction's material; may be blank.")
    completion_column: str | None = HfArg(default=None, help="Column with the answer.")
    prompt_template: str | None = HfArg(
        default=None, help="alpaca, chat (the tokenizer's chat template) or a text with {instruction}."
    )
    completion_pattern: str | None = HfArg(
        default=None, help="Regular expression: keep the part of an answer that it matches, drop rows without a match."
    )
    keep_where: list[str] | None = HfArg(default=None, help="COLUMN=REGEX: keep rows in which each matches.")
    drop_where: list[str] | None = HfArg(default=None, help="COLUMN=REGEX: drop rows in which one matches.")
    drop_longer_than: int | None = HfArg(default=None, help="Drop rows with more tokens in prompt and completion.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("drop_longer_than")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise UsageError("--prompt_column and --completion_column go together.")
        for name in ("input_column", "prompt_template", "completion_pattern", "drop_longer_than"):
            if self.prompt_column is None and getattr(self, name) is not None:
                raise UsageError(f"--{name} needs --prompt_column and --completion_column.")
        conditions([*(self.keep_where or ()), *(self.drop_where or ())])
        _compiled(self.completion_pattern or "")


def conditions(words: list[str] | None) -> list[tuple[str, re.Pattern[str]]]:
    """Return the column and the regular expression of each word `COLUMN=PATTERN`; `UsageError` for other words."""
    parsed = []
    for word in words or []:
        column, _, pattern = word.partition("=")
        if not (column and pattern):
            raise UsageError(f"{word!r} must have the form COLUMN=PATTERN.")
        parsed.append((column, _compiled(pattern)))
    return parsed


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}.") from error


def prepared(
    rows: Dataset,
    split: str,
    data: InstructionArguments,
    tokenizer: PreTrainedTokenizerBase,
    templates: Mapping[str, str],
) -> Dataset:
    """Return the rows that the conditions keep, with columns `prompt` and `completion` if columns are named.

    Numbers become texts, and rows without a prompt or completion are dropped. No condition matches a blank cell.

    Raises:
        UsageError: if a column or template does not exist, a cell holds something other than text, or no row is left.
    """
    keep, drop = conditions(data.keep_where), conditions(data.drop_where)
    named = (data.prompt_column, data.completion_column, data.input_column)
    require_columns(rows, [*(column for column in named if column is not None), *(column for column, _ in keep + drop)])
    where = f"the {split} set"
    for column, _ in keep + drop:
        require_plain(rows, column, where, scalars=True)

    def matches(row: dict[str, Any], column: str, pattern: re.Pattern[str]) -> bool:
        return row[column] is not None and pattern.search(str(row[column])) is not None

    def stays(row: dict[str, Any]) -> bool:
        return all(matches(row, *each) for each in keep) and not any(matches(row, *each) for each in drop)

    if keep or drop:
        rows = rows.filter(stays, **data.map_kwargs)
    if data.prompt_column is not None and data.completion_column is not None:
        columns = (data.prompt_column, data.completion_column)
        rows = with_texts(rows, columns, where, need_text=columns[1:], map_kwargs=data.map_kwargs)
        if data.input_column is not None:
            require_plain(rows, data.input_column, where)
        rows = _with_prompts(rows, data, tokenizer, templates)
    if not len(rows):
        raise UsageError("no row is left; see --keep_where, --drop_where, --completion_pattern, --drop_longer_than.")
    return rows


def _with_prompts(
    rows: Dataset, data: InstructionArguments, tokenizer: PreTrainedTokenizerBase, templates: Mapping[str, str]
) -> Dataset:
    name, limit = data.prompt_template or "{instruction}", data.drop_longer_than
    template = templates.get(name, name)
    if name != CHAT and "{instruction}" not in template:
        names = ", ".join(sorted((*templates, CHAT)))
        raise UsageError(f"--prompt_template {name!r} must be {names} or a text with {{instruction}}.")
    pattern = None if data.completion_pattern is None else re.compile(data.completion_pattern)

    def rewrite(row: dict[str, Any]) -> dict[str, Any]:
        instruction, completion = row[str(data.prompt_column)], row[str(data.completion_column)]
        material = None if data.input_column is None else row[data.input_column]
        if material is not None and str(material).strip():
            instruction = f"{instruction}\n\n{material}"
        if pattern is not None:
            match = pattern.search(completion)
            completion = "" if match is None else match.group()
        if name == CHAT:
            turns = {"prompt": [{"role": "user", "content": instruction}]}
            return {**turns, "completion": [{"role": "assistant", "content": completion}]}
        # `format` would read other braces in the template
        return {"prompt": template.replace("{instruction}", instruction), "completion": completion}

    def stays(row: dict[str, Any]) -> bool:
        texts = [part if isinstance(part, str) else part[0]["content"] for part in (row["prompt"], row["completion"])]
        return texts[1] != "" and (limit is None or len(tokenizer("".join(texts))["input_ids"]) <= limit)

    others = [column for column in rows.column_names if column not in PICTURES]
    rows = rows.map(rewrite, remove_columns=others, **data.map_kwargs)
    return rows if pattern is None and limit is None else rows.filter(stays, **data.map_kwargs)
