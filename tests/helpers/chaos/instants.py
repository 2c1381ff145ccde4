"""Disturbances of a training at the n-th instant of one of its ranks.

Instants are the training's steps and whatever is written into its checkpoints, so that a number names the same moment
again, however fast the machine is.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import TrainerCallback

WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class Instants(TrainerCallback):
    """Counts the instants of a rank and carries out what is planned for them.

    Each entry of `plan` has a `rank`, an `instant` and one of `die`, `sleep` (with `seconds`) and `full` (a disk with
    room for files of `room` bytes) in `do`. A process that dies may cut the file that it wrote last to a `share`.
    """

    def __init__(self, plan: list[dict[str, Any]], rank: int) -> None:
        self.plan = {entry["instant"]: entry for entry in plan if entry["rank"] == rank}
        self.kinds = ""  # a letter for each instant that has passed: s of a step, w of a write
        self._written: str | None = None
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def arm(self) -> None:
        """Watch all writing from now on, also by the libraries that are not written in Python."""
        torch.save = self._watched(torch.save, 1)
        safetensors.torch.serialize_file = self._watched(safetensors.torch.serialize_file, 1)
        sys.addaudithook(self._hear)

    def lift(self) -> None:
        """Make room on the disk again."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if writes and _in_checkpoint(path):
                self._pass()
                self._written = str(path)
        elif event in WRITING and _in_checkpoint(args[0]):
            self._written = None
            self._pass()

    def _watched(self, write: Callable[..., Any], place: int) -> Callable[..., Any]:
        """`write`, with an instant before and after it; its argument at `place` is the path."""

        def writing(*args: Any, **kwargs: Any) -> Any:
            path = args[place] if len(args) > place else None
            if not _in_checkpoint(path):
                return write(*args, **kwargs)
            self._pass()
            result = write(*args, **kwargs)
            self._written = str(path)
            self._pass()
            return result

        return writing

    def _pass(self, kind: str = "w") -> None:
        self.kinds += kind
        entry = self.plan.get(len(self.kinds))
        if entry is None:
            return
        if entry["do"] == "sleep":
            time.sleep(entry["seconds"])
        elif entry["do"] == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (entry["room"], self._limit[1]))
        else:
            if entry.get("share") is not None and self._written and os.path.isfile(self._written):
                os.truncate(self._written, int(entry["share"] * os.path.getsize(self._written)))
            os.kill(os.getpid(), signal.SIGKILL)

    def _step(self, *_: Any, **__: Any) -> None:
        self._written = None
        self._pass("s")

    on_step_begin = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_save = _step


def _in_checkpoint(path: Any) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and "checkpoint-" in str(Path(os.fsdecode(path)))
