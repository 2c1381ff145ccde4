"""What does a program say when Ctrl-C stops it?"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

_ANEW = "Nothing has been trained yet: the same command starts anew."
CODE = 130  # as a shell has it: 128 and the number of SIGINT


def say_stopped(way_on: str = "") -> None:
    """Say it in one line on stderr; each of several processes gets Ctrl-C, and the first one speaks.

    Args:
        way_on: how to go on; by default that nothing is lost.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C. {way_on or _ANEW}", file=sys.stderr)


def end_imports_in_one_line() -> None:
    """Let Ctrl-C end the program in that line where nothing else waits for it, as while libraries are imported."""
    otherwise = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            otherwise(kind, error, trace)
            return
        say_stopped()
        raise SystemExit(CODE)

    sys.excepthook = hook
