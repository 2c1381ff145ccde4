"""What can be said on the command line of `lorapro compare`?"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorapro_hf.commands.compare.workers import Worker, launch
from lorapro_hf.options import UsageError, at_least_one, require_packages
from lorapro_hf.recipes import folder_of
from lorapro_hf.recipes.shipped import described, find

COMPARE = """\
Train a model with many methods (LoRA and its variants, LoRA-Pro in all modes, full fine-tuning), each at several
learning rates and under several seeds, on the same data in the same order, and report which is better, by how much and
at what cost. A YAML says what is compared; --list shows those that come with the package. Its built-in tasks need no
download.

Each finished run is a line of runs.jsonl; a comparison that was stopped or killed goes on when the command is given
again. Runs that diverge or fail are recorded and shown like the others. The report (report.md, summary.json) is made
from the folder alone.
"""

COMPARE_EXAMPLES = """\
examples:
  lorapro compare --list
  lorapro compare smoke
  lorapro compare small --devices 2
  lorapro compare small --set seeds=[0] --set tasks.docstrings.steps=20 --output_dir runs/try
  lorapro compare gpu --devices 8
  lorapro compare --report_only --output_dir runs/compare-small --json

exit codes: 0 done, 1 a method has no learning rate at which all seeds finished, 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro compare`."""
    add = parser.add_argument
    set_help = "change an entry of the YAML, such as tasks.docstrings.steps=20 or methods.lora=[1e-3]; may be repeated"
    output_help = "folder of results and report (default: that of the YAML, else runs/compare)"
    config_help = "what to compare: a file, or the name of a comparison of the package"
    add("--list", action="store_true", help="list the comparisons that come with the package")
    add("config", nargs="?", metavar="YAML", help=config_help)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    add("--output_dir", type=Path, default=argparse.SUPPRESS, metavar="FOLDER", help=output_help)
    add("--report_only", action="store_true", help="train nothing; report on --output_dir")
    add("--retry_failed", action="store_true", help="train runs again that ended with an exception")
    devices_help = "processes, each with a device and runs of its own"
    add("--devices", type=at_least_one, default=1, metavar="N", help=devices_help)
    device_help = "where (default: cuda if there is one)"
    add("--device", choices=("cpu", "cuda"), default=argparse.SUPPRESS, help=device_help)
    add("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=_compare, way_on="Give the same command again: it trains the runs that are still to do.")


def _compare(arguments: argparse.Namespace) -> int:
    folder = folder_of("configs") / "compare"
    shipped = {path.name: path for path in sorted(folder.glob("*.yaml"))}
    if arguments.list:
        print(described(shipped))
        return 0
    require_packages("lorapro compare", "rich", "matplotlib", "jinja2", extra="demo")
    output_dir: Path | None = getattr(arguments, "output_dir", None)
    if arguments.report_only:
        if output_dir is None or arguments.config is not None or arguments.set:
            raise UsageError("--report_only reads --output_dir: name that folder, and leave YAML and --set out.")
        return _report(output_dir, arguments.json)
    if arguments.config is None:
        raise UsageError("Name a YAML that says what to compare; --list shows those that come with the package.")
    arguments.config = find(arguments.config, folder, shipped, "lorapro compare --list")
    worker = Worker.of_environment()
    if arguments.devices > 1 and worker.count > 1:
        raise UsageError("--devices starts the processes itself; leave it out under accelerate launch.")
    if arguments.devices == 1:
        worker.forget_others()
    from lorapro_hf.commands.compare import settings  # takes seconds: after the arguments have been checked

    return _run(arguments, settings.read_settings(arguments.config, arguments.set, output_dir), worker)


def _run(arguments: argparse.Namespace, settings: Any, worker: Worker) -> int:
    """Train the runs, in this process or in several, and report; a process among several leaves that to others."""
    import torch
    from rich.console import Console

    from lorapro_hf.commands.compare.sweep import Sweep

    kind = getattr(arguments, "device", "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here.")
    if kind == "cuda" and arguments.devices > torch.cuda.device_count():
        raise UsageError(f"--devices {arguments.devices} is more than the {torch.cuda.device_count()} there are.")
    sweep = Sweep(settings, worker, torch.device(kind), Console(stderr=True), arguments.retry_failed)
    again = [str(arguments.config), "--output_dir", str(settings.output_dir), "--device", kind]
    again += [part for override in arguments.set for part in ("--set", override)]
    again += ["--retry_failed"] if arguments.retry_failed else []
    try:
        if arguments.devices == 1:
            sweep.run()
        elif code := launch(arguments.devices, kind, again):
            return code
    except KeyboardInterrupt:
        if worker.count > 1:  # the process that has started the others speaks
            return 128 + signal.SIGINT
        with suppress(UsageError):  # there may be no results yet
            _report(settings.output_dir, arguments.json)
        raise
    return 0 if worker.count > 1 else _report(settings.output_dir, arguments.json)


def _report(folder: Path, as_json: bool) -> int:
    from rich.console import Console

    from lorapro_hf.commands.compare.findings import sentences
    from lorapro_hf.commands.compare.report import MARKDOWN, SUMMARY, write_report
    from lorapro_hf.commands.compare.tables import shown

    summary = write_report(folder)
    if as_json:
        print((folder / SUMMARY).read_text(encoding="utf-8"))
    else:
        console = Console(highlight=False, markup=False)
        for grid in shown(summary):
            console.print(grid.rich())
        console.print("\n".join(sentences(summary)))
        print(f"Report: {folder / MARKDOWN}")
    hopeless = [
        f"{comparison.task} r={comparison.rank}, {comparison.steps} steps: {method.title}"
        for comparison in summary.comparisons
        for method in comparison.methods
        if method.learning_rate is None and not method.runs["missing"]
    ]
    if hopeless:
        print(f"No learning rate at which all seeds finished: {'; '.join(hopeless)}", file=sys.stderr)
    return 1 if hopeless else 0
