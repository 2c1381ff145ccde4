"""The command line of `lorapro plot`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lorapro_hf.options import UsageError, require_packages

PLOT = """\
Draw the gradient gap of trainings: the distance of the gradients of plain LoRA and of LoRA-Pro from those of full
fine-tuning, over steps (median and quartiles over the layers' latest values) and layer by layer (a heat map), and the
error of each step. Runs are drawn side by side on the same scale. The measurements come from lora_pro_gap.jsonl, which
a training writes with --lora_pro_log_gap N or with GradientGapCallback.
"""

PLOT_EXAMPLES = """\
examples:
  lorapro plot runs/mine
  lorapro plot runs/lora runs/lora_pro --output gap.png
  lorapro plot runs/mine --json

exit codes: 0 done, 2 bad arguments, 130 stopped by Ctrl-C
"""

PICTURE = "lora_pro_gap.png"


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro plot`."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training, or its lora_pro_gap.jsonl"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"the picture, a .png (default: {PICTURE} in the folder of the run, or here for several runs)",
    )
    parser.add_argument("--json", action="store_true", help="print medians and quartiles by step as JSON")
    parser.set_defaults(run=_plot)


def _plot(arguments: argparse.Namespace) -> int:
    for run in arguments.runs:
        if not run.exists():
            raise UsageError(f"there is no folder {run}; name the output_dir of a training.")
    require_packages("lorapro plot", "matplotlib", extra="demo")
    from lorapro_hf.diagnostics.plot import plot_gap  # slow: it imports matplotlib
    from lorapro_hf.diagnostics.runs import read_runs

    runs = read_runs(arguments.runs)
    first = arguments.runs[0]
    folder = Path() if len(runs) > 1 else (first if first.is_dir() else first.parent)
    output: Path = getattr(arguments, "output", folder / PICTURE)
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: the picture is a PNG; its name must end with .png.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        plot_gap(output, runs)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}. Name another place with --output.") from error
    if arguments.json:
        print(json.dumps([run.summary() for run in runs], allow_nan=False))
        print(f"Picture: {output}", file=sys.stderr)
    else:
        print(f"Picture: {output}")
    return 0
