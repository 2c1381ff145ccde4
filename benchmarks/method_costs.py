"""Measures seconds and memory of methods that act before a training, on SmolLM2-135M with `all-linear` adapters.

    python benchmarks/method_costs.py                     # about twenty minutes on two idle cores; needs the extra demo
    python benchmarks/method_costs.py --only gelora       # the cases whose names hold a text
    python benchmarks/method_costs.py --quick             # one small block, to see that it runs; keeps no file

Prints a table and writes it to `method_costs.md` beside this script, or to `--output`. The model
is in float32 and reads source code of Python in sequences of 128 tokens. Cases take turns; the least of `--repeats`
times counts, since other work only adds to it. A training step takes 8 sequences by plain LoRA, r = 8, and AdamW. The
memory is the peak of the process above its size before the call, with model, adapter and batches (Linux only).
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import platform
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model

from lorapro_hf import add_lora_sb, gelora_ranks, init_from_gradients
from lorapro_hf.commands.common.models import BaseModel, load_base_model

TOKENS, BATCH, STEP = 128, 8, "training step"


class Case(NamedTuple):
    """A call, the number of sequences that it reads, and the rank of the adapter (0 for none)."""

    call: Callable[[Any, list[dict[str, Any]]], Any]
    sequences: int
    rank: int


class Cost(NamedTuple):
    """Seconds and bytes of a call."""

    seconds: float
    memory: int


def step(model: Any, batches: list[dict[str, Any]]) -> None:
    """Take a step of AdamW by plain LoRA, after one that allocates its state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


CASES = {
    STEP: Case(step, BATCH, 8),
    "init_from_gradients, 8 sequences, r = 8": Case(init_from_gradients, 8, 8),
    "init_from_gradients, 64 sequences, r = 8": Case(init_from_gradients, 64, 8),
    "init_from_gradients, 64 sequences, r = 64": Case(init_from_gradients, 64, 64),
    "add_lora_sb, 64 sequences, r = 64": Case(add_lora_sb, 64, 64),
    "gelora_ranks, 256 sequences": Case(gelora_ranks, 256, 0),
}


def batches_of(tokenizer: Any, sequences: int) -> list[dict[str, Any]]:
    """Source code in batches of equal sequences, with labels."""
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, typing))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: sequences * TOKENS].reshape(-1, BATCH, TOKENS)
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def status(name: str) -> int:
    """A size of this process in bytes, by its name in Linux's status file."""
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def measure(case: Case, base: BaseModel) -> Cost:
    """Seconds and memory of a case, on a copy of the model."""
    model: Any = copy.deepcopy(base.model)
    batches = batches_of(base.tokenizer, case.sequences)
    if case.rank:
        model = get_peft_model(model, LoraConfig(r=case.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before, begun = status("VmRSS"), time.perf_counter()
    case.call(model, batches)
    return Cost(time.perf_counter() - begun, status("VmHWM") - before)


def report(only: str, repeats: int, layers: int | None = None) -> str:
    """The table, and the machine in a sentence."""
    base = load_base_model(None)
    model: Any = base.model
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    chosen = {name: case for name, case in CASES.items() if only in name or name == STEP}
    found: dict[str, list[Cost]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, case in chosen.items():
            found[name].append(measure(case, base))
    least = {name: Cost(*map(min, zip(*costs, strict=True))) for name, costs in found.items()}
    lines = ["| call | seconds | training steps | memory, of the model |", "|---|---|---|---|"]
    for name, cost in least.items():
        lines.append(
            f"| {name} | {cost.seconds:.2g} | {cost.seconds / least[STEP].seconds:.1f} | {cost.memory / size:.2f} |"
        )
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    return "\n".join([*lines, "", f"The least of {repeats} runs each; model: {size / 1e6:.0f} MB; {machine}.", ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it unless it is of a quick or partial run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="measure the cases whose names hold this text")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="how often each case runs (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the table")
    parser.add_argument("--quick", action="store_true", help="one block and one run, to see that it works")
    options = parser.parse_args(argv)
    text = report(options.only, 1, layers=1) if options.quick else report(options.only, options.repeats)
    print(text, end="")
    output = options.output or Path(__file__).with_suffix(".md")
    if options.output is not None or not (options.quick or options.only):
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
