"""With which line does a program end after Ctrl-C?"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

CODE = 130  # 128 and the number of SIGINT, as in a shell


def say_stopped(way_on: str = "") -> None:
    """Print that Ctrl-C stopped the program, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        way_on = way_on or "Nothing has been trained yet: the same command starts anew."
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C. {way_on}", file=sys.stderr)


def end_imports_in_one_line() -> None:
    """Replace the traceback of an uncaught Ctrl-C, as during imports, by that line."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            previous(kind, error, trace)
            return
        say_stopped()
        raise SystemExit(CODE)

    sys.excepthook = hook
