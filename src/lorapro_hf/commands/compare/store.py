"""Where are results kept so that a killed comparison goes on and several processes can write?"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorapro_hf.commands.common.records import as_json, environment, write_json
from lorapro_hf.commands.compare.tuning import Score
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import parse_json

RECORDS, SWEEP, CLAIMS = "runs.jsonl", "sweep.json", ".claims"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
LAST = 4  # the last of so many parts of a training says how it ended


@dataclass
class RunRecord:
    """A run that is done: a line of `runs.jsonl`, which begins with the run's entry in the plan."""

    key: str
    task: str
    rank: int | None
    steps: int
    method: str
    learning_rate: float
    seed: int
    status: str = FAILED  # or "finished"; "diverged" if a loss was NaN or infinite
    scores: dict[str, dict[str, float]] | None = None  # metrics of the sets "validation" and "test"
    losses: list[float] = field(default_factory=list)  # the training loss of each step
    diverged_at: int | None = None
    error: str | None = None
    traceback: str | None = None
    examples: str | None = None  # a hash of the examples of all sets
    data: str | None = None  # a hash of the batches
    adapted_layers: int | None = None
    trainable: int | None = None  # trained parameters, without those of a head
    state_bytes: int | None = None  # of the optimizer
    peak_bytes: int | None = None  # of CUDA's allocator
    step_ms: float | None = None  # the median
    optimizer_ms: float | None = None  # the median
    setup_s: float | None = None
    train_s: float | None = None
    evaluation_s: float | None = None
    wall_s: float | None = None  # all of it
    finished_at: str | None = None  # UTC
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def no_better(self) -> bool:
        """Whether the mean training loss of the last quarter is not below the first loss."""
        count = len(self.losses)
        return count > 1 and statistics.fmean(self.losses[-max(1, count // LAST) :]) >= self.losses[0]

    def score(self) -> Score:
        """How good it is among runs of other rates."""
        if self.status != FINISHED or self.scores is None:
            return Score(True, math.inf)
        return Score(self.no_better, self.scores["validation"]["loss"])


class Store:
    """The folder of a comparison: `sweep.json` lists its cells, `runs.jsonl` has a line for each run that is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # it need not exist to be read

    def append(self, record: RunRecord) -> None:
        """Add a line, on disk when this returns; other processes may do the same at the same time."""
        line = f"{as_json(asdict(record))}\n".encode()
        with (self.folder / RECORDS).open("ab+", buffering=0) as file:
            # end the half line that a killed process may have left
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:  # others cannot tear a single write to a file that is open for appending
                line = line[file.write(line) :]
            os.fsync(file.fileno())

    def records(self) -> dict[str, RunRecord]:
        """The latest record of each key; half-written lines are left out."""
        path = self.folder / RECORDS
        known = {each.name for each in fields(RunRecord)}
        records = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            try:
                record = RunRecord(**{name: value for name, value in parse_json(line).items() if name in known})
            except (json.JSONDecodeError, AttributeError, TypeError):
                continue
            records[record.key] = record
        return records

    def write_sweep(self, content: Mapping[str, Any], levels: Mapping[str, Any] | None = None) -> None:
        """Write the content of a plan, the environment, and by task the reference losses that are known."""
        write_json(self.folder / SWEEP, {**content, "environment": environment(), "levels": dict(levels or {})})

    def sweep(self) -> dict[str, Any]:
        """The content that `write_sweep` wrote; raises `UsageError` if there is none."""
        try:
            content: dict[str, Any] = parse_json((self.folder / SWEEP).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"There is no comparison to report on in {str(self.folder)!r}: {error}."
            raise UsageError(f"{message} Give the --output_dir of one.") from error
        return content

    @contextmanager
    def locked(self, index: int, warn: Callable[[str], None]) -> Iterator[bool]:
        """Keep a second comparison out of the folder; raises `UsageError` if another process has the lock.

        Every comparison has a process 0, so that two always meet. Where locks cannot be made, `warn` gets a line, and
        the value is false.
        """
        lock = FileLock(self.folder / f".lock-{index}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            message = f"Another process is training into {str(self.folder)!r}."
            remedy = f"Wait for its end, choose another --output_dir, or delete {lock.lock_file} if none is running."
            raise UsageError(f"{message} {remedy}") from None
        except (OSError, NotImplementedError) as error:
            warn(f"{self.folder} cannot be locked ({error}): make sure that no other comparison writes there.")
        try:
            yield lock.is_locked
        finally:
            lock.release()

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Keep other processes off a cell; false if one has it. A claim ends with its process, however that ends."""
        folder = self.folder / CLAIMS
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
