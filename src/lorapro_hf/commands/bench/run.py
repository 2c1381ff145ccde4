"""What happens in a benchmark run, one thing after the other?"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from lorapro_hf.commands.bench.growth import measure_growth
from lorapro_hf.commands.bench.layers import measure_layers
from lorapro_hf.commands.bench.measure import Bench
from lorapro_hf.commands.bench.ratios import measure_ratios, reason_of
from lorapro_hf.commands.bench.report import device_name, environment, markdown, slug
from lorapro_hf.commands.bench.results import Outcome, read_results, write_results
from lorapro_hf.commands.bench.settings import MODELS, BenchSettings, missing
from lorapro_hf.commands.bench.training import measure_shares
from lorapro_hf.commands.common.console import INTERRUPTED, prepare_output, progress_bars
from lorapro_hf.options import UsageError

_FOREIGN = 0.05  # of one core: above it the figures get a note
Job = tuple[str, Callable[[], None]]


def _jobs(bench: Bench) -> list[Job]:
    """All measurements, the most important first: a time limit cuts off the last."""
    settings = bench.settings
    workloads = [
        (MODELS[name], rank, dtype)
        for dtype in settings.dtypes
        for rank in sorted(settings.ranks)
        for name in settings.workloads
    ]
    compared, layers = (
        [
            (f"{title}{model.title} r={rank} {dtype}", partial(measure, bench, model, rank, dtype))
            for model, rank, dtype in (workloads if part in settings.parts else ())
        ]
        for part, title, measure in (("ratios", "", measure_ratios), ("layers", "layers of ", measure_layers))
    )
    further: list[Job] = [("growth", partial(measure_growth, bench)), ("training step", partial(measure_shares, bench))]
    further = [job for job in further if job[0].split()[0] in settings.parts]
    return [*compared[:1], *further, *compared[1:], *layers]


def measure_all(bench: Bench, progress: Progress) -> None:
    """Do all jobs, until the time is up; a job that fails leaves a note."""
    started, jobs, late = time.perf_counter(), _jobs(bench), []
    task = progress.add_task("", total=len(jobs), note="")
    bench.say = lambda text: progress.update(task, note=text)
    for title, job in jobs:
        seconds = time.perf_counter() - started
        if seconds > bench.settings.minutes * 60:
            late.append(title)
            continue
        progress.update(task, description=title)
        if not progress.console.is_terminal:
            progress.console.print(f"{seconds:5.0f} s  {title}", highlight=False)
        try:
            job()
        except Exception as error:  # keeps the results of the other jobs
            bench.outcome.notes.append(f"{title}: {reason_of(error)}")
        progress.update(task, advance=1, note="")
    if late:
        bench.outcome.notes.append(f"Not measured within --minutes {bench.settings.minutes:g}: {', '.join(late)}.")


def disturbance(foreign: float, seconds: float) -> str | None:
    """A note if other processes used the processor for `foreign` of the seconds of a run, else `None`."""
    if foreign <= _FOREIGN * seconds:
        return None
    return (
        f"Other processes used {foreign / seconds:.0%} of a core meanwhile. Threads that wait for each other make even "
        "little of that cost much: measure again on an idle machine."
    )


def _measured(settings: BenchSettings, device: torch.device, console: Console) -> Outcome:
    """The outcome of a run, which Ctrl-C ends early."""
    title = f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(title, highlight=False)
    for method in settings.measured:
        if reason := missing(method):
            console.print(f"{method.title}: {reason}", markup=False, highlight=False)
    outcome = Outcome(environment(device))
    started, own = time.perf_counter(), time.process_time()
    psutil.cpu_percent()  # the next call gives the mean since this one
    with progress_bars(console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            measure_all(Bench(settings, device, outcome), progress)
        except KeyboardInterrupt:
            outcome.stopped = True
    seconds, own = time.perf_counter() - started, time.process_time() - own
    busy = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1) * seconds
    outcome.notes += [note for note in [disturbance(busy - own, seconds)] if note]
    outcome.results = [result for result in outcome.results if result.step_ms or result.note]
    return outcome


def run_bench(
    settings: BenchSettings, console: Console | None = None, as_json: bool = False, report_only: bool = False
) -> int:
    """Measure, and write results and tables.

    Args:
        settings: The settings.
        console: Where tables and progress are shown; by default stdout, or stderr with `as_json`.
        as_json: Print the file with the results at the end.
        report_only: Take the results of an earlier run.

    Returns:
        The exit code: 0, or 130 if Ctrl-C ended it early; the results so far are kept.

    Raises:
        UsageError: there is no such device, the output folder cannot be written to, or no earlier result is there.
    """
    started = time.perf_counter()
    console = console or Console(stderr=as_json)
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler prints lines of its own
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no CUDA device. Install a CUDA build, or use --device cpu.")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    folder = settings.output_dir or Path("benchmarks") / slug(device)
    results, report = folder / "results.json", folder / "results.md"
    if report_only:
        outcome = read_results(results)
    else:
        prepare_output(folder)
        outcome = _measured(settings, device, console)
        write_results(results, settings, outcome)
    report.write_text(markdown(outcome), encoding="utf-8")
    console.print(Markdown(markdown(outcome, wide=False)))
    if outcome.stopped and not report_only:
        console.print("\nStopped by Ctrl-C. The results so far are kept.")
    total = (time.perf_counter() - started) / 60
    console.print(f"\n{results}\n{report}\nTotal time: {total:.1f} min", markup=False, highlight=False)
    if as_json:
        print(results.read_text(encoding="utf-8"), end="")
    return INTERRUPTED if outcome.stopped and not report_only else 0
