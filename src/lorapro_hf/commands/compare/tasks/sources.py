"""Texts of the standard library, which need no network, and tables of texts."""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from lorapro_hf.commands.common.datasets import read_dataset
from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows, require_plain, with_texts

_SETS = ("validation", "test", "train")
# No programs and tests, and nothing that only some versions of Python have.
_LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "turtledemo", "lib2to3", "distutils", "ensurepip"}
_LEFT_OUT |= {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_SHORTEST_DOCSTRING = 40  # characters
# The packages with the most docstrings that every installation and every supported version of Python has.
PACKAGES = (
    *("asyncio", "importlib", "email", "logging", "xml", "multiprocessing", "unittest", "http", "mailbox", "urllib"),
    *("tarfile", "inspect", "ipaddress", "typing", "pydoc", "pathlib", "threading", "doctest", "imaplib", "wsgiref"),
    *("enum", "xmlrpc", "statistics", "pdb", "zipfile", "bdb"),
)


@cache
def standard_modules() -> list[tuple[str, Path]]:
    """The source files of Python's standard library with the packages (or modules) that they belong to."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        package = parts[0].removesuffix(".py")
        if not (_LEFT_OUT & set(parts) or package.startswith("_") or "-" in package):
            found.append((package, path))
    return found


def library_code(seed: int) -> dict[str, Iterator[str]]:
    """The sources of the standard library by set; the seed decides on the sets and on the order in them.

    All files of a package are in one set.
    """
    by_set: dict[str, list[Path]] = defaultdict(list)
    for package, path in standard_modules():
        by_set[set_of(f"{seed} {package}")].append(path)
    for paths in by_set.values():
        random.Random(seed).shuffle(paths)
    return {name: (path.read_text(encoding="utf-8", errors="ignore") for path in by_set[name]) for name in _SETS}


@cache
def docstrings(classes: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Docstrings of classes and functions with the package that they are from, whose name is masked in them.

    The packages are the first of `PACKAGES`; in each set they take turns as long as they last. A text that stands in
    two packages is left out; one that stands in a package twice counts once. The seed decides on sets and order.
    """
    if classes > len(PACKAGES):
        raise UsageError(f"classes={classes} is more than the {len(PACKAGES)} packages with many docstrings.")
    chosen = PACKAGES[:classes]
    owners: dict[str, dict[str, None]] = defaultdict(dict)
    for package, path in standard_modules():
        if package in chosen:
            for text in _docstrings_of(path):
                owners[text][package] = None
    by_set: dict[str, dict[str, list[tuple[str, str]]]] = {name: defaultdict(list) for name in _SETS}
    for text, (package, *others) in owners.items():
        if not others:
            masked = re.sub(rf"\b{re.escape(package)}\b", "module", text, flags=re.IGNORECASE)
            by_set[set_of(f"{seed} {text}")][package].append((masked, package))
    return {name: _in_turns(list(groups.values()), seed) for name, groups in by_set.items()}


def _docstrings_of(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser to the author of the file
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= _SHORTEST_DOCSTRING:
                yield text


def _in_turns(groups: list[list[tuple[str, str]]], seed: int) -> list[tuple[str, str]]:
    shuffled = [random.Random(seed).sample(group, len(group)) for group in groups]
    longest = max(map(len, groups), default=0)
    return [group[place] for place in range(longest) for group in shuffled if place < len(group)]


def set_of(text: str) -> str:
    """The set that the hash of a text decides on: 15 % validation, 15 % test."""
    part = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 20
    return "validation" if part < 3 else "test" if part < 6 else "train"


def table(settings: TaskSettings, columns: tuple[str, ...]) -> dict[str, Dataset]:
    """The sets of a dataset by name, shuffled; held-out sets that it lacks are taken from its training set.

    The columns are that of the texts, and that of the labels if they are used; rows without a label are left out.
    Raises `UsageError` for a dataset or column that is missing, and for a cell that holds no text.
    """
    data = read_dataset(str(settings.dataset), settings.dataset_config)
    parts: dict[str, Any] = dict(data) if isinstance(data, DatasetDict) else {"train": data}
    first = "train" if "train" in parts else next(iter(parts))
    parts = {name: part for name, part in parts.items() if name in (first, "validation", "test")}
    for name, part in parts.items():
        if not set(columns) <= set(part.column_names):
            needed = f"the task {settings.name} needs {list(columns)}. Name yours with text_column and label_column."
            raise UsageError(f"The dataset {settings.dataset!r} has the columns {part.column_names}; {needed}")
        where = f"the {name} set of {settings.dataset!r}"
        for column in columns[1:]:
            require_plain(part, column, where, scalars=True)
        parts[name] = with_texts(complete_rows(part, columns[1:], where), columns[:1], where)
    train = parts.pop(first).shuffle(seed=settings.data_seed)
    found: dict[str, Any] = {}
    for name, wanted in (("validation", settings.validation_size), ("test", settings.test_size)):
        if name in parts:
            found[name] = parts[name].shuffle(seed=settings.data_seed)
        else:
            size = min(wanted, len(train) // 3)
            found[name], train = train.select(range(size)), train.select(range(size, len(train)))
    return {**found, "train": train}
