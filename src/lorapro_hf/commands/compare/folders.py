"""Whose folder is it: of which comparison, and of which process just now?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorapro_hf.commands.common.records import without_nan
from lorapro_hf.commands.compare.plan import Run
from lorapro_hf.commands.compare.settings import CompareSettings
from lorapro_hf.commands.compare.store import DIVERGED, FAILED, FINISHED, Store
from lorapro_hf.options import UsageError

DONE = (FINISHED, DIVERGED)  # how a run ends that need not be trained again


@contextmanager
def locked(folder: Path, index: int, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep a second comparison out of a folder; the system lifts the lock when the process ends, however it does.

    Args:
        folder: Where the results go.
        index: The number of this process. Every comparison has a process 0, so that two always meet.
        warn: Gets a line where the file system knows no locks.

    Raises:
        UsageError: another process has the lock.
    """
    with (folder / f".lock-{index}").open("a+") as file:
        try:
            import fcntl  # there is none on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"Another process ({file.read().strip() or 'number unknown'}) is training into {str(folder)!r}. Wait "
                "for its end, or choose another --output_dir."
            ) from None
        except (OSError, ImportError) as error:
            warn(f"{folder} cannot be locked ({error}): make sure that no other comparison writes there.")
        file.truncate(0)
        file.write(f"pid {os.getpid()}\n")
        file.flush()
        yield


def require_writable(report_dir: Path) -> None:
    """Make the folder of the report and try to write there, before hours are spent on what goes into it.

    Raises:
        UsageError: it cannot be written to.
    """
    try:
        report_dir.mkdir(parents=True, exist_ok=True)
        probe = report_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"Cannot write to --report_dir {str(report_dir)!r}: {error}. Choose another folder."
        ) from error


def require_same_comparison(report_dir: Path, keys: Collection[str]) -> None:
    """Refuse to write a report over that of another comparison.

    Args:
        report_dir: Where the report is to go.
        keys: Of all runs that this comparison plans.

    Raises:
        UsageError: there are results that are not of this comparison.
    """
    records = Store(report_dir).records()
    strangers = [key for key, record in records.items() if record["status"] in DONE and key not in keys]
    if strangers:
        raise UsageError(
            f"--report_dir {str(report_dir)!r} holds {len(strangers)} results (of {len(records)}) that are not of this "
            "comparison: of another one, or of this with other settings or versions. Choose another folder, or replace "
            "them with --fresh."
        )


def require_no_loss(store: Store, report_dir: Path) -> None:
    """Refuse to replace a report by one on fewer runs.

    Raises:
        UsageError: the folder of the report has results that the store lacks.
    """
    own = store.records()
    more = [
        key
        for key, record in Store(report_dir).records().items()
        if record["status"] in DONE and own.get(key, {}).get("status") not in DONE
    ]
    if more:
        raise UsageError(
            f"--report_dir {str(report_dir)!r} has {len(more)} results that {str(store.folder)!r} lacks. Give the YAML "
            "without --report_only, which takes them over, or replace them with --fresh."
        )


def take_over(store: Store, other: Path, runs: Sequence[Run]) -> int:
    """Add results that another folder has and the store lacks, and say how many: they need not be trained again.

    Args:
        store: Of this comparison.
        other: A folder with a report and its results.
        runs: Those that are asked for.
    """
    own, theirs = store.records(), Store(other).records()
    wanted: dict[str, Run] = {}
    for run in runs:
        wanted.setdefault(run.key, run)  # what several methods share goes by the name of the first
    taken = 0
    for key, run in wanted.items():
        there = theirs.get(key, {}).get("status") in DONE
        if there and own.get(key, {"status": FAILED})["status"] == FAILED:
            store.append({**theirs[key], **run.entry()})
            taken += 1
    return taken


def require_same_plan(settings: CompareSettings, sweep: Mapping[str, Any], folder: Path) -> None:
    """Refuse to report on a folder as if it held what a YAML says now.

    Raises:
        UsageError: the YAML, with what `--set` changes, is not what the folder's comparison was made from.
    """
    now = json.loads(json.dumps(without_nan(settings.to_dict())))
    then = dict(sweep["settings"])
    different = [key for key in now if key not in ("output_dir", "tasks", "methods") and now[key] != then.get(key)]
    for kind in ("tasks", "methods"):
        both = [{each["name"]: each for each in content[kind]} for content in (now, then)]
        names = dict.fromkeys([*both[0], *both[1]])
        different += [f"{kind}.{name}" for name in names if both[0].get(name) != both[1].get(name)]
    if different:
        raise UsageError(
            f"The comparison in {str(folder)!r} was made with other settings than these: {', '.join(different)} "
            "differ. Leave out --report_only to train what is missing, or the YAML to report on what is there."
        )
