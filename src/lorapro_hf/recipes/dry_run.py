"""What would a training learn from, how long would it take, and how much memory? Two steps tell."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.optim.memory import readable_bytes

_SHOWN, _COUNTED, _LONGEST = 3, 200, 400  # examples, examples, tokens
_STEPS = 2  # the first one is slower: it allocates and compiles
Parts = list[tuple[str, bool]]
"""Pieces of a text, each with whether it is trained."""


def write_nothing(arguments: TrainingArguments) -> None:
    """Change the settings of a training, before its trainer is made, so that it writes no file and reports nowhere."""
    settings: Any = arguments
    settings.output_dir = tempfile.gettempdir()  # the trainer makes the folder
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        setattr(settings, name, type(getattr(settings, name))("no"))
    settings.report_to, settings.push_to_hub, settings.load_best_model_at_end = [], False, False


def rehearse(trainer: Trainer) -> None:
    """Print examples, tokens, number of steps, memory of the optimizer and the time of a step, on the first rank."""
    is_first = trainer.is_world_process_zero()
    if is_first:
        _print_examples(trainer)
    meter = _StepMeter()
    for other in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(other)
    trainer.add_callback(meter)
    trainer.train()
    if not is_first:
        return
    print(f"\noptimizer steps: {meter.steps:,}")
    print(f"memory of the optimizer: {readable_bytes(_state_bytes(trainer.optimizer))}")
    if torch.cuda.is_available():
        print(f"peak memory of the GPU: {readable_bytes(torch.cuda.max_memory_allocated())}")
    seconds = meter.seconds[-1]
    print(f"time of one step: {seconds:.2f} s, measured; of all steps: about {_readable(seconds * meter.steps)}")
    print("Nothing is written. The same command without --dry_run trains.")


class _StepMeter(TrainerCallback):
    def __init__(self) -> None:
        self.steps, self.seconds, self._begun = 0, list[float](), 0.0

    def on_train_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.steps = state.max_steps

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = _now()

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(_now() - self._begun)
        control.should_training_stop = len(self.seconds) == _STEPS


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _state_bytes(optimizer: Any) -> int:
    own = unwrap_optimizer(optimizer)
    if isinstance(own, LoRAProAdamW):
        return own.estimated_state_bytes()
    values = itertools.chain.from_iterable(state.values() for state in own.state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _readable(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _print_examples(trainer: Trainer) -> None:
    tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    tokens: list[list[bool]] = []
    for number, (ids, trained) in enumerate(itertools.islice(_examples(trainer), _COUNTED), 1):
        tokens.append(trained)
        if number <= _SHOWN and hasattr(tokenizer, "decode"):
            print(f"\nexample {number}, {len(ids)} tokens of which {sum(trained)} are trained:")
            print(shown(parts_of(tokenizer, ids, trained)))
    if not tokens:
        print("The examples hold no tokens to show.")
        return
    lengths = [len(each) for each in tokens]
    share = sum(map(sum, tokens)) / sum(lengths)
    print(
        f"\ntokens per example: {min(lengths)} to {max(lengths)}, mean {sum(lengths) / len(lengths):.0f}; "
        f"{share:.0%} trained (of {len(lengths)} examples)"
    )


def _examples(trainer: Trainer) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the tokens of each example as the model gets them, and whether the loss counts each."""
    for batch in trainer.get_train_dataloader():
        ids = batch.get("input_ids")
        if ids is None or ids.dim() != 2:
            return
        mask = batch.get("attention_mask")
        there = (torch.ones_like(ids) if mask is None else mask).bool()
        yield from _rows(ids, there, _trained(batch, ids), batch.get("labels"))


def _rows(ids: Any, there: Any, trained: Any, labels: Any) -> Iterator[tuple[list[int], list[bool]]]:
    for row in range(len(ids)):
        kept = there[row]
        read, mask = ids[row][kept].tolist(), trained[row][kept].tolist()
        if labels is not None and labels.dim() == 2 and labels.shape != ids.shape:  # an encoder-decoder's text to write
            written = labels[row][labels[row] >= 0].tolist()
            read, mask = read + written, mask + [True] * len(written)
        yield read, mask


def _trained(batch: Mapping[str, Any], ids: torch.Tensor) -> torch.Tensor:
    labels, completion = batch.get("labels"), batch.get("completion_mask")
    if labels is not None and labels.shape == ids.shape:
        return torch.as_tensor(labels != -100)
    return torch.zeros_like(ids, dtype=torch.bool) if completion is None else torch.as_tensor(completion).bool()


def parts_of(tokenizer: Any, ids: list[int], trained: list[bool]) -> Parts:
    """Return the text of an example in pieces; the middle of a long one is left out."""
    pairs, half = list(zip(ids, trained, strict=True)), _LONGEST // 2
    cut = len(pairs) - _LONGEST
    halves = [pairs] if cut <= 0 else [pairs[:half], pairs[-half:]]
    parts: Parts = []
    for number, part in enumerate(halves):
        if number:
            parts.append((f" [... {cut} tokens ...] ", False))
        for is_trained, run in itertools.groupby(part, key=lambda pair: pair[1]):
            parts.append((tokenizer.decode([token for token, _ in run]), is_trained))
    return parts


def shown(parts: Parts) -> str:
    """Return pieces of a text with the trained ones in green, or between `[[` and `]]` outside a terminal."""
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\033[32m", "\033[0m") if is_coloured else ("[[", "]]")
    plain = [(text.replace("\033", "\\033"), is_trained) for text, is_trained in parts]
    return "".join(f"{before}{text}{after}" if is_trained else text for text, is_trained in plain)
