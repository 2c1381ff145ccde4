"""How well does a model solve the held-out problems?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lorapro_hf.commands.common.generation import complete
from lorapro_hf.commands.common.problems import Example

_FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


@dataclass(frozen=True)
class Score:
    """The loss per token of the held-out answers, and the shares of right and of finished generated answers."""

    loss: float
    exact_match: float
    answered: float


def final_answer(text: str) -> str | None:
    """The first number after `#### ` without thousands separators, or `None`."""
    match = _FINAL_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


def final_answer_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The shares of predictions with the reference's final answer (`exact_match`) and with any (`answered`).

    As in GSM8K's own evaluation, thousands separators do not count and every other character does.

    Raises:
        ValueError: a reference has no final answer.
    """
    expected = [final_answer(reference) for reference in references]
    if None in expected:
        missing = references[expected.index(None)]
        raise ValueError(f"The reference {missing!r} has no final answer: it must contain '#### ' and a number.")
    given = [final_answer(prediction) for prediction in predictions]
    return {
        "exact_match": sum(got == want for got, want in zip(given, expected, strict=True)) / len(references),
        "answered": sum(got is not None for got in given) / len(references),
    }


class Evaluator:
    """Scores models on the same held-out problems.

    Args:
        examples: The held-out problems.
        tokenizer: The model's tokenizer.
        batch_size: Problems in a batch.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        # problems of similar length in a batch need less padding
        self.examples = sorted(examples, key=lambda example: (len(example.prompt_ids), example.prompt))
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        # a wrong answer may be a little longer than the longest right one
        self.max_new_tokens = max(len(example.answer_ids) for example in examples) + 8

    @property
    def rounds(self) -> int:
        """How often `score` calls `advance`."""
        return 2 * len(list(self._batches()))

    def _batches(self) -> Iterator[list[Example]]:
        for start in range(0, len(self.examples), self.batch_size):
            yield self.examples[start : start + self.batch_size]

    @torch.no_grad()
    def score(self, model: PeftModel, advance: Callable[[], None] = lambda: None) -> Score:
        """The score of `model` in evaluation mode; `advance` is called after every batch."""
        was_training = model.training
        model.eval()
        try:
            loss = self._loss(model, advance)
            answers: list[str] = []
            for batch in self._batches():
                answers += self.generate(model, [example.prompt for example in batch])
                advance()
        finally:
            model.train(was_training)
        return Score(loss=loss, **final_answer_scores(answers, [example.answer for example in self.examples]))

    def _loss(self, model: PeftModel, advance: Callable[[], None]) -> float:
        collate = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        total, count = 0.0, 0
        for batch in self._batches():
            inputs: Any = collate([example.features() for example in batch]).to(model.device)
            targets = int((inputs["labels"][:, 1:] != -100).sum())
            total += float(model(**inputs).loss) * targets
            count += targets
            advance()
        return total / count

    def generate(self, model: PeftModel, prompts: list[str]) -> list[str]:
        """The greedy completion of each prompt, up to the end-of-sequence token."""
        return [each.text.strip() for each in complete(model, self.tokenizer, prompts, self.max_new_tokens)]
