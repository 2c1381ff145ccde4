"""How is one text with tables and pictures written both as Markdown and as HTML?"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .3em .6em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { background: #f2f2f2; } tr:nth-child(even) td { background: #fafafa; }
img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of plain text; the first column is aligned left, the others right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG by its name among the pictures, with what it shows."""

    name: str
    caption: str


Block = Heading | Text | Table | Picture


def as_markdown(blocks: Sequence[Block], folder: str) -> str:
    """GitHub's Markdown; pictures are files in `folder`, relative to the text."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append("#" * block.level + " " + _cell(block.text))
        elif isinstance(block, Text):
            parts.append(_cell(block.text))
        elif isinstance(block, Picture):
            parts.append(f"![{_cell(block.caption)}]({folder}/{block.name}.png)")
        else:
            marks = ["---", *["---:"] * (len(block.header) - 1)]
            lines = [block.header, marks, *block.rows]
            parts.append("\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def as_html(blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """A page of its own, pictures included."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h{block.level}>{escape(block.text)}</h{block.level}>")
        elif isinstance(block, Text):
            parts.append(f"<p>{escape(block.text)}</p>")
        elif isinstance(block, Picture):
            data = base64.b64encode(pictures[block.name]).decode()
            parts.append(f'<p><img alt="{escape(block.caption)}" src="data:image/png;base64,{data}"></p>')
        else:
            head = "".join(f"<th>{escape(cell)}</th>" for cell in block.header)
            cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in block.rows]
            rows = "\n".join(f"<tr>{row}</tr>" for row in cells)
            parts.append(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>")
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _cell(text: str) -> str:
    """Text that is nothing but text in Markdown, on one line."""
    plain = " ".join(text.split())
    for mark in "\\`*_|<>[]":
        plain = plain.replace(mark, f"\\{mark}")
    return plain
