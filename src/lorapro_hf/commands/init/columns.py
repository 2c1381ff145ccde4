"""Which task, and which of its settings, fit the columns of a data file?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorapro_hf.options import UsageError

SFT, DPO, SEQ2SEQ = TASKS = ("sft", "dpo", "seq2seq")

_PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("input", "output"),
)
_TEXT_PAIRS = (("document", "summary"), ("article", "highlights"), ("source", "target"), *_PAIRS)
_NEEDS = {
    SFT: "messages, a pair such as prompt and completion or question and answer, or text",
    DPO: "chosen and rejected",
    SEQ2SEQ: "a pair such as document and summary",
}
_NAMED = {
    SFT: "--columns PROMPT COMPLETION, or --columns TEXT",
    DPO: "--columns CHOSEN REJECTED, and PROMPT as a third if there is one",
    SEQ2SEQ: "--columns READ WRITTEN",
}


def task_of(columns: Sequence[str]) -> str:
    """Return the task that the names of the columns suggest: preferences, or else a language model."""
    return DPO if {"chosen", "rejected"} <= set(columns) else SFT


def column_settings(task: str, named: Sequence[str] | None, columns: Sequence[str], where: str) -> dict[str, Any]:
    """Return the settings of the script that name the columns to train on, for columns with names of its own none.

    Args:
        task: One of `TASKS`.
        named: The columns that the user names; `None` to choose by the usual names.
        columns: The columns of the data.
        where: The data file, for messages.

    Raises:
        UsageError: a named column does not exist, or no column has a usual name; the message lists the columns.
    """
    missing = [name for name in named or () if name not in columns]
    if missing:
        raise UsageError(f"{where} has no column {missing[0]}; its columns are {', '.join(columns)}.")
    if named is not None:
        settings = _named_settings(task, named)
    else:
        settings = {SFT: _sft, DPO: _dpo, SEQ2SEQ: _seq2seq}[task](columns)
    if settings is None:
        there = f"its columns are {', '.join(columns)}"
        raise UsageError(f"{where}: {task} needs {_NEEDS[task]}, but {there}. Name them by {_NAMED[task]}.")
    return settings


def is_conversation(settings: dict[str, Any], columns: Sequence[str]) -> bool:
    """Return whether rows of `run_sft.py` with these settings are lists of messages."""
    return not settings and bool({"messages", "conversations"} & set(columns))


def _named_settings(task: str, named: Sequence[str]) -> dict[str, Any] | None:
    if task == SFT and len(named) == 1:
        is_known = named[0] in ("messages", "conversations", "text")
        return {} if is_known else {"dataset_text_field": named[0]}
    if task == DPO:
        settings = ("chosen_column", "rejected_column", "prompt_column")
        return dict(zip(settings, named, strict=False)) if len(named) in (2, 3) else None
    if len(named) != 2:
        return None
    read, written = ("prompt_column", "completion_column") if task == SFT else ("text_column", "summary_column")
    return {read: named[0], written: named[1]}


def _sft(columns: Sequence[str]) -> dict[str, Any] | None:
    if {"messages", "conversations"} & set(columns):
        return {}
    pair = _first_pair(_PAIRS, columns)
    if pair is not None:
        material = {"input_column": "input"} if pair[0] == "instruction" and "input" in columns else {}
        return {"prompt_column": pair[0], "completion_column": pair[1], **material}
    return {} if "text" in columns else None


def _dpo(columns: Sequence[str]) -> dict[str, Any] | None:
    return {} if {"chosen", "rejected"} <= set(columns) else None


def _seq2seq(columns: Sequence[str]) -> dict[str, Any] | None:
    pair = _first_pair(_TEXT_PAIRS, columns)
    return None if pair is None else {"text_column": pair[0], "summary_column": pair[1]}


def _first_pair(pairs: Sequence[tuple[str, str]], columns: Sequence[str]) -> tuple[str, str] | None:
    return next((pair for pair in pairs if set(pair) <= set(columns)), None)
