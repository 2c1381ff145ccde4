"""What happens in a benchmark run, one thing after the other?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import Progress

from lorapro_hf.commands.bench.growth import measure_growth
from lorapro_hf.commands.bench.plots import plot_growth, plot_ratios
from lorapro_hf.commands.bench.ratios import Ratios, reason_of
from lorapro_hf.commands.bench.report import all_tables, device_name, environment, markdown, rich_table, slug
from lorapro_hf.commands.bench.results import Outcome, read_results, write_results
from lorapro_hf.commands.bench.settings import BenchSettings, missing
from lorapro_hf.commands.bench.training import measure_shares
from lorapro_hf.commands.common.console import INTERRUPTED, prepare_output, progress_bars
from lorapro_hf.options import UsageError

RESULTS = "results.json"
_FOREIGN = 0.05  # of one core: above it the figures get a note
Job = tuple[str, Callable[[], None]]


def device_of(settings: BenchSettings) -> torch.device:
    """The device to measure on.

    Raises:
        UsageError: there is no such device.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no CUDA device. Install a CUDA build, or use --device cpu.")
    return torch.device(settings.device)


def foreign_seconds() -> float:
    """Processor seconds that all other processes have used since the machine started."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests also count as their users
    own = psutil.Process().cpu_times()
    return float(sum(value for name, value in times.items() if name not in idle)) - own.user - own.system


def disturbance(foreign: float, seconds: float) -> str | None:
    """A note if other processes used the processor during the run, else `None`."""
    if foreign <= _FOREIGN * seconds:
        return None
    return (
        f"Other processes used {foreign / seconds:.0%} of a core meanwhile. Threads that wait for each other make even "
        "little of that cost much: measure again on an idle machine."
    )


class _Run:
    """The jobs of a run and the outcome so far."""

    def __init__(self, settings: BenchSettings, device: torch.device, progress: Progress) -> None:
        self.settings = settings
        self.device = device
        self.progress = progress
        self.outcome = Outcome(environment(device))
        self.started = time.perf_counter()
        self.foreign = foreign_seconds()
        self.deadline = self.started + settings.minutes * 60

    def jobs(self) -> list[Job]:
        """All measurements, the most important first: a time limit cuts off the last."""
        settings, outcome, device = self.settings, self.outcome, self.device
        ratios = Ratios(settings, outcome, device, self.say)
        compared: list[Job] = [
            (f"{model.title} r={rank} {dtype}", partial(ratios.measure, model, rank, dtype, self.deadline))
            for model, rank, dtype in (ratios.combinations() if "ratios" in settings.parts else ())
        ]
        further: list[Job] = []
        if "growth" in settings.parts:
            further.append(("growth", lambda: measure_growth(settings, outcome, device, self.say)))
        if "training" in settings.parts:
            further.append(("training step", lambda: measure_shares(settings, outcome, device, self.say)))
        return [*compared[:1], *further, *compared[1:]]

    def say(self, text: str) -> None:
        self.progress.update(self.task, note=text)

    def measure(self) -> None:
        """Do all jobs, until the time is up or Ctrl-C ends it."""
        jobs = self.jobs()
        self.task = self.progress.add_task("", total=len(jobs), note="")
        late = []
        try:
            for title, job in jobs:
                if time.perf_counter() > self.deadline:
                    late.append(title)
                    continue
                self.progress.update(self.task, description=title)
                if not self.progress.console.is_terminal:
                    self.progress.console.print(
                        f"{time.perf_counter() - self.started:5.0f} s  {title}", highlight=False
                    )
                try:
                    job()
                except Exception as error:  # keeps the results of the other jobs
                    self.outcome.notes.append(f"{title}: {reason_of(error)}")
                self.progress.advance(self.task)
        except KeyboardInterrupt:
            self.outcome.stopped = True
        disturbed = disturbance(foreign_seconds() - self.foreign, time.perf_counter() - self.started)
        self.outcome.notes += [disturbed] if disturbed else []
        if late:
            limit = self.settings.minutes
            self.outcome.notes.append(f"Not measured within --minutes {limit:g}: {', '.join(late)}.")


def _report(folder: Path, outcome: Outcome, console: Console) -> list[Path]:
    """Show the tables and write them with the plots; gives the files."""
    for table in all_tables(outcome):
        console.print(rich_table(table))
    for note in outcome.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    files = [folder / "results.md"]
    files[0].write_text(markdown(outcome), encoding="utf-8")
    ratios, growth = folder / "ratios.png", folder / "growth.png"
    files += [ratios] if plot_ratios(ratios, outcome) else []
    return files + ([growth] if plot_growth(growth, outcome.growth) else [])


def report_again(settings: BenchSettings, as_json: bool = False) -> int:
    """Write tables and plots from the `results.json` of an earlier run.

    Raises:
        UsageError: there is none.
    """
    folder = settings.output_dir or Path("benchmarks") / slug(device_of(settings))
    _report(folder, read_results(folder / RESULTS), Console(stderr=as_json))
    if as_json:
        print((folder / RESULTS).read_text(encoding="utf-8"), end="")
    return 0


def run_bench(settings: BenchSettings, console: Console | None = None, as_json: bool = False) -> int:
    """Measure, and write results, tables and plots.

    Args:
        settings: The settings.
        console: Where tables and progress are shown; by default stdout, or stderr with `as_json`.
        as_json: Print the file with the results at the end.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended it early; the results so far are kept.

    Raises:
        UsageError: there is no such device, or the output folder cannot be written to.
    """
    console = console or Console(stderr=as_json)
    device = device_of(settings)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler prints lines of its own
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = settings.output_dir or Path("benchmarks") / slug(device)
    prepare_output(folder)
    title = f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(title, highlight=False)
    for method in settings.measured:
        if reason := missing(method):
            console.print(f"{method.title}: {reason}", markup=False, highlight=False)
    with progress_bars(console) as progress:
        run = _Run(settings, device, progress)
        run.measure()
        progress.update(run.task, note="")
    outcome = run.outcome
    outcome.results = [result for result in outcome.results if result.step_ms or result.note]
    results = folder / RESULTS
    write_results(results, settings, outcome)
    files = [results, *_report(folder, outcome, console)]
    if outcome.stopped:
        console.print("\nStopped by Ctrl-C. The results so far are kept.")
    took = time.perf_counter() - run.started
    console.print(
        "\n" + "\n".join(map(str, files)) + f"\nTotal time: {took / 60:.1f} min", markup=False, highlight=False
    )
    if as_json:
        print(results.read_text(encoding="utf-8"), end="")
    return INTERRUPTED if outcome.stopped else 0
