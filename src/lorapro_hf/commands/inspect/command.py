"""Which options does `lorapro inspect` take?"""

from __future__ import annotations

import argparse
import json
from typing import Any

from lorapro_hf.commands.common.tasks import TASKS
from lorapro_hf.options import at_least_one, rate

INSPECT = """\
Report how LoRA-Pro would train a model: its pairs of factors by shape, other trained parameters, refused layers and the
reason, and for each mode the memory of optimizer state and step against the free memory here, with learning rates to
try.

MODEL is a base model (only its configuration is read, so 70B parameters take seconds and no memory), to which the
options add a new LoRA adapter; or a saved adapter; or a checkpoint of a training, which is also examined for
completeness; or the output folder of a training, whose checkpoints are listed.
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
        help="task of a base model, which decides its class and head; by default its configuration or the adapter "
        f"tells it: one of {', '.join(TASKS)}",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument(
        "--ranks", type=at_least_one, default=1, metavar="N", help="processes that would share the pairs out"
    )
    parser.add_argument("--pairs", action="store_true", help="name every pair instead of grouping them by shape")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    lora = parser.add_argument_group("new adapter, for a base model")
    for name, settings in _LORA.items():
        other_names = ["--target_parameters"] if name == "lora_target_parameters" else []
        lora.add_argument(f"--{name}", *other_names, default=argparse.SUPPRESS, **settings)
    parser.set_defaults(run=_inspect)


_NAMES: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
# The names are those of lorapro_hf.recipes.model.AdapterArguments. Without a default, an option that is not given is
# absent: a saved adapter takes none of them.
_LORA: dict[str, dict[str, Any]] = {
    "lora_r": {"type": at_least_one, "metavar": "R", "help": "rank (default: 8)"},
    "lora_alpha": {"type": rate, "metavar": "ALPHA", "help": "scaled by alpha / r (default: 16)"},
    "lora_target_modules": {
        **_NAMES, "help": "layers to adapt, or one regular expression (default: all-linear, all but the head)"
    },
    "lora_target_parameters": {
        **_NAMES, "help": "parameters to adapt that are no layer of their own, such as packed experts"
    },
    "lora_modules_to_save": {**_NAMES, "help": "layers to train whole"},
    "use_rslora": {"action": "store_true", "help": "scale by alpha / sqrt(r)"},
    "use_dora": {"action": "store_true", "help": "weight-decomposed adapter"},
}  # fmt: skip


def _inspect(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging as transformers_logging  # takes seconds: the arguments have been checked

    from lorapro_hf.commands.inspect.report import Request
    from lorapro_hf.commands.inspect.show import text
    from lorapro_hf.commands.inspect.sources import inspect_source

    transformers_logging.set_verbosity_error()
    given = vars(arguments)
    report = inspect_source(
        Request(
            arguments.model,
            {name: given[name] for name in _LORA if name in given},
            task=arguments.task,
            ranks=arguments.ranks,
            trust_remote_code=arguments.trust_remote_code,
        )
    )
    print(json.dumps(report.to_dict(), allow_nan=False) if arguments.json else text(report, arguments.pairs))
    return 0 if report.is_trainable else 1
