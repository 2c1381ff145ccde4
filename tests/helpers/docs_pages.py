"""Where is the documentation, and what code and tables are on its pages?"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def loaded(program: Path) -> ModuleType:
    """The module of a program that belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{program.stem}", program)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Block(NamedTuple):
    """A block of code on a page; `not_run` is the reason, where the page gives one in a comment before it."""

    kind: str
    code: str
    line: int
    not_run: str | None


_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n\n?)?```(?P<kind>\w+)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)


def blocks(page: Path, *kinds: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        if match["kind"] in kinds:
            line = text.count("\n", 0, match.start("code")) + 1
            found.append(Block(match["kind"], match["code"], line, match["why"]))
    return found


def tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """The tables of a Markdown text: heading, first cell, column."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE):
        title, _, rest = part.partition("\n")
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in rest.splitlines() if line.startswith("|")]
        if lines:
            found[title] = {row[0]: dict(zip(lines[0], row, strict=True)) for row in lines[2:]}
    return found
