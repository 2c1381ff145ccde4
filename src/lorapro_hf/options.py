"""Which errors, help formatter and types of values do the commands share?"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import re
import sys
from pathlib import Path

from lorapro_hf.utils.extras import install_command

STOPPED = 130  # the exit code after Ctrl-C: 128 and the number of SIGINT, as in a shell
_FULL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# the messages of safetensors and torch for a full disk
_FULL_WORDS = re.compile(
    rf"\(os error ({'|'.join(map(str, _FULL_NUMBERS))})\)|PytorchStreamWriter failed|inline_container.*unexpected pos"
)


class UsageError(ValueError):
    """Bad input from the command line; the message says why it is bad and what to do instead."""


def require_packages(command: str, *names: str, extra: str) -> None:
    """Refuse to run a command whose packages are missing.

    Raises:
        UsageError: with the command that installs the extra.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{command} needs {' and '.join(missing)}. Install with `{install_command(extra)}`.")


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error of any library says that the disk is full."""
    if isinstance(error, OSError) and error.errno in _FULL_NUMBERS:
        return True
    return _FULL_WORDS.search(str(error)) is not None


def say_stopped(way_on: str = "") -> None:
    """Print that Ctrl-C stopped the program, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        way_on = way_on or "Nothing has been trained yet: the same command starts anew."
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C. {way_on}", file=sys.stderr)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Formatter that shows default values, except None, False and [], and keeps the lines of descriptions."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False and action.default != []
        return super()._get_help_string(action) if has_default else action.help


def at_least_one(text: str) -> int:
    """Return a whole number of at least 1, as a type for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def rate(text: str) -> float:
    """Return a positive number, as a type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 1e-4")
    return value
