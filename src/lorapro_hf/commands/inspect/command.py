"""What can be said on the command line of `lorapro inspect`?"""

from __future__ import annotations

import argparse
import json

from lorapro_hf.commands.inspect.tasks import TASKS
from lorapro_hf.options import at_least_one, rate

INSPECT = """\
Say what LoRA-Pro would make of a model: its pairs of factors by shape, what else is trained, what is refused and why,
and for each mode the memory of optimizer state and step against what is free here, with the learning rates to try.

MODEL is a base model (only its configuration is read, so that one of 70B parameters takes seconds and no memory), to
which a new LoRA adapter is added by the options; or a saved adapter; or a checkpoint of a training, which is then also
examined for completeness; or the output folder of a training, whose checkpoints are listed.
"""

INSPECT_EXAMPLES = """\
examples:
  lorapro inspect meta-llama/Llama-3.1-8B --lora_r 16 --use_rslora
  lorapro inspect ./mixtral --lora_target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj --ranks 8
  lorapro inspect google/vit-base-patch16-224 --lora_target_modules query value --pairs
  lorapro inspect runs/my_adapter
  lorapro inspect runs/sft/checkpoint-500 --json
  lorapro inspect runs/sft

exit codes: 0 LoRA-Pro can train it, 1 something is refused or the (newest) checkpoint is not complete,
            2 bad arguments, 130 stopped by Ctrl-C
"""


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro inspect`."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder, or name on the Hub, of a model, adapter, checkpoint or output folder"
    )
    parser.add_argument(
        "--task",
        choices=tuple(TASKS),
        metavar="TASK",
        help="what a base model is for, which decides its class and head; by default its configuration or the adapter "
        f"tells: any of {', '.join(TASKS)}",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--ranks", type=at_least_one, default=1, metavar="N", help="processes that would share the pairs out"
    )
    parser.add_argument("--pairs", action="store_true", help="name every pair instead of grouping them by shape")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_lora(parser.add_argument_group("new adapter, for a base model"))
    parser.set_defaults(run=_inspect)


# What an option of the adapter is called in lorapro_hf.recipes.model.
_LORA = (
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


def _add_lora(lora: argparse._ArgumentGroup) -> None:
    """The options, which have no value unless they are given: a saved adapter takes none of them."""
    unset = argparse.SUPPRESS
    lora.add_argument("--lora_r", type=at_least_one, default=unset, metavar="R", help="rank (default: 8)")
    lora.add_argument(
        "--lora_alpha", type=rate, default=unset, metavar="ALPHA", help="scaled by alpha / r (default: 16)"
    )
    lora.add_argument(
        "--lora_target_modules",
        nargs="+",
        default=unset,
        metavar="NAME",
        help="layers to adapt, or one regular expression (default: all-linear, all but the head)",
    )
    lora.add_argument(
        "--lora_target_parameters",
        "--target_parameters",
        nargs="+",
        default=unset,
        metavar="NAME",
        help="parameters to adapt that are no layer of their own, such as packed experts",
    )
    lora.add_argument("--lora_modules_to_save", nargs="+", default=unset, metavar="NAME", help="layers to train whole")
    lora.add_argument("--use_rslora", action="store_true", default=unset, help="scale by alpha / sqrt(r)")
    lora.add_argument("--use_dora", action="store_true", default=unset, help="weight-decomposed adapter")


def _inspect(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging as transformers_logging  # takes seconds: the arguments have been checked

    from lorapro_hf.commands.inspect.show import show
    from lorapro_hf.commands.inspect.sources import Wish, inspect_source

    transformers_logging.set_verbosity_error()
    given = vars(arguments)
    report = inspect_source(
        Wish(
            arguments.model,
            {name: given[name] for name in _LORA if name in given},
            task=arguments.task,
            ranks=arguments.ranks,
            trust_remote_code=arguments.trust_remote_code,
        )
    )
    if arguments.json:
        print(json.dumps(report.to_dict(), allow_nan=False))
    else:
        show(report, arguments.pairs)
    return 0 if report.is_trainable else 1
