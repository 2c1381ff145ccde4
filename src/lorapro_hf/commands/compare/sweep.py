"""How does a process work through its runs of a comparison?"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from lorapro_hf.commands.common.console import prepare_output, progress_bars
from lorapro_hf.commands.compare.methods import require_usable
from lorapro_hf.commands.compare.plan import PlannedRun, plan
from lorapro_hf.commands.compare.references import reference_losses, references_key
from lorapro_hf.commands.compare.settings import KINDS, CompareSettings, TaskSettings
from lorapro_hf.commands.compare.store import FAILED, FINISHED, RunRecord, Store
from lorapro_hf.commands.compare.tasks.base import LoadedTask
from lorapro_hf.commands.compare.tasks.kinds import load_task
from lorapro_hf.commands.compare.training import train_run
from lorapro_hf.commands.compare.workers import Worker
from lorapro_hf.options import UsageError


class Sweep:
    """The runs of one process; with `retry_failed` those that ended with an exception are trained again."""

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
        self.retry_failed = retry_failed
        self.store = Store(settings.output_dir)
        self.planned = plan(settings)
        # a run that several methods share goes by the name of the first
        runs = list({run.key: run for run in reversed(self.planned)}.values())[::-1]
        self.own = runs[worker.index :: worker.count]
        self._task: LoadedTask | None = None

    def run(self) -> None:
        """Train the runs that are still to do, and store each when it is done.

        A model or data set that is missing raises `UsageError` before any run begins.
        """
        with self.store.locked(self.worker.index, self._say):
            levels = self._known_levels()
            if self.worker.index == 0:
                self.store.write_sweep(self.settings, self.planned, levels)
            pending = self.announced()
            # the last tasks first, the first one stays loaded: a task that cannot be loaded is noticed at once
            for task in {run.task.name: run.task for run in reversed(pending)}.values():
                loaded = self._load(task)
                if self.worker.index == 0 and task.name not in levels:
                    losses = reference_losses(loaded, self.settings.seeds[0], self.device)
                    levels[task.name] = {**losses, "key": references_key(self.settings, task)}
                    self.store.write_sweep(self.settings, self.planned, levels)
            with progress_bars(self.console) as progress:
                self._train(pending, progress)

    def announced(self) -> list[PlannedRun]:
        """Say how many runs of this process are still to do, and return them."""
        done = self.store.records()
        failed = {key for key, record in done.items() if record.status == FAILED}
        again = failed if self.retry_failed else set()
        pending = [run for run in self.own if run.key not in done or run.key in again]
        before = len(self.own) - len(pending)
        process = f" (process {self.worker.index} of {self.worker.count})" if self.worker.count > 1 else ""
        self._say(f"{len(pending)} runs to do, {before} done before{process}, on {self.device}.")
        count = sum(run.key in failed - again for run in self.own)
        if count:
            self._say(f"{count} of those done before have failed; --retry_failed trains them again.")
        return pending

    def _train(self, pending: list[PlannedRun], progress: Progress) -> None:
        whole = progress.add_task("Runs", total=len(pending), note="")
        for place, run in enumerate(pending):
            bar = progress.add_task(run.title, total=run.task.steps, note="")

            def advance(bar: Any = bar) -> None:
                progress.advance(bar)

            record = train_run(self._load(run.task), run, self.settings, self.device, advance)
            self.store.append(record)
            progress.remove_task(bar)
            progress.advance(whole)
            self._say(f"[{place + 1}/{len(pending)}] {run.title}: {outcome(record)}")

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
