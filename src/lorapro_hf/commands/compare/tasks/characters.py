"""Small puzzles in characters: a tiny Llama is pretrained on four of them, and learns others under the same signs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.base import (
    IGNORED,
    Batch,
    LoadedTask,
    Rows,
    language_loss,
    next_tokens,
    to_device,
)
from lorapro_hf.commands.compare.tasks.pretrained import pretrained
from lorapro_hf.commands.compare.tasks.sources import set_of
from lorapro_hf.options import UsageError

ALPHABET, END = "abcdefgh", "#"
CHARACTERS = f" 0123456789+-*=>|{END}{ALPHABET}"  # the number of a token is its place; the first one fills rows up
LENGTH = 16  # of each row: seven letters and a sign, and as many again for the answer
_CODES = str.maketrans({character: chr(place) for place, character in enumerate(CHARACTERS)})
_PRETRAINING_BATCH = 64
_HEAD_WIDTH = 16

Puzzle = Callable[[random.Random], tuple[str, str]]


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(ALPHABET, k=draw.randint(3, 7)))


def _of_word(sign: str, answer: Callable[[str], str]) -> Puzzle:
    def puzzle(draw: random.Random) -> tuple[str, str]:
        word = _word(draw)
        return word + sign, answer(word)

    return puzzle


def _of_numbers(sign: str, limits: tuple[int, ...], answer: Callable[..., str]) -> Puzzle:
    def puzzle(draw: random.Random) -> tuple[str, str]:
        numbers = [draw.randrange(limit) for limit in limits]
        return sign.join(map(str, numbers)) + "=", answer(*numbers)

    return puzzle


PRETRAINING: Mapping[str, Puzzle] = {
    "add": _of_numbers("+", (100, 100), lambda a, b: str(a + b)),
    "subtract": _of_numbers("-", (100, 100), lambda a, b: str(a - b)),
    "copy": _of_word(">", str),
    "sort": _of_word("|", lambda word: "".join(sorted(word))),
}
LEARNED: Mapping[str, Puzzle] = {
    "multiply": _of_numbers("*", (100, 10), lambda a, b: str(a * b)),
    "reverse": _of_word(">", lambda word: word[::-1]),
    "sort_set": _of_word("|", lambda word: "".join(sorted(set(word), reverse=True))),
    "sum_three": _of_numbers("+", (100, 100, 100), lambda a, b, c: str(a + b + c)[::-1]),
}
# For a comparison whose settings were chosen on the others.
HELD_OUT: Mapping[str, Puzzle] = {
    "shift": _of_word(">", lambda word: word.translate(str.maketrans(ALPHABET, ALPHABET[1:] + ALPHABET[0]))),
    "gap": _of_numbers("-", (100, 100), lambda a, b: f"{abs(a - b):02d}"[::-1]),
}


def load_characters(settings: TaskSettings) -> LoadedTask:
    """The model after its pretraining, and examples of the puzzles to learn.

    The loss counts on the answers only. `exact_match` is the share of answers whose every character is the likeliest
    one after the question and the true characters before it: the answers that greedy decoding gets right.

    The hash of a question decides which set it is in, so that no question is in two sets. A set draws with repetition:
    there are 1,000 questions for `multiply`, and 60,000 words or more for others.
    """
    puzzles = {**LEARNED, **HELD_OUT}
    if not settings.learn or set(settings.learn) - set(puzzles):
        raise UsageError(f"Task {settings.name}: learn={list(settings.learn)}; choose from {', '.join(puzzles)}.")
    chosen = [puzzles[name] for name in settings.learn]
    sizes = {"train": settings.examples, "validation": settings.validation_size, "test": settings.test_size}
    drawn = {name: [*islice(_examples(chosen, name, settings.data_seed), size)] for name, size in sizes.items()}
    for name in ("validation", "test"):
        drawn[name].sort(key=lambda example: len("".join(example)))  # so that batches leave out the ends of short rows
    sets = {name: _rows(examples) for name, examples in drawn.items()}
    task = LoadedTask(settings, _model(settings), None, sets, Rows.collate, language_loss, held_out_batch=500)

    def measured(trained: Any) -> Mapping[str, float]:
        total, right, count = 0.0, 0, 0
        for batch in task.batches("test"):
            inputs, labels = next_tokens(to_device(batch, trained))
            logits = trained(**inputs).logits.float()
            total += float(cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"))
            right += int(((logits.argmax(dim=-1) == labels) | (labels == IGNORED)).all(dim=1).sum())
            count += int((labels != IGNORED).sum())
        return {"loss": total / count, "exact_match": right / len(sets["test"])}

    task.measure = measured
    return task


def _examples(puzzles: Sequence[Puzzle], name: str, seed: int) -> Iterator[tuple[str, str]]:
    draw = random.Random(f"{seed} {name}")
    while True:
        question, answer = draw.choice(puzzles)(draw)
        if set_of(f"{seed} {question}") == name:
            yield question, answer + END


def _rows(examples: Sequence[tuple[str, str]]) -> Rows:
    """Examples as rows of tokens, with labels at the places of the answers."""
    text = "".join((question + answer).ljust(LENGTH) for question, answer in examples)
    codes = bytearray(text.translate(_CODES).encode("ascii"))
    ids = torch.frombuffer(codes, dtype=torch.uint8).view(len(examples), LENGTH).long()
    begin = torch.tensor([[len(question)] for question, _ in examples])
    end = begin + torch.tensor([[len(answer)] for _, answer in examples])
    places = torch.arange(LENGTH)
    labels = ids.masked_fill((places < begin) | (places >= end), IGNORED)
    return Rows({"input_ids": ids, "labels": labels})


def _model(settings: TaskSettings) -> Any:
    width, layers = settings.width, settings.layers
    if width % _HEAD_WIDTH:
        raise UsageError(f"Task {settings.name}: width={width} must be a multiple of {_HEAD_WIDTH}.")
    size = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // _HEAD_WIDTH,
        "num_key_value_heads": width // _HEAD_WIDTH,
        "head_dim": _HEAD_WIDTH,
        "vocab_size": len(CHARACTERS),
        "max_position_embeddings": LENGTH,
    }

    def make() -> Any:
        tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": CHARACTERS.index(END)}
        return LlamaForCausalLM(
            LlamaConfig(**size, **tokens, use_cache=False, tie_word_embeddings=False, attn_implementation="sdpa")
        )

    def batches() -> Iterator[Batch]:
        draw, puzzles = random.Random(0), list(PRETRAINING.values())

        def examples() -> Iterator[tuple[str, str]]:
            while True:
                question, answer = draw.choice(puzzles)(draw)
                yield question, answer + END

        endless = examples()
        for _ in range(settings.pretraining_steps):
            yield dict(_rows([*islice(endless, _PRETRAINING_BATCH)]).columns)

    facts: dict[str, Any] = {**size, "batch": _PRETRAINING_BATCH, "puzzles": list(PRETRAINING)}
    facts["steps"] = settings.pretraining_steps
    facts["learning_rate"] = 2e-3 * math.sqrt(64 / width)  # wider models need smaller steps
    return pretrained("characters", make, facts, batches, language_loss)
