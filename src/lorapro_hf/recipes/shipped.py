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
    """Return the file of this name, in the current directory or else in the package.

    Args:
        name: Path with or without `.yaml`; a path in a clone, such as `configs/compare/smoke.yaml`, works anywhere.
        folder: Folder of the package to look in.
        known: Names to propose if there is no such file.
        listing: The command that lists these names.

    Raises:
        UsageError: if there is no such file, with similar names.
    """
    asked = Path(name if name.endswith(_SUFFIXES) else f"{name}.yaml")
    candidates = [Path(name), asked, folder / asked]
    if asked.parts[0] in ("configs", "scripts"):
        candidates.append(folder_of(asked.parts[0]).joinpath(*asked.parts[1:]))
    for path in candidates:
        if path.is_file():
            return path
    # suffixes would make all names alike
    stems = {str(Path(each).with_suffix("")): each for each in known}
    near = (difflib.get_close_matches(stem, stems) for stem in (str(asked.with_suffix("")), asked.stem))
    close = [stems[each] for each in next(filter(None, near), [])]
    hint = f"did you mean {' or '.join(close)}?" if close else f"see {listing}."
    raise UsageError(f"{name}: there is no such file, and nothing of that name in the package; {hint}")


def described(files: Mapping[str, Path]) -> str:
    """Return one line for each file: its name and the first sentence of its docstring or comment."""
    width = max(map(len, files), default=0)
    return "\n".join(f"{name:{width}}  {_first_sentence(path)}".rstrip() for name, path in files.items())


def _first_sentence(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    words = re.sub(r"^# ?", "", text, flags=re.MULTILINE) if text.startswith("#") else text.lstrip("r").lstrip('"')
    sentence = _SENTENCE.match(words)
    return "" if sentence is None else " ".join(sentence[0].split())
