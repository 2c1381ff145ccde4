"""Which recipes, comparisons and scripts come with the package, and how is one found by its name?"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorapro_hf.options import UsageError
from lorapro_hf.recipes import folder_of

_SENTENCE = re.compile(r".*?[.?](?=\s|$)", re.DOTALL)


def find(name: str, folder: Path, known: Iterable[str], listing: str) -> Path:
    """Return the file of a name, with or without `.yaml`, in the current directory or else in a folder of the package.

    A path in a clone, such as `configs/compare/smoke.yaml`, works anywhere.

    Raises:
        UsageError: if there is no such file; proposes similar names among `known`, or the command `listing`.
    """
    asked = Path(name if name.endswith((".py", ".yaml", ".yml")) else f"{name}.yaml")
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
    lines = []
    for name, path in files.items():
        text = re.sub(r'^# ?|\Ar?"""', "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        sentence = _SENTENCE.match(text)
        lines.append(f"{name:{width}}  {' '.join(sentence[0].split()) if sentence else ''}".rstrip())
    return "\n".join(lines)
