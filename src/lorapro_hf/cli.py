"""The command line: `lorapro`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lorapro_hf import __version__
from lorapro_hf.commands.bench.command import BENCH, BENCH_EXAMPLES, add_bench
from lorapro_hf.commands.compare.command import COMPARE, COMPARE_EXAMPLES, add_compare
from lorapro_hf.commands.demo.command import DEMO, DEMO_EXAMPLES, add_demo
from lorapro_hf.commands.evaluate.command import EVALUATE, EVALUATE_EXAMPLES, add_evaluate
from lorapro_hf.commands.inspect.command import INSPECT, INSPECT_EXAMPLES, add_inspect
from lorapro_hf.commands.plot import PLOT, PLOT_EXAMPLES, add_plot
from lorapro_hf.commands.train import TRAIN, TRAIN_EXAMPLES, add_train
from lorapro_hf.options import HelpFormatter, UsageError, is_disk_full
from lorapro_hf.utils.extras import MissingExtraError

DESCRIPTION = """\
LoRA-Pro for the Hugging Face stack: LoRA fine-tuning whose steps follow those of full fine-tuning.
"""
EPILOG = """\
`lorapro COMMAND --help` has the options and examples of a command. To begin with:
  lorapro demo                                      see it train, without a download
  lorapro inspect MODEL --lora_r 16                 what would be trained, and what it would cost
  lorapro train --list                              recipes to start from

exit codes: 0 done, 1 it ran but did not do what it was for, 2 bad arguments, 130 stopped by Ctrl-C
Results go to stdout, errors to stderr. With --json, where a command has it, stdout is JSON alone.
"""

_COMMANDS = (
    ("demo", add_demo, "compare LoRA and LoRA-Pro on a small language model", DEMO, DEMO_EXAMPLES),
    ("train", add_train, "train from a recipe, one of those that come along or your own", TRAIN, TRAIN_EXAMPLES),
    ("evaluate", add_evaluate, "evaluate a language model or adapter", EVALUATE, EVALUATE_EXAMPLES),
    ("inspect", add_inspect, "what is in a model, adapter or checkpoint, and what it costs", INSPECT, INSPECT_EXAMPLES),
    ("compare", add_compare, "compare methods over learning rates and seeds", COMPARE, COMPARE_EXAMPLES),
    ("plot", add_plot, "draw the gradient gap that a training recorded", PLOT, PLOT_EXAMPLES),
    ("bench", add_bench, "measure steps beside those of other optimizers for LoRA", BENCH, BENCH_EXAMPLES),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command `lorapro`, with a subcommand for each thing that it does."""
    parser = argparse.ArgumentParser(
        prog="lorapro", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"lorapro_hf {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, declare, summary, description, examples in _COMMANDS:
        declare(
            commands.add_parser(
                name, help=summary, description=description, epilog=examples, formatter_class=HelpFormatter
            )
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0: done. 1: it ran but did not do what it was for; a disk that is full or a file that vanishes counts as that. 2:
    what was asked for cannot be done. 130: stopped by Ctrl-C. Errors that are nobody's fault but the program's keep
    their traceback.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.is_program = argv is None  # a caller in Python goes on after the command
    import lorapro_hf.recipes.quiet  # noqa: F401  (before the libraries that a command imports)

    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except (UsageError, MissingExtraError) as error:
        return _fail(arguments.command, error, 2)
    except BrokenPipeError:  # who reads our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # each of several processes gets it, one speaks
            print(f"\nStopped by Ctrl-C. {getattr(arguments, 'way_on', '')}".rstrip(), file=sys.stderr)
        if arguments.is_program:  # at the interpreter's own end Triton prints sixty lines below the one that matters
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130
    except Exception as error:
        if isinstance(error, OSError) or is_disk_full(error):
            return _fail(arguments.command, error, 1)
        raise


def _fail(command: str, error: Exception, code: int) -> int:
    """Say what is wrong in one line."""
    print(f"lorapro {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
