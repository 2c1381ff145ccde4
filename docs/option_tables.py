"""How do pages show the options of commands and of the trainer? `make docs` takes them from the parsers."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from lorapro_hf import LoRAProTrainingArguments
from lorapro_hf.cli import build_parser

_MARK = re.compile(r"^<!-- options of (lorapro \w+) -->$", re.MULTILINE)
_TRAINER_MARK = "<!-- options of LoRAProTrainingArguments -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark by the options of a command and its subcommands, or of the trainer."""
    commands = all_commands()

    def tables(match: re.Match[str]) -> str:
        parsers = {name: parser for name, parser in commands.items() if f"{name} ".startswith(f"{match[1]} ")}
        return "\n\n".join(
            table(parser) if name == match[1] else f"### {name}\n\n{table(parser)}" for name, parser in parsers.items()
        )

    if _TRAINER_MARK in markdown:
        markdown = markdown.replace(_TRAINER_MARK, trainer_table())
    return _MARK.sub(tables, markdown)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a parser, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def all_commands() -> dict[str, argparse.ArgumentParser]:
    """Each command that takes options of its own, with its parser: `"lorapro demo"` and so on."""
    return dict(_leaves("lorapro", build_parser()))


def _leaves(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    inner = subparsers(parser)
    if not inner:
        yield name, parser
    for each, below in inner.items():
        yield from _leaves(f"{name} {each}", below)


def table(parser: argparse.ArgumentParser) -> str:
    """The options of a command as Markdown."""
    return _table(action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help")


def trainer_table() -> str:
    """The options that `LoRAProTrainingArguments` adds to those of `Trainer`, as Markdown."""
    parser = HfArgumentParser(LoRAProTrainingArguments)  # type: ignore[arg-type]
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    actions = [action for action in parser._actions if action.dest not in {*inherited, "help"}]
    for action in actions:
        action.metavar = None if action.choices else "VALUE"
    return _table(actions)


def _table(actions: Iterable[argparse.Action]) -> str:
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *map(_row, actions)])


def _row(action: argparse.Action) -> str:
    words = [*action.option_strings[:1]]
    if action.nargs != 0:
        choices = None if action.choices is None or action.metavar else "{" + ",".join(map(str, action.choices)) + "}"
        value = choices or action.metavar or action.dest.upper()
        words.append(f"{value} ..." if action.nargs in ("+", "*") else str(value))
    text, default = action.help or "", _default(action)
    stated = re.search(r" \(default: (.*)\)$", text)
    if stated:
        text, default = text[: stated.start()], stated[1]
    cells = (f"`{' '.join(words)}`", default, text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(action: argparse.Action) -> str:
    value = action.default
    if value in (None, [], argparse.SUPPRESS) or value is False:
        return ""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
