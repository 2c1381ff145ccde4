"""Where are results kept so that a killed comparison goes on and several processes can write?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorapro_hf.commands.common.records import as_json, environment, write_json
from lorapro_hf.commands.compare.plan import PlannedRun
from lorapro_hf.commands.compare.settings import CompareSettings
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import parse_json

RECORDS, SWEEP = "runs.jsonl", "sweep.json"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"


@dataclass
class RunRecord:
    """A run that is done: a line of `runs.jsonl`, which begins with the run's entry in the plan."""

    key: str
    task: str
    rank: int | None
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


class Store:
    """The folder of a comparison: `sweep.json` lists its runs, `runs.jsonl` has a line for each that is done."""

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

    def write_sweep(
        self, settings: CompareSettings, runs: Sequence[PlannedRun], levels: Mapping[str, Any] | None = None
    ) -> None:
        """Write settings, environment, all planned runs, and by task the reference losses that are known."""
        methods = {m.name: {"title": m.title, "is_lora_pro": m.is_lora_pro, **m.decides()} for m in settings.methods}
        planned = {"settings": settings.to_dict(), "methods": methods, "runs": [run.entry() for run in runs]}
        write_json(self.folder / SWEEP, {**planned, "environment": environment(), "levels": dict(levels or {})})

    def sweep(self) -> dict[str, Any]:
        """The content that `write_sweep` wrote; raises `UsageError` if there is none."""
        try:
            content: dict[str, Any] = parse_json((self.folder / SWEEP).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"There is no comparison to report on in {str(self.folder)!r}: {error}."
            raise UsageError(f"{message} Give the --output_dir of one.") from error
        return content

    @contextmanager
    def locked(self, index: int, warn: Callable[[str], None]) -> Iterator[None]:
        """Keep a second comparison out of the folder; raises `UsageError` if another process has the lock.

        Every comparison has a process 0, so that two always meet. `warn` gets a line where the lock cannot be made.
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
            yield
        finally:
            lock.release()
