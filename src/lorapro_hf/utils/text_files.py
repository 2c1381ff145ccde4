"""How are small files read and replaced that other programs may change, and how are they quoted in messages?"""

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
    """The `repr` of a value for a message, shortened if it is long or deeply nested."""
    return _SHORTENED.repr(value)


def shortened(text: str, limit: int = 200) -> str:
    """A text for a message, cut off if it is long."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def read_settings_text(file: Path) -> str:
    """The text of a file of settings; a `ValueError` if it is larger than `MAX_BYTES`, or not UTF-8."""
    with file.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB, which no file of settings is")
    return content.decode("utf-8")


def parse_json(text: str) -> Any:
    """The value of a text in JSON; a `JSONDecodeError` also if it is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("It is nested too deeply", text[:1], 0) from None


def write_text(file: Path, text: str) -> None:
    """Replace a file by a text in UTF-8, as `replace_file` does."""
    replace_file(file, text.encode())


def replace_file(file: Path, content: bytes) -> None:
    """Replace a file atomically: an upload at the same time sees the old or the new content."""
    # Trainer never pushes names that begin with _. Mode x follows no link.
    draft = file.with_name(f"_{file.name}.{secrets.token_hex(8)}.part")
    try:
        with draft.open("xb") as opened:
            opened.write(content)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
