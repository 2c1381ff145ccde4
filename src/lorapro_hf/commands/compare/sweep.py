"""How does a process work through its part of a comparison?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from lorapro_hf.commands.common.console import prepare_output, progress_bars
from lorapro_hf.commands.compare.methods import require_usable
from lorapro_hf.commands.compare.plan import Cell, content_of, next_runs, plan
from lorapro_hf.commands.compare.references import reference_losses, references_key
from lorapro_hf.commands.compare.settings import KINDS, CompareSettings, TaskSettings
from lorapro_hf.commands.compare.store import FAILED, FINISHED, RunRecord, Store
from lorapro_hf.commands.compare.tasks.base import LoadedTask
from lorapro_hf.commands.compare.tasks.kinds import load_task
from lorapro_hf.commands.compare.training import train_run
from lorapro_hf.commands.compare.tuning import Score
from lorapro_hf.commands.compare.workers import Worker
from lorapro_hf.options import UsageError


class Sweep:
    """The work of one process; with `retry_failed` runs that ended with an exception are trained again, once."""

    def __init__(
        self,
        settings: CompareSettings,
        worker: Worker,
        device: torch.device,
        console: Console,
        retry_failed: bool = False,
    ) -> None:
        for method in settings.methods:
            require_usable(method, device)
        transformers_logging.disable_progress_bar()  # they would run through ours
        prepare_output(settings.output_dir)
        self.settings, self.worker, self.device, self.console = settings, worker, device, console
        self.store = Store(settings.output_dir)
        self.cells = plan(settings)
        # a cell that several methods share goes by the name of the first
        self.own = list({(cell.key, cell.grid): cell for cell in reversed(self.cells)}.values())[::-1]
        failed = {key: record for key, record in self.store.records().items() if record.status == FAILED}
        self.again = {key: record.finished_at for key, record in failed.items()} if retry_failed else {}
        self.scores: dict[str, Score] = {}
        self._task: LoadedTask | None = None

    def run(self) -> None:
        """Train the runs that are still to do, and store each when it is done.

        A model or data set that is missing raises `UsageError` before any run begins.
        """
        with self.store.locked(self.worker.index, self._say) as locks:
            if self.worker.count > 1 and not locks:
                raise UsageError(
                    "Several processes share a folder by locks: use --devices 1, or a folder on this disk."
                )
            levels, content = self._known_levels(), content_of(self.settings, self.cells)
            if self.worker.index == 0:
                self.store.write_sweep(content, levels)
            self.announce()
            pending = [cell.task for cell in self.own if next_runs(cell, self.scores)]
            # the last tasks first, the first one stays loaded: a task that cannot be loaded is noticed at once
            for task in {task.name: task for task in reversed(pending)}.values():
                loaded = self._load(task)
                if self.worker.index == 0 and task.name not in levels:
                    losses = reference_losses(loaded, self.settings.seeds[0], self.device)
                    levels[task.name] = {**losses, "key": references_key(self.settings, task)}
                    self.store.write_sweep(content, levels)
            with progress_bars(self.console) as progress:
                self._train(progress, locks)

    def announce(self) -> None:
        """Say how many runs are still to do."""
        records = self.read()
        done, total = self._counts()
        process = f" (process {self.worker.index} of {self.worker.count})" if self.worker.count > 1 else ""
        least = "at least " if any(cell.tuning(self.scores).later for cell in self.own) else ""
        self._say(f"{least}{total - done} runs to do, {done} done before{process}, on {self.device}.".capitalize())
        count = sum(record.status == FAILED for key, record in records.items() if key in self.scores)
        if count:
            self._say(f"{count} of those done before have failed; --retry_failed trains them again.")

    def read(self) -> dict[str, RunRecord]:
        """Learn the scores of all runs that are done, whichever process trained them, and return their records."""
        records = {
            key: record
            for key, record in self.store.records().items()
            if key not in self.again or (record.status, record.finished_at) != (FAILED, self.again[key])
        }
        self.scores = {key: record.score() for key, record in records.items()}
        return records

    def _train(self, progress: Progress, locks: bool) -> None:
        """Train cells until all are done or with other processes."""
        done, total = self._counts()
        whole = progress.add_task("Runs", completed=done, total=total, note="")
        for cell in self._claims(locks):
            while runs := next_runs(cell, self.scores):
                for run in runs:
                    bar = progress.add_task(run.title, total=run.steps, note="")
                    advance = partial(progress.advance, bar)
                    record = train_run(self._load(run.task), run, self.settings, self.device, advance)
                    self.store.append(record)
                    self.scores[run.key] = record.score()
                    progress.remove_task(bar)
                    done, total = self._counts()
                    progress.update(whole, completed=done, total=total)
                    self._say(f"[{done}/{total}] {run.title}: {outcome(record)}")

    def _claims(self, locks: bool) -> Iterator[Cell]:
        """The cells that have runs to do, one at a time, while no other process trains them."""
        trained = True
        while trained:  # until nothing is left, or left to others: one of these may have been killed
            trained = False
            for cell in self.own:
                if not next_runs(cell, self.scores):
                    continue
                with self.store.claimed(cell.key) if locks else nullcontext(True) as ours:
                    if ours:
                        self.read()
                        trained = True
                        yield cell

    def _counts(self) -> tuple[int, int]:
        """The number of runs that are done, and of all that are known to be needed."""
        states = [cell.tuning(self.scores) for cell in self.own]
        done = sum(state.done for state in states)
        return done, done + sum(len(state.todo) + state.later for state in states)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _known_levels(self) -> dict[str, Any]:
        """The reference losses of the same tasks that an earlier start has stored."""
        try:
            stored = self.store.sweep().get("levels", {})
        except UsageError:  # this is the first start
            return {}
        keys = {task.name: references_key(self.settings, task) for task in self.settings.tasks}
        return {name: stored[name] for name, key in keys.items() if stored.get(name, {}).get("key") == key}

    def _load(self, settings: TaskSettings) -> LoadedTask:
        if self._task is None or self._task.settings != settings:
            self._task = None  # not two models at a time
            has_bar = "pretraining_steps" in KINDS[settings.kind]  # of its own, which a second one would run through
            with nullcontext() if has_bar else self.console.status(f"Loading {settings.name}"):
                self._task = load_task(settings)
        return self._task


def outcome(record: RunRecord) -> str:
    """How a run ended, in a few words."""
    if record.status == FINISHED and record.scores is not None:
        figures = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in record.scores["test"].items())
        return f"{', '.join(figures)} ({record.wall_s:.1f} s)"
    return f"{record.status.upper()}: " + (record.error or f"at step {record.diverged_at}")
