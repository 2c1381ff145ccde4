"""How well does a model solve the held-out problems?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import torch
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lorapro_hf.commands.common.generation import complete
from lorapro_hf.commands.demo.problems import Example

METRIC = Path(__file__).parent / "final_answer_match"


@dataclass(frozen=True)
class Score:
    """The loss a token of the held-out answers, and the shares of right and of finished answers that it generates."""

    loss: float
    exact_match: float
    answered: float


class Evaluator:
    """Scores a model on the same held-out problems again and again.

    Args:
        examples: The held-out problems.
        tokenizer: The model's.
        batch_size: Problems that are answered at a time.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        # alike lengths side by side need less padding
        self.examples = sorted(examples, key=lambda example: (len(example.prompt_ids), example.prompt))
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        # room for a wrong answer a little longer than the longest right one
        self.max_new_tokens = max(len(example.answer_ids) for example in examples) + 8
        self.metric = evaluate.load(str(METRIC), keep_in_memory=True)

    @property
    def rounds(self) -> int:
        """How often `score` calls `advance`."""
        return 2 * len(list(self._batches()))

    def _batches(self) -> Iterator[list[Example]]:
        for start in range(0, len(self.examples), self.batch_size):
            yield self.examples[start : start + self.batch_size]

    @torch.no_grad()
    def score(self, model: PeftModel, advance: Callable[[], None] = lambda: None) -> Score:
        """Score `model` as it stands, in evaluation mode; `advance` is called after every batch."""
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
        references = [example.answer for example in self.examples]
        return Score(loss=loss, **self.metric.compute(predictions=answers, references=references))

    @torch.no_grad()
    def loss(self, model: PeftModel) -> float:
        """The loss a token of the held-out answers, in evaluation mode, without generating any."""
        was_training = model.training
        model.eval()
        try:
            return self._loss(model, lambda: None)
        finally:
            model.train(was_training)

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
        """What `model` writes after each prompt, greedily, up to the end-of-sequence token."""
        return [each.text.strip() for each in complete(model, self.tokenizer, prompts, self.max_new_tokens)]
