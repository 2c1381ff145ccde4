"""Measures how much longer a training step takes with methods that act in it, on SmolLM2-135M with `all-linear` LoRA.

    python benchmarks/method_steps.py                  # about ten minutes on two cores; needs the extra demo
    python benchmarks/method_steps.py --only mgpo      # the cases whose names hold a text
    python benchmarks/method_steps.py --quick          # one small block, to see that it runs; keeps no file

Prints a table and writes it to `method_steps.md` beside this script, or to `--output`. The model is in float32 with
r = 8, the optimizer AdamW or LoRA-Pro. Steps with and without a method take turns on one model, so that other work on
the machine meets both alike. Times are those of the processor, and the table shows the median of the ratios of
neighbouring steps.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import platform
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model

from lorapro_hf import FlatLoRACallback, LoRAMethod, MGPOCallback, create_lorapro_optimizer
from lorapro_hf.commands.common.models import load_base_model

SHAPES = {512: (4, 128), 2048: (4, 512)}  # tokens: sequences of a length


class Case(NamedTuple):
    """A method, and the mode of LoRA-Pro that it is combined with, `None` for AdamW on plain LoRA."""

    method: Callable[[], LoRAMethod]
    mode: str | None = None


CASES = {
    "flat_lora": Case(lambda: FlatLoRACallback(schedule="constant")),
    "flat_lora, beta=0.01": Case(lambda: FlatLoRACallback(0.03, 0.01, schedule="constant")),
    "flat_lora, mode full": Case(lambda: FlatLoRACallback(schedule="constant"), "full"),
    "mgpo": Case(MGPOCallback),
    "mgpo, target='factors'": Case(lambda: MGPOCallback(target="factors")),
    "mgpo, mode efficient": Case(MGPOCallback, "efficient"),
    "mgpo, mode factored": Case(MGPOCallback, "factored"),
    "mgpo, mode full": Case(MGPOCallback, "full"),
}


def batch_of(tokenizer: Any, sequences: int, length: int) -> dict[str, Any]:
    """Source code in sequences of one length, with labels."""
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, typing))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: sequences * length].reshape(sequences, length)
    return {"input_ids": ids, "labels": ids}


def seconds_of_step(model: Any, optimizer: Any, batch: dict[str, Any], method: LoRAMethod | None, step: int) -> float:
    """Processor seconds of one step, whose number is `step`."""
    begun = time.process_time()
    with contextlib.nullcontext() if method is None else method.forward_context():
        model(**batch).loss.backward()
    if method is not None:
        method.before_step(optimizer)
    optimizer.step()
    if method is not None:
        method.after_step(optimizer, step)
    optimizer.zero_grad()
    return time.process_time() - begun


def measure(case: Case, tokens: int, rounds: int, layers: int | None) -> tuple[float, float]:
    """Seconds of a plain step, and how many times as long one with the method takes."""
    base = load_base_model(None)
    bare: Any = base.model
    if layers is not None:
        bare.model.layers = bare.model.layers[:layers]
    model = get_peft_model(bare, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    if case.mode is None:
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    else:
        optimizer = create_lorapro_optimizer(model, lr=1e-5, config={"mode": case.mode})
    method, batch = case.method(), batch_of(base.tokenizer, *SHAPES[tokens])
    method.before_training(model, None)
    plain, ratios = [], []
    for number in range(rounds + 1):
        order = (None, method) if number % 2 else (method, None)
        took = {each: seconds_of_step(model, optimizer, batch, each, number + 1) for each in order}
        if number:  # the first allocates the state
            plain.append(took[None])
            ratios.append(took[method] / took[None])
    return median(plain), median(ratios)


def report(only: str, tokens: Sequence[int], rounds: int, layers: int | None) -> str:
    """The table, and the machine in a sentence."""
    lines = ["| method | tokens a step | plain step, s | times as long |", "|---|---|---|---|"]
    for name, case in CASES.items():
        for count in tokens if only in name else ():
            plain, ratio = measure(case, count, rounds, layers)
            lines.append(f"| {name} | {count} | {plain:.2f} | {ratio:.3f} |")
            print(lines[-1], flush=True)
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}"
    return "\n".join([*lines, "", f"Medians of {rounds} pairs of steps; processor seconds; {machine}.", ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it unless it is of a quick or partial run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="measure the cases whose names hold this text")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="pairs of steps (default: 8)")
    parser.add_argument("--tokens", type=int, nargs="+", choices=[*SHAPES], default=[*SHAPES], help="tokens of a step")
    parser.add_argument("--layers", type=int, metavar="N", help="take the first layers of the model (default: all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file for the table")
    parser.add_argument("--quick", action="store_true", help="one block and one pair of steps, to see that it works")
    options = parser.parse_args(argv)
    if options.quick:
        text = report(options.only, [512], 1, layers=1)
    else:
        text = report(options.only, options.tokens, options.rounds, options.layers)
    print(text, end="")
    output = options.output or Path(__file__).with_suffix(".md")
    if options.output is not None or not (options.quick or options.only or options.layers):
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
