"""Which options does `lorapro ranks` take?"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorapro_hf.options import UsageError, at_least_one, rate

RANKS = """\
Choose the LoRA rank of each layer from the hidden states of the base model on your data (GeLoRA): a block whose output
has a higher intrinsic dimension than its input gets a higher rank. Print a table of the blocks, and write the ranks to
a file for `lorapro train RECIPE --lora_config FILE`. Each row of the data is a point: give several hundred or more.
"""

RANKS_EXAMPLES = """\
examples:
  lorapro ranks HuggingFaceTB/SmolLM2-135M-Instruct --data messages.jsonl
  lorapro ranks microsoft/deberta-v3-base --data mnli.csv --text_columns premise hypothesis --rank_floor 2
  lorapro ranks google-t5/t5-base --data train.jsonl --text_columns document summary --output runs/ranks.json
  lorapro ranks google/vit-base-patch16-224 --data images/ --json

exit codes: 0 done, 1 failed, 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro ranks`."""
    parser.add_argument("model", metavar="MODEL", help="base model: folder, or name on the Hub")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="rows to run: a JSON, JSON lines, CSV, Parquet or text file, or a folder of images, one subfolder a class",
    )
    data.add_argument(
        "--text_columns",
        nargs="+",
        metavar="NAME",
        help="columns of texts, two for an encoder-decoder (default: messages, prompt and completion, or text)",
    )
    data.add_argument("--max_length", type=at_least_one, default=512, metavar="N", help="most tokens of a text")
    data.add_argument("--batch_size", type=at_least_one, default=8, metavar="N", help="rows at a time")
    ranks = parser.add_argument_group("ranks")
    ranks.add_argument(
        "--rank_floor", type=at_least_one, default=1, metavar="R", help="least rank, and that of layers outside blocks"
    )
    ranks.add_argument("--alpha_over_r", type=rate, default=2.0, metavar="X", help="lora_alpha over the rank")
    ranks.add_argument(
        "--pooling", choices=("mean", "tokens"), default="mean", help="a point for each row (its mean), or each token"
    )
    ranks.add_argument(
        "--max_points", type=at_least_one, default=2000, metavar="N", help="points at which no more rows are run"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="precision of the model"
    )
    model.add_argument("--device", metavar="NAME", help="such as cuda:1 or cpu; by default the GPU if there is one")
    model.add_argument("--load_in_4bit", action="store_true", help="quantize the model (bitsandbytes)")
    model.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--output", type=Path, default=Path("lora_config.json"), metavar="FILE", help="for the settings of the adapter"
    )
    results.add_argument("--json", action="store_true", help="print dimensions and settings as JSON")
    parser.set_defaults(run=_ranks)


def _ranks(arguments: argparse.Namespace) -> int:
    if not Path(arguments.data).exists():
        raise UsageError(f"--data {arguments.data}: there is no such file or folder.")
    if arguments.load_in_4bit and arguments.device is not None:
        raise UsageError(
            "--device would be ignored with --load_in_4bit, which chooses the device: leave it out, or set "
            "CUDA_VISIBLE_DEVICES."
        )
    if arguments.output.is_dir():
        raise UsageError(f"--output {arguments.output} is a folder: name a file in it.")
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {arguments.output}: {error.strerror}. Choose another --output.") from error
    from lorapro_hf.commands.ranks.run import choose_ranks  # takes seconds: after the arguments have been checked

    return choose_ranks(arguments)
