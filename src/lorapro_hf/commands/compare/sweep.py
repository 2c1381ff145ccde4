"""What happens in a comparison, one run after the other, and how long will it take?"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from lorapro_hf.commands.common.console import prepare_output
from lorapro_hf.commands.common.progress import progress_bars
from lorapro_hf.commands.compare.folders import locked, take_over
from lorapro_hf.commands.compare.levels import level_key, levels_of
from lorapro_hf.commands.compare.plan import Run, plan, source_hash
from lorapro_hf.commands.compare.settings import CompareSettings, TaskSettings
from lorapro_hf.commands.compare.store import FAILED, FINISHED, Store
from lorapro_hf.commands.compare.tasks import load_task
from lorapro_hf.commands.compare.tasks.base import Task
from lorapro_hf.commands.compare.training import train_run
from lorapro_hf.options import UsageError


@dataclass(frozen=True)
class Share:
    """Which of several processes this is, as `accelerate launch` and torchrun tell it.

    The processes share nothing but the folder of results: each takes every n-th run. No process group is made, for
    LoRA-Pro's optimizer would share the states of one model out among its ranks.

    Args:
        index: Its number.
        count: How many there are.
        local: Its number on this machine, which decides on the device.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of_environment(cls) -> Share:
        """The share of this process."""
        return cls(*(int(os.environ.get(name, default)) for name, default in _VARIABLES))

    def device(self, kind: str) -> torch.device:
        """Where it trains: `kind` is `"cpu"` or `"cuda"`."""
        return torch.device(kind, self.local % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


class Sweep:
    """The runs of one process.

    Args:
        settings: What is compared.
        share: Which runs are its own.
        device: Where they train.
        console: Where progress goes.
        retry_failed: Whether runs that ended with an exception are trained again.
        report_dir: A folder with a report on this comparison, whose results count as done; `None` for none.

    Raises:
        UsageError: a method cannot run here, or the folder of the results cannot be written to.
    """

    def __init__(
        self,
        settings: CompareSettings,
        share: Share,
        device: torch.device,
        console: Console,
        retry_failed: bool = False,
        report_dir: Path | None = None,
    ) -> None:
        for method in settings.methods:
            method.require_usable(device)
        transformers_logging.disable_progress_bar()  # they would run through ours
        prepare_output(settings.output_dir)
        source_hash()  # of what is running, not of what the files may be by the end
        self.settings, self.share, self.device, self.console = settings, share, device, console
        self.retry_failed, self.report_dir = retry_failed, report_dir
        self.store = Store(settings.output_dir)
        self.planned = plan(settings)
        by_key: dict[str, Run] = {}
        for run in self.planned:
            by_key.setdefault(run.key, run)  # what several methods share goes by the name of the first
        self.runs = list(by_key.values())
        self.own = self.runs[share.index :: share.count]
        self.pending = self._still_to_do()
        self.levels: dict[str, Any] = {}
        self._task: Task | None = None

    def run(self) -> None:
        """Train what is still to be trained, a line in the store after each run.

        Raises:
            UsageError: a model or data set is not there, told before any run begins; or another process trains into
                the same folder.
        """
        with locked(self.settings.output_dir, self.share.index, self._say):
            if self.share.index == 0:  # first: another process may find all runs done and report
                self.levels = self._known_levels()
                self._write_sweep()
            taken = 0 if self.report_dir is None else take_over(self.store, self.report_dir, self.own)
            self.pending = self._still_to_do()
            self._say_what_is_to_do(taken)
            self._try_tasks()
            with progress_bars(self.console) as progress:
                self._train(progress)

    def _train(self, progress: Any) -> None:
        whole = progress.add_task("Runs", total=len(self.pending), note="")
        for place, run in enumerate(self.pending):
            bar = progress.add_task(run.subject, total=run.task.steps, note=run.setting)

            def advance(bar: Any = bar) -> None:
                progress.advance(bar)

            record = train_run(self._load(run.task), run, self.settings, self.device, advance)
            self.store.append(record)
            left = readable_time(self.seconds_left(self.pending[place + 1 :]))
            progress.remove_task(bar)
            progress.update(whole, advance=1, note=f"about {left} left")
            self._say(f"[{place + 1}/{len(self.pending)}] {run.title}: {outcome(record)}; about {left} left")

    def _still_to_do(self) -> list[Run]:
        done = self.store.records()
        again = {key for key, record in done.items() if self.retry_failed and record["status"] == FAILED}
        return [run for run in self.own if run.key not in done or run.key in again]

    def _say_what_is_to_do(self, taken: int) -> None:
        before = len(self.own) - len(self.pending)
        share = f" (process {self.share.index} of {self.share.count})" if self.share.count > 1 else ""
        there = f", {taken} of them in {self.report_dir}" if taken else ""
        self._say(f"{len(self.pending)} runs to do, {before} done before{there}{share}, on {self.device}.")
        done = self.store.records()
        failed = sum(run.key in done and done[run.key]["status"] == FAILED for run in self.own)
        if failed and not self.retry_failed:
            self._say(f"{failed} of those done before have failed; --retry_failed trains them again.")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def complete(self) -> bool:
        """Whether every run of all processes is done."""
        done = self.store.records()
        return all(run.key in done for run in self.runs)

    def seconds_left(self, runs: Sequence[Run]) -> float:
        """What these runs will take, judged by those done: of the same kind, else of the same task, else by all."""
        known = [record for record in self.store.records().values() if "wall_s" in record]

        def expected(run: Run) -> float:
            entry = run.entry()
            for names in (("task", "method", "rank"), ("task",), ()):
                alike = [record["wall_s"] for record in known if all(record[name] == entry[name] for name in names)]
                if alike:
                    return statistics.median(alike)
            return 0.0

        return sum(expected(run) for run in runs)

    def _try_tasks(self) -> None:
        """Load the last tasks before the first: one that cannot be loaded is noticed at once, not hours later.

        Process 0 notes the levels of all tasks by the way, of those without a run to do as well.
        """
        needed = {run.task.name: run.task for run in self.pending}
        levelless = [task for task in self.settings.tasks if task.name not in self.levels]
        others = {task.name: task for task in levelless if self.share.index == 0}
        for name, task in reversed({**needed, **others}.items()):
            try:
                loaded = self._load(task)
            except UsageError as error:
                if name in needed:
                    raise
                self._say(f"The untrained loss of task {name} stays unknown: {error}")
                continue
            if name in others:
                levels = levels_of(loaded, self.settings.seeds[0], self.device)
                self.levels[name] = {**levels, "key": level_key(self.settings, task)}
        if others:
            self._write_sweep()

    def _known_levels(self) -> dict[str, Any]:
        """What this folder's comparison, or the report's, has noted of the same tasks."""
        found: dict[str, Any] = {}
        for folder in (self.report_dir, self.store.folder):
            try:
                noted = {} if folder is None else Store(folder).sweep().get("levels", {})
            except UsageError:  # nothing there yet
                continue
            for task in self.settings.tasks:
                if noted.get(task.name, {}).get("key") == level_key(self.settings, task):
                    found[task.name] = noted[task.name]
        return found

    def _write_sweep(self) -> None:
        self.store.write_sweep(self.settings, self.planned, self.levels)

    def _load(self, settings: TaskSettings) -> Task:
        if self._task is None or self._task.settings != settings:
            self._task = None  # not two models at a time
            with self.console.status(f"Loading {settings.name}"):
                self._task = load_task(settings)
        return self._task


def outcome(record: Mapping[str, Any]) -> str:
    """How a run ended, in a few words."""
    if record["status"] == FINISHED:
        test = record["scores"]["test"]
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in test.items())
        return f"{figures} ({record['wall_s']:.1f} s)"
    return f"{record['status'].upper()}: " + (record.get("error") or f"at step {record.get('diverged_at')}")


def readable_time(seconds: float) -> str:
    """`3700` as `"1 h 02 min"`."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
