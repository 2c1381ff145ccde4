"""What happens in a benchmark run, one thing after the other?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import Progress

from lorapro_hf.commands.bench.growth import measure_growth
from lorapro_hf.commands.bench.peers import missing
from lorapro_hf.commands.bench.plots import plot_growth, plot_ratios, plot_roofline
from lorapro_hf.commands.bench.ratios import Ratios, reason_of
from lorapro_hf.commands.bench.report import all_sections, device_name, markdown, rich_table, slug, write_json
from lorapro_hf.commands.bench.results import Outcome
from lorapro_hf.commands.bench.settings import BenchSettings
from lorapro_hf.commands.bench.training import measure_shares
from lorapro_hf.commands.common.console import INTERRUPTED, prepare_output
from lorapro_hf.commands.common.progress import progress_bars
from lorapro_hf.options import UsageError

_FOREIGN = 0.05  # of one core: from here on the figures are marked
Job = tuple[str, Callable[[], None]]


def device_of(settings: BenchSettings) -> torch.device:
    """The device to measure on.

    Raises:
        UsageError: if there is no such device.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no CUDA device. Install a CUDA build, or use --device cpu.")
    return torch.device(settings.device)


def foreign_seconds() -> float:
    """Processor seconds that everything but this process has used since the machine started."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # time of guests is in that of their users as well
    own = psutil.Process().cpu_times()
    return float(sum(value for name, value in times.items() if name not in idle)) - own.user - own.system


def disturbance(foreign: float, seconds: float) -> str | None:
    """What to say if other processes took part in the run, else `None`."""
    if foreign <= _FOREIGN * seconds:
        return None
    return (
        f"Other processes used {foreign / seconds:.0%} of a core meanwhile. Threads that wait for each other make even "
        "little of that cost much: measure again on an idle machine."
    )


class _Run:
    """The jobs of a run and what came out so far."""

    def __init__(self, settings: BenchSettings, device: torch.device, progress: Progress) -> None:
        self.settings = settings
        self.device = device
        self.progress = progress
        self.outcome = Outcome()
        self.started = time.perf_counter()
        self.foreign = foreign_seconds()
        self.deadline = self.started + settings.minutes * 60

    def jobs(self) -> list[Job]:
        """What to measure, the most wanted first: a time limit cuts off the end."""
        settings, outcome, device = self.settings, self.outcome, self.device
        ratios = Ratios(settings, outcome, device, self.say)

        def measure(index: int) -> Callable[[], None]:
            return lambda: ratios.measure(*ratios.combinations()[index], self.deadline)

        found = [
            (f"{model.title} r={rank} {dtype}", measure(index))
            for index, (model, rank, dtype) in enumerate(ratios.combinations())
        ]
        found = found if "ratios" in settings.parts else []
        extra: list[Job] = []
        if "growth" in settings.parts:
            extra.append(("growth", lambda: measure_growth(settings, outcome, device, self.say)))
        if "training" in settings.parts:
            extra.append(("training step", lambda: measure_shares(settings, outcome, device, self.say)))
        return [*found[:1], *extra, *found[1:]]

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
                except Exception as error:  # what is measured is kept
                    self.outcome.notes.append(f"{title}: {reason_of(error)}")
                self.progress.advance(self.task)
        except KeyboardInterrupt:
            self.outcome.stopped = True
        disturbed = disturbance(foreign_seconds() - self.foreign, time.perf_counter() - self.started)
        self.outcome.notes += [disturbed] if disturbed else []
        if late:
            limit = self.settings.minutes
            self.outcome.notes.append(f"Not measured within --minutes {limit:g}: {', '.join(late)}.")


def _write(folder: Path, settings: BenchSettings, outcome: Outcome, device: torch.device) -> list[Path]:
    """Write everything; gives the files."""
    files = [folder / "results.json", folder / "results.md"]
    write_json(files[0], settings, outcome, device)
    files[1].write_text(markdown(all_sections(outcome, device), outcome, device), encoding="utf-8")
    ratios, growth, roofline = (folder / f"{name}.png" for name in ("ratios", "growth", "roofline"))
    for path, drawn in (
        (ratios, plot_ratios(ratios, outcome)),
        (growth, plot_growth(growth, outcome.growth)),
        (roofline, plot_roofline(roofline, outcome)),
    ):
        files += [path] if drawn else []
    return files


def run_bench(settings: BenchSettings, console: Console | None = None, as_json: bool = False) -> int:
    """Measure, compare with the targets, and write tables and plots.

    Args:
        settings: what to measure and how.
        console: where to show it; by default stdout, or stderr with `as_json`.
        as_json: print the file with the results at the end.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended it early; what was measured until then is kept.

    Raises:
        UsageError: for a device or an output folder that is of no use.
    """
    console = console or Console(stderr=as_json)
    device = device_of(settings)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else every look at a step prints lines of the profiler
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = settings.output_dir or Path("benchmarks") / slug(device)
    prepare_output(folder)
    console.print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False
    )
    for method in settings.measured:
        reason = missing(method)
        if reason is not None:
            console.print(f"{method.title}: {reason}", markup=False, highlight=False)
    with progress_bars(console) as progress:
        run = _Run(settings, device, progress)
        run.measure()
        progress.update(run.task, note="")
    outcome = run.outcome
    outcome.results = [result for result in outcome.results if result.samples_ms or result.note]
    for section in all_sections(outcome, device):
        console.print(rich_table(section))
    for note in outcome.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    files = _write(folder, settings, outcome, device)
    if outcome.stopped:
        console.print("\nStopped by Ctrl-C. What was measured until then is kept.")
    took = time.perf_counter() - run.started
    console.print(
        "\n" + "\n".join(map(str, files)) + f"\nTotal time: {took / 60:.1f} min", markup=False, highlight=False
    )
    if as_json:
        print(files[0].read_text(encoding="utf-8"), end="")
    return INTERRUPTED if outcome.stopped else 0
