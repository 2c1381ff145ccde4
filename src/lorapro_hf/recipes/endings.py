"""With which last line does a script end that cannot go on?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer

from lorapro_hf.checkpoints.resume import checkpoints_in, find_flaw
from lorapro_hf.options import UsageError, is_disk_full
from lorapro_hf.recipes.hub import NO_HUB
from lorapro_hf.recipes.stopped import CODE, say_stopped
from lorapro_hf.utils.extras import MissingExtraError

_CANNOT_RESUME = "cannot resume from "  # how every refusal of `lorapro_hf.checkpoints.resume` begins


class DiskFullError(OSError):
    """A training could not write; the message names the newest complete checkpoint."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on stderr if an exception is no defect of the program.

    The exit code is 2 for bad input, 1 without the Hub or with a full disk, and 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        say_stopped(str(error))
        raise SystemExit(CODE) from error
    except Exception as error:
        ending = _ending(error)
        if ending is None:
            raise
        line, code = ending
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        raise SystemExit(code) from error


@contextmanager
def with_a_way_on(trainer: Trainer) -> Iterator[None]:
    """Add the checkpoint to resume from to Ctrl-C and to errors of a full disk.

    Raises:
        DiskFullError: if a file could not be written to its end.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_way_on(trainer)) from error
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"the disk with {trainer.args.output_dir} is full ({_first_line(error)}). {_way_on(trainer)}"
        ) from error


def _way_on(trainer: Trainer) -> str:
    output = Path(trainer.args.output_dir)
    broken: list[str] = []
    for checkpoint in checkpoints_in(output):
        if find_flaw(checkpoint, checksums=False) is None:
            named = "true" if not broken else str(checkpoint)
            way = f"To go on from {checkpoint}, give the same command with --resume_from_checkpoint {named}."
            break
        broken.append(str(checkpoint))
    else:
        delete = f"delete {' and '.join(broken)} and " if broken else ""
        without = " without --resume_from_checkpoint" if trainer.args.resume_from_checkpoint else ""
        way = f"{output} has no complete checkpoint: {delete}give the same command{without} to start anew."
    return " ".join([*(f"{checkpoint} is not complete." for checkpoint in broken), way])


def _ending(error: Exception) -> tuple[str, int] | None:
    """Return the last line and the exit code; `None` for a defect, which keeps its traceback."""
    text = str(error)
    if isinstance(error, (UsageError, MissingExtraError)):
        return text, 2
    if isinstance(error, ValueError) and text.startswith(_CANNOT_RESUME):
        return text, 2
    if isinstance(error, DiskFullError):
        return text, 1
    if is_disk_full(error):
        return f"the disk is full: {_first_line(error)}.", 1
    if isinstance(error, OSError) and NO_HUB.search(text):
        return f"{_first_line(error)}. Local folders and files need no network.", 1
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
