"""What do the exceptions and warnings of the package say? Read from its source, so that the docs cannot lag."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[2] / "src" / "lorapro_hf"
VARIES = "…"
WARNING = "Warning"
_REASONS = (
    "refusals.py",
    "zero_configuration.py",
    "resume.py",
    "manifest.py",
    "step_counts.py",
    "engines.py",
    "sharded.py",
    "zero.py",
)


class Message(NamedTuple):
    """The text of an exception, with `…` for what varies."""

    exception: str
    text: str
    where: str


@cache
def messages() -> list[Message]:
    """Of every exception that is built anywhere in the package, the reasons of functions and tables, all warnings."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = _Names(tree)
        for node in ast.walk(tree):
            given, name = list[ast.expr](), ""
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and _is_exception(node.func.id):
                given, name = node.args[:1], node.func.id
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_Refusal":
                given, name = node.args[2:], "RuntimeError"
            elif isinstance(node, ast.FunctionDef) and path.name in _REASONS and _says_why(node):
                given, name = list(_returned(node)), "ValueError"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "logger.warning":
                given, name = node.args[:1], WARNING
            where = f"{path.relative_to(SOURCE).as_posix()}:{getattr(node, 'lineno', 0)}"
            texts = [text for each in given for text in _texts(each, names)]
            texts = [re.sub("%[sd]", VARIES, text) for text in texts] if name == WARNING else texts
            texts = [re.sub(r"\{\w+(![rs])?\}", VARIES, text) for text in texts]
            found += [Message(name, text, where) for text in texts]
    return found


class _Names:
    """The functions and text constants of a module."""

    def __init__(self, tree: ast.Module) -> None:
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
        self.constants = {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}


def _says_why(function: ast.FunctionDef) -> bool:
    return function.returns is not None and ast.unparse(function.returns) in ("str | None", "Iterator[str]")


def _is_exception(name: str) -> bool:
    return name.endswith(("Error", "Exception", "Interrupt", "Exit"))


def _texts(node: ast.expr, names: _Names) -> list[str]:
    """What an expression may evaluate to; a function of the same module is looked into for what it returns."""
    if isinstance(node, ast.Name):
        node = names.constants.get(node.id, node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _texts(node.left, names) for b in _texts(node.right, names)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names.functions:
        return [text for value in _returned(names.functions[node.func.id]) for text in _texts(value, names)]
    return [VARIES] if not isinstance(node, ast.Constant) else []


def _returned(function: ast.FunctionDef) -> Iterator[ast.expr]:
    for node in ast.walk(function):
        if isinstance(node, ast.Return | ast.Yield) and node.value is not None:
            yield node.value
