"""What can be said on the command line of `lorapro compare`?"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorapro_hf.options import UsageError, at_least_one, require_packages
from lorapro_hf.recipes import folder_of
from lorapro_hf.recipes.shipped import described, find

COMPARE = """\
Train a model with many methods (LoRA and its variants, LoRA-Pro in all modes, full fine-tuning), each at several
learning rates and under several seeds, on the same data in the same order, and report which is better, by how much and
at what cost. A YAML says what is compared; --list has those that come along. Nothing is downloaded for its built-in
tasks.

Each finished run is a line of runs.jsonl; a comparison that was stopped or killed goes on where it was when the command
is given again. Runs that diverge or fail are recorded and shown like the others. The report (report.md, report.html,
summary.json) is made from sweep.json and runs.jsonl alone.
"""

COMPARE_EXAMPLES = """\
examples:
  lorapro compare --list
  lorapro compare smoke
  lorapro compare small --devices 2
  lorapro compare small --set seeds=[0] --set tasks.code.steps=20 --output_dir runs/try
  accelerate launch --multi_gpu --num_processes 8 -m lorapro_hf.cli compare gpu
  lorapro compare --report_only --output_dir runs/compare-small --report_dir docs/results/small --json

exit codes: 0 done, 1 a method has no learning rate at which all seeds finished, 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro compare`."""
    parser.add_argument("--list", action="store_true", help="list the comparisons that come with the package")
    parser.add_argument(
        "config", nargs="?", metavar="YAML", help="what to compare: a file, or the name of a comparison of the package"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change an entry of the YAML, such as tasks.code.steps=20 or methods.lora=[1e-3]; may be repeated",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="for results and report (default: what the YAML says, else runs/compare)",
    )
    parser.add_argument(
        "--report_dir",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="for the report and a copy of the results, if elsewhere; results of this comparison there count as done",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="neither count results in --report_dir as done nor keep them: the report there is replaced",
    )
    parser.add_argument("--report_only", action="store_true", help="train nothing; report on what --output_dir has")
    parser.add_argument("--no_report", action="store_true", help="train, and leave the report to --report_only")
    parser.add_argument("--retry_failed", action="store_true", help="train runs again that ended with an exception")
    parser.add_argument(
        "--devices", type=at_least_one, default=1, metavar="N", help="processes, each with a device and runs of its own"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=argparse.SUPPRESS, help="where (default: cuda if there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=_compare, way_on="Give the same command again: it trains the runs that are still to do.")


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print(described(_shipped()))
        return 0
    require_packages("lorapro compare", "rich", "matplotlib", extra="demo")
    output_dir: Path | None = getattr(arguments, "output_dir", None)
    if arguments.report_only:
        if arguments.no_report:
            raise UsageError("--report_only and --no_report leave nothing to do; drop one.")
        if arguments.config is None and output_dir is None:
            raise UsageError("--report_only needs --output_dir, the folder of the comparison, or its YAML.")
        if arguments.config is None and arguments.set:
            raise UsageError("--set changes a YAML: name it, or leave --set out to report on what the folder has.")
    elif arguments.config is None:
        raise UsageError("Name a YAML that says what to compare; --list shows those that come with the package.")
    if arguments.fresh and (arguments.no_report or not hasattr(arguments, "report_dir")):
        raise UsageError("--fresh is about the report in --report_dir: name that folder, or drop --fresh.")
    if arguments.no_report and hasattr(arguments, "report_dir"):
        raise UsageError("--report_dir is for the report, which --no_report leaves out: drop one of the two.")
    if arguments.config is not None:
        arguments.config = find(arguments.config, _folder(), _shipped(), "lorapro compare --list")
    from lorapro_hf.commands.compare.settings import (
        read_settings,  # takes seconds: after the arguments have been checked
    )

    settings = None if arguments.config is None else read_settings(arguments.config, arguments.set, output_dir)
    folder = output_dir if settings is None else settings.output_dir
    assert folder is not None  # one of the two was given
    report_dir = getattr(arguments, "report_dir", folder)
    if settings is not None and not arguments.report_only:
        return _run(arguments, settings, report_dir)
    _check_report_only(arguments, settings, folder, report_dir)
    return _report(folder, report_dir, arguments.json)


def _folder() -> Path:
    return folder_of("configs") / "compare"


def _shipped() -> dict[str, Path]:
    return {path.name: path for path in sorted(_folder().glob("*.yaml"))}


def _check_report_only(arguments: argparse.Namespace, settings: Any, folder: Path, report_dir: Path) -> None:
    """Refuse a report that would not be what was asked for, or that would destroy another."""
    from lorapro_hf.commands.compare.folders import (
        require_no_loss,
        require_same_comparison,
        require_same_plan,
        require_writable,
    )
    from lorapro_hf.commands.compare.store import Store, keys_of

    store = Store(folder)
    sweep = store.sweep()
    if settings is not None:
        require_same_plan(settings, sweep, folder)
    require_writable(report_dir)
    if report_dir.resolve() != folder.resolve() and not arguments.fresh:
        require_same_comparison(report_dir, set(keys_of(sweep)))
        require_no_loss(store, report_dir)


def _run(arguments: argparse.Namespace, settings: Any, report_dir: Path) -> int:
    import torch
    from rich.console import Console

    from lorapro_hf.commands.compare.launch import launch
    from lorapro_hf.commands.compare.sweep import Share, Sweep

    kind = getattr(arguments, "device", "cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here.")
    share = Share.of_environment()
    source = _source_of_results(arguments, settings, report_dir)

    def report(interrupted: bool = False) -> int:
        # What --fresh is to replace stays until there is something whole to replace it by.
        into = settings.output_dir if interrupted and arguments.fresh else report_dir
        return 0 if arguments.no_report else _report(settings.output_dir, into, arguments.json)

    if arguments.devices > 1:
        if share.count > 1:
            raise UsageError("--devices starts the processes itself; leave it out under accelerate launch.")
        if kind == "cuda" and arguments.devices > torch.cuda.device_count():
            raise UsageError(f"--devices {arguments.devices} is more than the {torch.cuda.device_count()} there are.")
        _prepare_processes(settings, kind, source)
        try:
            code = launch(arguments.devices, kind, _again(arguments, settings, kind))
        except KeyboardInterrupt:
            with suppress(UsageError):  # nothing may be there yet
                report(interrupted=True)
            raise
        return code or report()
    sweep = Sweep(settings, share, share.device(kind), Console(stderr=True), arguments.retry_failed, source)
    try:
        sweep.run()
    except KeyboardInterrupt:
        if share.count == 1:
            with suppress(UsageError):
                report(interrupted=True)
        elif arguments.no_report:  # who has started the processes speaks
            return 128 + signal.SIGINT
        raise
    if share.count == 1:
        return report()
    if sweep.complete():  # the last process reports; an exit code other than 0 would end the others
        report()
    return 0


def _source_of_results(arguments: argparse.Namespace, settings: Any, report_dir: Path) -> Path | None:
    """The folder of the report if its results count as done; refused here, before training, if it cannot be written."""
    from lorapro_hf.commands.compare.folders import require_same_comparison, require_writable
    from lorapro_hf.commands.compare.plan import plan

    if arguments.no_report or report_dir.resolve() == settings.output_dir.resolve():
        return None
    require_writable(report_dir)
    if arguments.fresh:
        return None
    require_same_comparison(report_dir, {run.key for run in plan(settings)})
    return report_dir


def _prepare_processes(settings: Any, kind: str, source: Path | None) -> None:
    """Do once, before several processes start, what each of them would find done or missing."""
    import torch

    from lorapro_hf.commands.common.console import prepare_output
    from lorapro_hf.commands.compare.folders import take_over
    from lorapro_hf.commands.compare.plan import plan
    from lorapro_hf.commands.compare.store import Store

    for method in settings.methods:
        method.require_usable(torch.device(kind))
    prepare_output(settings.output_dir)
    if source is not None:
        taken = take_over(Store(settings.output_dir), source, plan(settings))
        print(f"{taken} runs done before, in {source}.", file=sys.stderr)


def _again(arguments: argparse.Namespace, settings: Any, kind: str) -> list[str]:
    """The arguments for each of several processes; the report is left to who starts them."""
    again = [str(arguments.config), "--output_dir", str(settings.output_dir), "--device", kind, "--no_report"]
    again += [part for override in arguments.set for part in ("--set", override)]
    return again + (["--retry_failed"] if arguments.retry_failed else [])


def _report(folder: Path, report_dir: Path, as_json: bool) -> int:
    from lorapro_hf.commands.compare.report import HTML, MARKDOWN, write_report
    from lorapro_hf.commands.compare.store import Store

    summary = write_report(Store(folder), report_dir)
    if as_json:
        print(json.dumps(summary, allow_nan=False))
    else:
        print(f"Results: {folder}\nReport: {report_dir / MARKDOWN}, {report_dir / HTML}")
    hopeless = [
        f"{comparison['task']} r={comparison['rank']}: {row['title']}"
        for comparison in summary["comparisons"]
        for row in comparison["methods"]
        if row["learning_rate"] is None and not row["runs"]["missing"]
    ]
    if hopeless:
        print(f"No learning rate at which all seeds finished: {'; '.join(hopeless)}", file=sys.stderr)
    return 1 if hopeless else 0
