"""The command line: `lorapro`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lorapro_hf import __version__
from lorapro_hf.bench.command import BENCH, BENCH_EXAMPLES, add_bench
from lorapro_hf.demo.command import CURVES_DESCRIPTION, CURVES_EXAMPLES, DEMO, DEMO_EXAMPLES, add_curves, add_demo
from lorapro_hf.options import HelpFormatter, UsageError

_COMMANDS = (
    ("demo", add_demo, "compare LoRA and LoRA-Pro on a small language model", DEMO, DEMO_EXAMPLES),
    ("curves", add_curves, "training curves over several seeds", CURVES_DESCRIPTION, CURVES_EXAMPLES),
    ("bench", add_bench, "measure optimizer steps beside those of other optimizers for LoRA", BENCH, BENCH_EXAMPLES),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command `lorapro`, with a subcommand for each thing that it does."""
    parser = argparse.ArgumentParser(prog="lorapro", description="LoRA-Pro for the Hugging Face stack.")
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
    """Run the command line and return its exit code: 0, 2 for bad arguments, 130 after Ctrl-C."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UsageError as error:
        print(f"{parser.prog} {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nAborted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
