"""The command line `lorapro` and its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lorapro_hf import __version__
from lorapro_hf.commands.aggregate import AGGREGATE, AGGREGATE_EXAMPLES, add_aggregate
from lorapro_hf.commands.bench.command import BENCH, BENCH_EXAMPLES, add_bench
from lorapro_hf.commands.chat.command import CHAT, CHAT_EXAMPLES, add_chat
from lorapro_hf.commands.compare.command import COMPARE, COMPARE_EXAMPLES, add_compare
from lorapro_hf.commands.demo.command import DEMO, DEMO_EXAMPLES, add_demo
from lorapro_hf.commands.evaluate.command import EVALUATE, EVALUATE_EXAMPLES, add_evaluate
from lorapro_hf.commands.init.command import INIT, INIT_EXAMPLES, add_init
from lorapro_hf.commands.inspect.command import INSPECT, INSPECT_EXAMPLES, add_inspect
from lorapro_hf.commands.merge.command import MERGE, MERGE_EXAMPLES, add_merge
from lorapro_hf.commands.plot import PLOT, PLOT_EXAMPLES, add_plot
from lorapro_hf.commands.ranks.command import RANKS, RANKS_EXAMPLES, add_ranks
from lorapro_hf.commands.train import TRAIN, TRAIN_EXAMPLES, add_train
from lorapro_hf.options import HelpFormatter, UsageError, is_disk_full
from lorapro_hf.utils.extras import MissingExtraError

DESCRIPTION = """\
LoRA-Pro for the Hugging Face stack: LoRA fine-tuning whose steps follow those of full fine-tuning.
"""
EPILOG = """\
`lorapro COMMAND --help` shows the options and examples of a command. To begin with:
  lorapro demo                                      see what LoRA-Pro does, without a download
  lorapro inspect MODEL --lora_r 16                 see which layers would be trained, and at which cost
  lorapro train --list                              list the recipes
  lorapro init                                      write a recipe for your model and data

exit codes: 0 done, 1 failed, 2 bad arguments, 130 stopped by Ctrl-C
Results go to stdout, errors to stderr. With --json, which some commands have, stdout is JSON alone.
"""

_COMMANDS = (
    ("demo", add_demo, "show what LoRA-Pro does, without a download", DEMO, DEMO_EXAMPLES),
    ("init", add_init, "write a recipe for your model and data", INIT, INIT_EXAMPLES),
    ("train", add_train, "train from a recipe, the package's or your own", TRAIN, TRAIN_EXAMPLES),
    ("evaluate", add_evaluate, "evaluate a language model or adapter", EVALUATE, EVALUATE_EXAMPLES),
    ("inspect", add_inspect, "show a model, adapter or checkpoint, and its cost", INSPECT, INSPECT_EXAMPLES),
    ("ranks", add_ranks, "choose the rank of each layer from your data", RANKS, RANKS_EXAMPLES),
    ("chat", add_chat, "talk to an adapter or a model", CHAT, CHAT_EXAMPLES),
    ("merge", add_merge, "make one model of an adapter and its base model", MERGE, MERGE_EXAMPLES),
    ("aggregate", add_aggregate, "make one adapter of those of several clients", AGGREGATE, AGGREGATE_EXAMPLES),
    ("compare", add_compare, "compare methods over learning rates and seeds", COMPARE, COMPARE_EXAMPLES),
    ("plot", add_plot, "draw the gradient gap that a training recorded", PLOT, PLOT_EXAMPLES),
    ("bench", add_bench, "measure steps beside those of other optimizers for LoRA", BENCH, BENCH_EXAMPLES),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `lorapro` and its subcommands."""
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

    0: done. 1: failed, for example because the disk is full. 2: bad arguments. 130: stopped by Ctrl-C. Defects of the
    program keep their traceback.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.is_program = argv is None  # otherwise the caller, in Python, goes on after the command
    import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries)

    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except (UsageError, MissingExtraError) as error:
        return _fail(arguments.command, error, 2)
    except BrokenPipeError:  # the reader of our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # one of several processes prints
            print(f"\nStopped by Ctrl-C. {getattr(arguments, 'way_on', '')}".rstrip(), file=sys.stderr)
        if arguments.is_program:  # at the end of the interpreter Triton would print sixty more lines
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130
    except Exception as error:
        if isinstance(error, OSError) or is_disk_full(error):
            return _fail(arguments.command, error, 1)
        raise


def _fail(command: str, error: Exception, code: int) -> int:
    """Print the error in one line and return the exit code."""
    print(f"lorapro {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
