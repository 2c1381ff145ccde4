"""The command line of `lorapro aggregate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lorapro_hf.options import UsageError, at_least_one

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

    from lorapro_hf.federated.aggregate import Agreement, Rule

AGGREGATE = """\
Make one LoRA adapter of the adapters that several clients trained on the same base model (federated learning), and
print how close each layer comes to the mean of the clients' weight changes, beside plain averaging. The method `fair`
(LoRA-FAIR) averages A and corrects B, `mean` averages both, `exact` stacks the factors, so that ranks add up.
"""

AGGREGATE_EXAMPLES = """\
examples:
  lorapro aggregate runs/client1 runs/client2 runs/client3 --output runs/global
  lorapro aggregate runs/client1 runs/client2 --weights 1200 300 --objective ridge --output runs/global
  lorapro aggregate runs/client1 runs/client2 --method exact --rank 16 --output runs/global

exit codes: 0 done, 1 failed, 2 bad arguments, 130 stopped by Ctrl-C
"""

_METHODS = {
    "fair": "[LoRA-FAIR](https://huggingface.co/papers/2411.14961)",
    "mean": "averaging the factors",
    "exact": "stacking the factors",
}


def add_aggregate(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro aggregate`."""
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folder of a saved adapter, one for each client")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="X", help="share of each adapter, such as its number of examples"
    )
    parser.add_argument("--method", choices=tuple(_METHODS), default="fair", help="how the factors become one pair")
    parser.add_argument(
        "--objective",
        choices=("cosine", "ridge"),
        default=argparse.SUPPRESS,
        help="of fair: the direction of the change, or least squares (default: cosine)",
    )
    parser.add_argument(
        "--lam",
        type=float,
        default=argparse.SUPPRESS,
        metavar="X",
        help="of fair: how strongly B is held at the mean (default: 0.01)",
    )
    parser.add_argument("--rank", type=at_least_one, metavar="R", help="of exact: largest rank that is kept")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new or empty folder for adapter and model card"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=_aggregate)


def _aggregate(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output {output} exists and is not empty: name a new folder.")
    given = {name: vars(arguments)[name] for name in ("lam", "objective") if name in arguments}
    if given and arguments.method != "fair":
        raise UsageError(f"--{min(given)} is for --method fair: leave it out with --method {arguments.method}.")
    from lorapro_hf.federated.aggregate import Rule, aggregate, config_of_result, open_adapters  # slow: imports PEFT

    rule = Rule(arguments.method, rank=arguments.rank, **given)
    try:
        adapters = open_adapters(arguments.adapters)
        state, rows = aggregate(adapters, arguments.weights, rule)
    except ValueError as error:
        raise UsageError(str(error)) from error
    weights = arguments.weights or [1.0] * len(adapters)
    _save(output, state, config_of_result(adapters, rows), _card_text(output, arguments.adapters, weights, rule, rows))
    if arguments.json:
        layers = [{name: None if value != value else value for name, value in row._asdict().items()} for row in rows]
        report = {"adapters": arguments.adapters, "weights": weights, **rule._asdict(), "layers": layers}
        print(json.dumps({**report, "output": str(output)}, allow_nan=False))
    else:
        print(f"{_table(rows, arguments.method)}\n\nAdapter: {output}")
    return 0


def _save(output: Path, state: Mapping[str, Tensor], config: LoraConfig, text: str) -> None:
    from huggingface_hub import ModelCardData
    from safetensors.torch import save_file

    from lorapro_hf.federated.adapters import WEIGHTS
    from lorapro_hf.hub.card import CARD, write_card
    from lorapro_hf.hub.describe import name_on_hub

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}. Choose another --output.") from error
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, output / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(output))
    base = name_on_hub(config.base_model_name_or_path)
    tags = ["federated-learning", "lora", "peft", *([f"base_model:adapter:{base}"] if base else [])]
    data = ModelCardData(base_model=base, library_name="peft", tags=sorted(tags))
    base_line = f'"{base}"' if base else '"path/to/the/base/model"'
    write_card(output / CARD, data, {"library_text": text.replace("BASE", base_line)})


def _table(rows: Sequence[Agreement], method: str) -> str:
    """A line for each layer, and the means."""
    width = max(len("layer"), *(len(row.layer) for row in rows))
    lines = [f"{'layer':{width}}  rank  cosine: mean  {method:>6}  length"]
    for row in rows:
        lines.append(
            f"{row.layer:{width}}  {row.rank:4}  {_number(row.mean_cosine):>12}  {_number(row.cosine):>6}  "
            f"{_number(row.length):>6}"
        )
    return "\n".join([*lines, "", _summary(rows)])


def _summary(rows: Sequence[Agreement]) -> str:
    """The means over the layers, in a sentence."""
    plain, cosine, length = (
        _number(
            fmean(known) if (known := [x for row in rows if (x := getattr(row, name)) is not None and x == x]) else None
        )
        for name in ("mean_cosine", "cosine", "length")
    )
    return (
        f"{len(rows)} layers: mean cosine with the clients' mean weight change {cosine} (plain averaging: {plain}), "
        f"mean length beside it {length}."
    )


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"


def _card_text(
    output: Path, adapters: Sequence[str], weights: Sequence[float], rule: Rule, rows: Sequence[Agreement]
) -> str:
    shares = [
        f"| `{Path(each).resolve().name}` | {weight / sum(weights):.4g} |"
        for each, weight in zip(adapters, weights, strict=True)
    ]
    settings = ""
    if rule.method == "fair":
        settings = f" with the objective `{rule.objective}` and λ = {rule.lam:g}"
    elif rule.rank:
        settings = f" and keeping the {rule.rank} largest directions"
    return f"""\
# {output.resolve().name}

A LoRA adapter, aggregated from {len(weights)} adapters by {_METHODS[rule.method]}{settings}. {_summary(rows)}

| adapter | share |
| --- | --- |
{chr(10).join(shares)}

## Use it

The adapter is an ordinary PEFT adapter: transformers and PEFT load it.

```python
from peft import PeftModel
from transformers import AutoModel

base_model = AutoModel.from_pretrained(BASE)  # with the class of the training
model = PeftModel.from_pretrained(base_model, "path/to/this/folder").eval()
```"""
