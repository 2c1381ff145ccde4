"""Which recipes, comparisons and scripts come with the package, and how is one found by its name?"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorapro_hf.options import UsageError
from lorapro_hf.recipes import folder_of

_SUFFIXES = (".py", ".yaml", ".yml")
_SENTENCE = re.compile(r".*?[.?](?=\s|$)", re.DOTALL)


def find(name: str, folder: Path, known: Iterable[str], listing: str) -> Path:
    """The file of this name, in the current directory or else in the package.

    Args:
        name: a path, with or without `.yaml`; one of a clone, such as `configs/compare/smoke.yaml`, will do anywhere.
        folder: where in the package it would be.
        known: what there is, to choose from when nothing is found.
        listing: the command that lists that.

    Raises:
        UsageError: there is no such file; with those whose names are near.
    """
    asked = Path(name if name.endswith(_SUFFIXES) else f"{name}.yaml")
    candidates = [Path(name), asked, folder / asked]
    if asked.parts[0] in ("configs", "scripts"):
        candidates.append(folder_of(asked.parts[0]).joinpath(*asked.parts[1:]))
    for path in candidates:
        if path.is_file():
            return path
    names = list(known)
    # without their suffixes, which would make all names alike
    stems = {str(Path(each).with_suffix("")): each for each in names}
    near = [asked.with_suffix(""), Path(asked.stem)]
    close = next(filter(None, (difflib.get_close_matches(str(each), stems) for each in near)), [])
    close = [stems[each] for each in close]
    hint = f"did you mean {' or '.join(close)}?" if close else f"see {listing}."
    raise UsageError(f"{name}: there is no such file, and nothing of that name in the package; {hint}")


def described(files: Mapping[str, Path]) -> str:
    """One line for each file: its name, and the first sentence of what it says about itself."""
    width = max(map(len, files), default=0)
    return "\n".join(f"{name:{width}}  {_first_sentence(path)}".rstrip() for name, path in files.items())


def _first_sentence(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    words = re.sub(r"^# ?", "", text, flags=re.MULTILINE) if text.startswith("#") else text.lstrip("r").lstrip('"')
    sentence = _SENTENCE.match(words)
    return "" if sentence is None else " ".join(sentence[0].split())
