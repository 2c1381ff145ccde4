"""Which options does `lorapro demo` take?"""

from __future__ import annotations

import argparse

from lorapro_hf.commands.common.arguments import add_options, settings_of
from lorapro_hf.commands.demo.settings import DemoSettings
from lorapro_hf.options import require_packages

DEMO = """\
Show what LoRA-Pro does, in three parts:
  closeness  how close to the gradient of full fine-tuning LoRA and LoRA-Pro move each layer of SmolLM2-135M
  curves     losses of LoRA, LoRA-Pro and full fine-tuning of a small model on puzzles in characters, over three seeds
  model      SmolLM2-135M fine-tuned on word problems; stock PEFT loads the adapter and answers others

Without options nothing is downloaded, and it takes about five minutes on two CPU cores. Ctrl-C ends it and keeps
what is done.
"""

DEMO_EXAMPLES = """\
examples:
  lorapro demo
  lorapro demo --parts curves --seeds 5 --steps 2000
  lorapro demo --parts closeness model --model Qwen/Qwen2.5-0.5B --dataset openai/gsm8k --dataset_config main

exit codes: 0 done, 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro demo`."""
    add_options(parser, DemoSettings)
    parser.add_argument("--json", action="store_true", help="print results.json; all else goes to stderr")
    parser.set_defaults(run=_demo, way_on="Give the same command again to start anew.")


def _demo(arguments: argparse.Namespace) -> int:
    require_packages("lorapro demo", "rich", "matplotlib", extra="demo")
    settings = settings_of(arguments, DemoSettings, {})
    from lorapro_hf.commands.demo.run import run_demo  # takes seconds: after the arguments have been checked

    return run_demo(settings, as_json=arguments.json)
