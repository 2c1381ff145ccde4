"""How does a page show the options of a command? `make docs` takes them from the command's parser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

from lorapro_hf.cli import build_parser

_MARK = re.compile(r"^<!-- options of (lorapro \w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables of a command's options, also of its subcommands, in the place of its mark."""
    commands = all_commands()

    def tables(match: re.Match[str]) -> str:
        own = {name: parser for name, parser in commands.items() if f"{name} ".startswith(f"{match[1]} ")}
        return "\n\n".join(
            table(parser) if name == match[1] else f"### {name}\n\n{table(parser)}" for name, parser in own.items()
        )

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
    rows = [_row(action) for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


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
