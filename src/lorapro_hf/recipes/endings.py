"""With which last line does a script end that cannot go on?"""

from __future__ import annotations

import dis
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

from lorapro_hf.checkpoints.resume import checkpoints_in, find_flaw
from lorapro_hf.options import STOPPED, UsageError, is_disk_full, say_stopped
from lorapro_hf.recipes import COMMAND
from lorapro_hf.utils.extras import MissingExtraError

_RESUME = re.compile(r" --resume[_-]from[_-]checkpoint[= ]('[^']*'|\S+)")
_CANNOT_RESUME = "cannot resume from "  # how every refusal of `lorapro_hf.checkpoints.resume` begins
# the messages of transformers, PEFT and datasets about names that are neither on this machine nor on the Hub
_NO_HUB = re.compile(r"https://huggingface\.co|on the Hub \(|the Hugging Face Hub|Can't find 'adapter_config\.json'")


class NotFetchedError(OSError):
    """A model, adapter or data set is neither on this machine nor on the Hub."""


class DiskFullError(OSError):
    """A training could not write; the message names the newest complete checkpoint."""


@contextmanager
def sought(kind: str, name: str | None) -> Iterator[None]:
    """Raise `NotFetchedError` with the name of a model or data set for errors that speak of the Hub alone."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, NotFetchedError) or not _NO_HUB.search(str(error)):
            raise
        raise NotFetchedError(f"cannot load {kind} {name}: {_first_line(error)}.") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line on stderr if an exception is no defect of the program.

    The exit code is 2 for bad input, 1 without the Hub or with a full disk, and 130 after Ctrl-C.
    """
    program = Path(sys.argv[0]).name
    try:
        yield
    except KeyboardInterrupt as error:
        say_stopped(str(error))
        raise SystemExit(STOPPED) from error
    except Exception as error:
        ending = _ending(error)
        if ending is None:
            raise
        line, code = ending
        print(f"{program}: error: {line}", file=sys.stderr)
        raise SystemExit(code) from error


@contextmanager
def with_a_way_on(arguments: TrainingArguments) -> Iterator[None]:
    """Add the checkpoint to resume from to Ctrl-C and to errors of a full disk.

    Raises:
        DiskFullError: if a file could not be written to its end.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(way_on(arguments)) from error
    except Exception as error:
        if not is_disk_full(error):
            raise
        full = f"the disk with {arguments.output_dir} is full ({_first_line(error)})."
        raise DiskFullError(f"{full} {way_on(arguments)}") from error


def way_on(arguments: TrainingArguments) -> str:
    """Return how the command continues the training: from its newest complete checkpoint, or anew."""
    output = Path(arguments.output_dir)
    checkpoints = checkpoints_in(output)
    complete = next((each for each in checkpoints if find_flaw(each, checksums=False) is None), None)
    if complete is not None:
        # without LoRA-Pro the newest folder is taken, complete or not
        named = "true" if getattr(arguments, "lora_pro", True) or complete == checkpoints[0] else complete
        if COMMAND in os.environ:
            command = _RESUME.sub("", os.environ[COMMAND])
            return f"To go on from {complete}: {command} --resume_from_checkpoint {shlex.quote(str(named))}"
        return f"To go on from {complete}, give the same command with --resume_from_checkpoint {named}."
    delete = f"delete {', '.join(each.name for each in checkpoints)} there and " if checkpoints else ""
    without = " without --resume_from_checkpoint" if arguments.resume_from_checkpoint else ""
    return f"{output} has no complete checkpoint: {delete}give the same command{without} to start anew."


def _ending(error: Exception) -> tuple[str, int] | None:
    """Return the last line and the exit code; `None` for a defect, which keeps its traceback."""
    text = str(error)
    cannot_resume = isinstance(error, ValueError) and text.startswith(_CANNOT_RESUME)
    if cannot_resume or isinstance(error, (UsageError, MissingExtraError)) or _is_refusal(error):
        return text, 2
    if isinstance(error, DiskFullError):
        return text, 1
    if is_disk_full(error):
        return f"the disk is full: {_first_line(error)}.", 1
    if isinstance(error, NotFetchedError) or (isinstance(error, OSError) and _NO_HUB.search(text)):
        return f"{_first_line(error)}. Local folders and files need no network.", 1
    return None


def _is_refusal(error: Exception) -> bool:
    """Whether a `raise` of this package refuses a setting; a `ValueError` of Python or another library is a defect."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if type(error) is not ValueError or trace is None:
        return False
    operation = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    return operation == "RAISE_VARARGS" and str(trace.tb_frame.f_globals.get("__name__")).startswith("lorapro_hf.")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
