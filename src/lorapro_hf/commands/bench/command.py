"""What can be said on the command line of `lorapro bench`?"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from lorapro_hf.commands.bench.settings import DTYPES, METHODS, MODELS, PARTS, BenchSettings
from lorapro_hf.options import at_least_one, rate, require_packages

BENCH = """\
Measure the time of optimizer.step() of LoRA-Pro's modes and of other optimizers for LoRA, in turns and in one run, on
the factors of real models; with the memory and the kernels of a step, its growth with layers, m, n and r, the roofline
of this machine, and the optimizer's share of a whole training step. Nothing is downloaded.

The default run takes about three quarters of an hour on two CPU cores, and --quick a few minutes; nothing else should
run meanwhile. Methods that would take too long or too much memory on a whole model are measured on one of its
transformer blocks, and the table says so. Ctrl-C keeps what is measured.
"""

BENCH_EXAMPLES = """\
examples:
  lorapro bench --quick
  lorapro bench --workloads llama-2-7b --ranks 8 64 --dtypes bf16 --device cuda
  lorapro bench --parts growth --methods full efficient
  lorapro bench --workloads tiny --ranks 4 --output_dir runs/bench     # to see whether everything runs

exit codes: 0 done, 2 bad arguments, 130 stopped by Ctrl-C
"""

_QUICK = {"workloads": ("smollm2-135m",), "ranks": (8,), "dtypes": ("fp32",), "rounds": 3, "repeats": 2}


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro bench`."""
    default = BenchSettings()
    what = parser.add_argument_group("what to measure")
    for name, choices, text in (
        ("workloads", tuple(MODELS), "models whose linear layers are adapted"),
        ("dtypes", tuple(DTYPES), "dtypes of the factors"),
        ("methods", tuple(METHODS), "optimizers; fused AdamW is always among them"),
        ("parts", PARTS, "side by side comparison, growth of a step, share of a training step"),
    ):
        metavar = name[:-1].upper()
        values = list(getattr(default, name))
        text += "" if values == list(choices) else f"; any of {', '.join(choices)}"
        what.add_argument(f"--{name}", nargs="+", choices=choices, default=values, metavar=metavar, help=text)
    what.add_argument("--ranks", nargs="+", type=at_least_one, default=list(default.ranks), metavar="R", help="ranks")
    what.add_argument(
        "--quick", action="store_true", help="SmolLM2-135M, r = 8 and fp32 only, with few repeats; overrides the others"
    )
    how = parser.add_argument_group("how to measure")
    how.add_argument("--device", choices=("cpu", "cuda"), default=default.device, help="where")
    how.add_argument(
        "--threads",
        type=at_least_one,
        default=argparse.SUPPRESS,
        metavar="N",
        help="threads of torch on the CPU (default: torch's)",
    )
    how.add_argument("--rounds", type=at_least_one, default=default.rounds, metavar="N", help="turns of each method")
    how.add_argument("--repeats", type=at_least_one, default=default.repeats, metavar="N", help="timed steps a turn")
    how.add_argument(
        "--seconds", type=rate, default=default.seconds, metavar="S", help="time for a method in each workload"
    )
    how.add_argument("--minutes", type=rate, default=default.minutes, metavar="M", help="begin nothing new after this")
    how.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="training step under bf16 autocast (default: if the device has bf16 instructions)",
    )
    how.add_argument("--seed", type=int, default=default.seed, help="decides factors and gradients")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="for tables (results.md, results.json) and plots (default: benchmarks/ and the name of the device)",
    )
    parser.add_argument("--json", action="store_true", help="print results.json; all else goes to stderr")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    require_packages("lorapro bench", "rich", "matplotlib", "psutil", extra="bench")
    given = vars(arguments)
    chosen = {field.name: given[field.name] for field in fields(BenchSettings) if field.name in given}
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    settings = BenchSettings(**{**chosen, **(_QUICK if arguments.quick else {})})
    from lorapro_hf.commands.bench.run import run_bench  # takes seconds: after the arguments have been checked

    return run_bench(settings, as_json=arguments.json)
