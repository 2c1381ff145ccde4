"""What do the scripts share, and where do scripts and recipes lie?"""

from __future__ import annotations

from pathlib import Path

COMMAND = "LORAPRO_TRAIN_COMMAND"  # in the environment of a script: the command that has started it
_PACKAGE = Path(__file__).parents[1]


def folder_of(name: str) -> Path:
    """Return the folder `scripts` or `configs`: inside an installed package, or beside `src` in a clone."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parents[1] / name
