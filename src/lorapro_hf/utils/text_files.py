"""How are small files read and replaced that others may have touched, and how does a message quote them?"""

from __future__ import annotations

import json
import reprlib
import secrets
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20
"""The largest file of settings that is read."""
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = _SHORTENED.maxlong = 120


def shown(value: object) -> str:
    """The `repr` of a value for a message: what is long or deeply nested is shortened."""
    return _SHORTENED.repr(value)


def shortened(text: str, limit: int = 200) -> str:
    """A text for a message: the end of a long one is left out."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def read_settings_text(file: Path) -> str:
    """The text of a file of settings.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than any such file, of which nothing has been read then, or not UTF-8.
    """
    with file.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB, which no file of settings is")
    return content.decode("utf-8")


def parse_json(text: str) -> Any:
    """What a text in JSON says.

    Raises:
        json.JSONDecodeError: it is no JSON, or nested more deeply than Python reads it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("It is nested too deeply", text[:1], 0) from None


def write_text(file: Path, text: str) -> None:
    """Replace a file as `replace_file` does, in UTF-8."""
    replace_file(file, text.encode())


def replace_file(file: Path, content: bytes) -> None:
    """Replace a file as a whole: an upload that runs beside it sees the old one or the new one."""
    # By Trainer's rule names with _ are never pushed. Mode x follows no link that somebody has put there.
    draft = file.with_name(f"_{file.name}.{secrets.token_hex(8)}.part")
    try:
        with draft.open("xb") as opened:
            opened.write(content)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
