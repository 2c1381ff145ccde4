"""Where are results kept so that a killed comparison goes on and several processes can write?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapro_hf.commands.common.records import environment, without_nan
from lorapro_hf.commands.compare.plan import Run, source_hash
from lorapro_hf.commands.compare.settings import CompareSettings
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import parse_json, write_text

RECORDS, SWEEP = "runs.jsonl", "sweep.json"
FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"


class Store:
    """The folder of a comparison: `sweep.json` says which runs it has, `runs.jsonl` has a line for each that is done.

    Args:
        folder: The folder; it need not exist to be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, on disk when this returns; other processes may do the same at the same time."""
        text = json.dumps(without_nan(dict(record)), allow_nan=False)
        line = f"{text}\n".encode()
        descriptor = os.open(self.folder / RECORDS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # A killed process may have left half a line: end it first. One write to a file that is open for appending
            # is not torn apart by others.
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(descriptor, line) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def records(self) -> dict[str, dict[str, Any]]:
        """The lines by key, the latest of each; what is no whole line is left out."""
        path = self.folder / RECORDS
        if not path.exists():
            return {}
        found = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = parse_json(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("key"), str) and "status" in record:
                found[record["key"]] = record
        return found

    def copy_to(self, folder: Path) -> None:
        """Make a folder that can be reported on and gone on with like this one, without runs of other sweeps.

        Each line gets the names that this sweep has for its run, whatever they were where it was trained; of several
        methods with the same run, those of the first.
        """
        records = self.records()
        entries = {run["key"]: run for run in reversed(self.sweep()["runs"])}
        keys = [key for key in keys_of(self.sweep()) if key in records]
        lines = [json.dumps({**records[key], **entries[key]}) for key in keys]
        write_text(folder / RECORDS, "".join(f"{line}\n" for line in lines))
        write_text(folder / SWEEP, (self.folder / SWEEP).read_text(encoding="utf-8"))

    def write_sweep(
        self, settings: CompareSettings, runs: Sequence[Run], levels: Mapping[str, Any] | None = None
    ) -> None:
        """Note settings, environment and the list of all runs.

        Args:
            settings: What is compared.
            runs: From `plan`.
            levels: From `levels_of`, by task, as far as they are known.
        """
        methods = {m.name: {"title": m.title, "is_lora_pro": m.is_lora_pro, **m.decides()} for m in settings.methods}
        content = {
            "settings": settings.to_dict(),
            "methods": methods,
            "environment": environment(),
            "source": source_hash(),
            "levels": dict(levels or {}),
            "runs": [run.entry() for run in runs],
        }
        write_text(self.folder / SWEEP, json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n")

    def sweep(self) -> dict[str, Any]:
        """What `write_sweep` noted.

        Raises:
            UsageError: if there is nothing.
        """
        path = self.folder / SWEEP
        try:
            content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"There is no comparison to report on in {str(self.folder)!r}: {error}. Give the --output_dir of one."
            ) from error
        return content


def keys_of(sweep: Mapping[str, Any]) -> list[str]:
    """The keys of its runs, those that several methods share once."""
    return list(dict.fromkeys(run["key"] for run in sweep["runs"]))
