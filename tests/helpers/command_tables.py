"""Writes the tables of options in docs/command_line.md from the parsers: `python tests/helpers/command_tables.py`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from lorapro_hf.cli import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"
_TABLE = re.compile(
    r"(?P<opening><!-- options of (?P<command>lorapro [\w ]+) -->\n)(?P<table>.*?)(?P<end><!-- end of options -->)",
    re.DOTALL,
)


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands of a parser, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def all_commands() -> dict[str, argparse.ArgumentParser]:
    """What takes options of its own: `"lorapro demo"`, `"lorapro evaluate gsm8k"` and so on."""
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


def documented(text: str) -> dict[str, str]:
    """The tables of a page, by command."""
    return {match["command"]: match["table"].strip() for match in _TABLE.finditer(text)}


def rewritten(text: str) -> str:
    """The page with its tables as they should be."""
    commands = all_commands()
    return _TABLE.sub(lambda match: f"{match['opening']}\n{table(commands[match['command']])}\n\n{match['end']}", text)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
