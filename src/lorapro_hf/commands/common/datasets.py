"""When is the name of a dataset or model a local path?"""

from __future__ import annotations

from pathlib import Path


def is_missing_path(name: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether the start or suffix of `name` shows that it is a local path, and no file is there."""
    local = name.startswith((".", "/", "~")) or Path(name).suffix in suffixes
    return local and not Path(name).exists()
