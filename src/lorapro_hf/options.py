"""What do the options of the command line have in common?"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import re

from lorapro_hf.utils.extras import install_command

_FULL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# what safetensors and torch make of those numbers
_FULL_WORDS = re.compile(
    rf"\(os error ({'|'.join(map(str, _FULL_NUMBERS))})\)|PytorchStreamWriter failed|inline_container.*unexpected pos"
)


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says why and what to do instead."""


def require_packages(what: str, *names: str, extra: str) -> None:
    """Raise a `UsageError` with the command that installs them if packages are missing.

    Args:
        what: the command that needs them.
        *names: the packages.
        extra: the extra that has them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{what} needs {' and '.join(missing)}. Install with `{install_command(extra)}`.")


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room, whichever library says so."""
    if isinstance(error, OSError) and error.errno in _FULL_NUMBERS:
        return True
    return _FULL_WORDS.search(str(error)) is not None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Default values where there are any, and descriptions as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def at_least_one(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def rate(text: str) -> float:
    """A positive number, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 1e-4")
    return value
