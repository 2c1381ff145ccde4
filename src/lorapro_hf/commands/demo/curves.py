"""How do LoRA, LoRA-Pro and full fine-tuning train to the end? Their runs on one task, shared out among processes."""

from __future__ import annotations

import io
import os
import queue
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.multiprocessing import get_context

from lorapro_hf.commands.common.console import ctrl_c
from lorapro_hf.commands.compare.measures import early
from lorapro_hf.commands.compare.plan import PlannedRun, next_runs, plan
from lorapro_hf.commands.compare.settings import CompareSettings, settings_of
from lorapro_hf.commands.compare.significance import Estimate, estimate
from lorapro_hf.commands.compare.store import FINISHED, RunRecord
from lorapro_hf.commands.compare.tasks.kinds import load_task
from lorapro_hf.commands.compare.training import train_run
from lorapro_hf.commands.demo.settings import CURVES, PRO_RATES, RATES, TASK, DemoSettings
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.optim.rules import rule_of

PROCESSES = 2
_PATIENCE = 1.0  # seconds until the processes are asked whether they live

Report = Callable[[PlannedRun, RunRecord | None], None]  # after a step, and with the record at the end of a run


@dataclass
class MethodFigures:
    """The figures of one method over the seeds whose runs finished; `None` where none has."""

    method: str
    title: str
    learning_rate: float
    figures: dict[str, Estimate]  # "loss" and "exact_match" on the test set, "early" and "step_ms"
    state_bytes: int | None
    losses: list[list[float]]  # of each seed


def default_title() -> str:
    """The title of LoRA-Pro in its default mode."""
    rule = rule_of(LoRAProConfig())
    return f"LoRA-Pro ({rule.name}, {rule.update})"


def default_rate(part: str) -> float:
    """The rate of LoRA-Pro in its default mode."""
    return PRO_RATES[part][rule_of(LoRAProConfig()).takes_lora_rates]


def compared(settings: DemoSettings) -> CompareSettings:
    """The trainings as the settings of a comparison, whose schedule and clipping they have."""
    rule = rule_of(LoRAProConfig())
    ours = {
        "title": default_title(),
        "like": f"pro_{rule.name}_{rule.update}",
        "learning_rates": [default_rate(CURVES)],
    }
    content = {
        "tasks": {"characters": {**TASK, "steps": settings.steps}},
        "methods": {"lora": [RATES["lora"]], "lora_pro": ours, "full": [RATES["full"]]},
        "seeds": list(range(1, settings.seeds + 1)),
        "tuning_seeds": [],
        "output_dir": str(settings.output_dir),
    }
    return settings_of(content)


def planned(settings: CompareSettings) -> list[PlannedRun]:
    """All runs; the methods take turns."""
    return sorted((run for cell in plan(settings) for run in next_runs(cell, {})), key=lambda run: run.seed)


class Trainings:
    """All runs of the task: on a CPU in processes that load it at once, which may take a minute of pretraining.

    Until they train, this process leaves them one thread.
    """

    def __init__(self, settings: CompareSettings) -> None:
        self.settings, self.runs, self.cuda = settings, planned(settings), torch.cuda.is_available()
        count = 1 if self.cuda else min(PROCESSES, os.cpu_count() or 1, len(self.runs))
        self.workers: list[Any] = []
        self.threads = torch.get_num_threads()
        if count == 1:
            return
        context = get_context("spawn")
        self.jobs, self.events = context.Queue(), context.Queue()
        torch.set_num_threads(max(1, self.threads - 1))
        with ctrl_c(signal.SIG_IGN):  # which the processes inherit: this one ends them
            for _ in range(count):
                worker = context.Process(target=_work, args=(settings, self.jobs, self.events), daemon=True)
                worker.start()
                self.workers.append(worker)

    def train(self, report: Report) -> None:
        """Train all runs.

        Raises:
            RuntimeError: a process has ended.
        """
        torch.set_num_threads(self.threads)
        if not self.workers:
            task, device = load_task(self.settings.tasks[0]), torch.device("cuda" if self.cuda else "cpu")
            for run in self.runs:
                report(run, train_run(task, run, self.settings, device, partial(report, run, None)))
            return
        for place in range(len(self.runs)):
            self.jobs.put(place)
        left = len(self.runs)
        while left:
            try:
                event = self.events.get(timeout=_PATIENCE)
            except queue.Empty:
                if codes := [worker.exitcode for worker in self.workers if worker.exitcode]:
                    raise RuntimeError(f"A process that trains has ended with exit code {codes[0]}.") from None
                continue
            if isinstance(event, Exception):
                raise event
            place, record = event
            report(self.runs[place], record)
            left -= record is not None

    def close(self) -> None:
        """End the processes."""
        torch.set_num_threads(self.threads)
        for worker in self.workers:
            worker.terminate()
            worker.join()
        self.workers = []


def _work(settings: CompareSettings, jobs: Any, events: Any) -> None:
    """Train runs by their places in the plan, until the process is ended."""
    torch.set_num_threads(1)
    try:
        with redirect_stderr(io.StringIO()) as said:  # so that the pretraining draws no bar through others
            task, runs = load_task(settings.tasks[0]), planned(settings)
        print(said.getvalue(), end="", file=sys.stderr)
    except Exception as error:
        events.put(error)
        return
    while True:
        place = jobs.get()
        on_step = partial(events.put, (place, None))
        events.put((place, train_run(task, runs[place], settings, torch.device("cpu"), on_step)))


def figures(settings: CompareSettings, records: Sequence[RunRecord]) -> list[MethodFigures]:
    """The figures of each method that has a run."""
    found = []
    for method in settings.methods:
        own = [record for record in records if record.method == method.name]
        done = {str(record.seed): record for record in own if record.status == FINISHED}
        values = {
            seed: {**(run.scores or {})["test"], "early": early(run.losses), "step_ms": run.step_ms or 0.0}
            for seed, run in done.items()
        }
        names = next(iter(values.values()), {})
        estimates = {name: estimate({seed: each[name] for seed, each in values.items()}) for name in names}
        if own:
            state = next((record.state_bytes for record in done.values()), None)
            losses = [record.losses for record in done.values()]
            found.append(MethodFigures(method.name, method.title, method.learning_rates[0], estimates, state, losses))
    return found
