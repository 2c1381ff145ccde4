"""Which options does `lorapro bench` take?"""

from __future__ import annotations

import argparse

from lorapro_hf.commands.bench.settings import BenchSettings
from lorapro_hf.commands.common.arguments import add_options, settings_of
from lorapro_hf.options import require_packages

BENCH = """\
Measure the time of optimizer.step() of LoRA-Pro's modes and of other optimizers for LoRA, in turns and in one run, on
the factors of real models; with the memory and the kernels of a step, its growth with layers, m, n and r, the roofline
of this machine, and the optimizer's share of a whole training step. Nothing is downloaded.

The default run takes about three quarters of an hour on two CPU cores, and --quick a few minutes; nothing else should
run meanwhile. Methods that would take too long or too much memory on a whole model are measured on one of its
transformer blocks, and the table says so. Ctrl-C keeps the results so far.
"""

BENCH_EXAMPLES = """\
examples:
  lorapro bench --quick
  lorapro bench --workloads llama-2-7b --ranks 8 64 --dtypes bf16 --device cuda
  lorapro bench --parts growth --methods full efficient
  lorapro bench --workloads tiny --ranks 4 --output_dir runs/bench     # to see whether everything runs
  lorapro bench --report_only --output_dir runs/bench                  # tables anew from results.json

exit codes: 0 done, 2 bad arguments, 130 stopped by Ctrl-C
"""

_QUICK = {"workloads": ("smollm2-135m",), "ranks": (8,), "dtypes": ("fp32",), "rounds": 3, "repeats": 2}


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro bench`."""
    add_options(parser, BenchSettings)
    quick = "SmolLM2-135M, r = 8 and fp32 only, with few repeats; overrides the others"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--report_only", action="store_true", help="measure nothing; write tables from results.json anew"
    )
    parser.add_argument("--json", action="store_true", help="print results.json; all else goes to stderr")
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    require_packages("lorapro bench", "rich", "psutil", extra="bench")
    settings = settings_of(arguments, BenchSettings, _QUICK if arguments.quick else {})
    from lorapro_hf.commands.bench.run import run_bench  # takes seconds: after the arguments have been checked

    return run_bench(settings, as_json=arguments.json, report_only=arguments.report_only)
