"""How do LoRA, LoRA-Pro and full fine-tuning train to the end? Their runs on one task, shared out among processes."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.multiprocessing import get_context

from lorapro_hf.commands.common.console import ctrl_c
from lorapro_hf.commands.compare.measures import early
from lorapro_hf.commands.compare.methods import FULL, LORA, ComparedMethod
from lorapro_hf.commands.compare.plan import PlannedRun, next_runs, plan
from lorapro_hf.commands.compare.settings import CompareSettings, settings_of
from lorapro_hf.commands.compare.significance import Estimate, estimate
from lorapro_hf.commands.compare.store import FINISHED, RunRecord
from lorapro_hf.commands.compare.tasks.base import LoadedTask
from lorapro_hf.commands.compare.tasks.kinds import load_task
from lorapro_hf.commands.compare.training import train_run
from lorapro_hf.commands.demo.settings import RATES, TASK, DemoSettings
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


def compared(settings: DemoSettings) -> CompareSettings:
    """The trainings as the settings of a comparison, whose schedule and clipping they have."""
    content = {
        "tasks": {"characters": {**TASK, "steps": settings.steps}},
        "methods": {name: [RATES[name]] for name in (LORA, FULL)},
        "seeds": list(range(1, settings.seeds + 1)),
        "tuning_seeds": [],
        "output_dir": str(settings.output_dir),
    }
    theirs = settings_of(content)
    clips = rule_of(LoRAProConfig()).takes_clipped_gradients
    ours = ComparedMethod("lora_pro", default_title(), "lorapro", (RATES["lora_pro"],), clips=clips)
    return replace(theirs, methods=(theirs.methods[0], ours, theirs.methods[1]))


def planned(settings: CompareSettings) -> list[PlannedRun]:
    """All runs; the methods take turns."""
    return sorted((run for cell in plan(settings) for run in next_runs(cell, {})), key=lambda run: run.seed)


def train_all(settings: CompareSettings, task: LoadedTask, report: Report) -> None:
    """Train all runs of the task, on a CPU in two processes, which load it again.

    Raises:
        RuntimeError: a process has ended.
    """
    runs, cuda = planned(settings), torch.cuda.is_available()
    count = 1 if cuda else min(PROCESSES, os.cpu_count() or 1, len(runs))
    if count > 1:
        _share_out(settings, runs, count, report)
        return
    device = torch.device("cuda" if cuda else "cpu")
    for run in runs:
        _train(task, run, settings, device, report)


def _train(task: LoadedTask, run: PlannedRun, settings: CompareSettings, device: torch.device, report: Report) -> None:
    report(run, train_run(task, run, settings, device, lambda: report(run, None)))


def _share_out(settings: CompareSettings, runs: Sequence[PlannedRun], count: int, report: Report) -> None:
    context = get_context("spawn")
    jobs, events = context.Queue(), context.Queue()
    for place in [*range(len(runs)), *[None] * count]:
        jobs.put(place)
    threads = max(1, (os.cpu_count() or 1) // count)
    workers = [context.Process(target=_work, args=(settings, threads, jobs, events), daemon=True) for _ in range(count)]
    try:
        with ctrl_c(signal.SIG_IGN):  # which the processes inherit: this one ends them
            for worker in workers:
                worker.start()
        left = len(runs)
        while left:
            try:
                place, record = events.get(timeout=_PATIENCE)
            except queue.Empty:
                if codes := [worker.exitcode for worker in workers if worker.exitcode]:
                    raise RuntimeError(f"A process that trains has ended with exit code {codes[0]}.") from None
                continue
            report(runs[place], record)
            left -= record is not None
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _work(settings: CompareSettings, threads: int, jobs: Any, events: Any) -> None:
    """Train runs by their places in the plan until there are no more."""
    torch.set_num_threads(threads)
    runs, task = planned(settings), load_task(settings.tasks[0])
    while (place := jobs.get()) is not None:

        def report(run: PlannedRun, record: RunRecord | None, place: int = place) -> None:
            events.put((place, record))

        _train(task, runs[place], settings, torch.device("cpu"), report)


def figures(settings: CompareSettings, records: Sequence[RunRecord]) -> list[MethodFigures]:
    """The figures of each method that has a run."""
    found = []
    for method in settings.methods:
        own = [record for record in records if record.method == method.name]
        done = [record for record in own if record.status == FINISHED]
        values: dict[str, dict[str, float]] = {}
        for record in done:
            test = record.scores["test"] if record.scores else {}
            for name, value in {**test, "early": early(record.losses), "step_ms": record.step_ms or 0.0}.items():
                values.setdefault(name, {})[str(record.seed)] = value
        if own:
            state = next((record.state_bytes for record in done), None)
            estimates = {name: estimate(by_seed) for name, by_seed in values.items()}
            losses = [record.losses for record in done]
            rate = method.learning_rates[0]
            found.append(MethodFigures(method.name, method.title, rate, estimates, state, losses))
    return found
