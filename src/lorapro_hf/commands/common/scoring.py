"""How well does a model solve the held-out problems, and how does it answer many at a time?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from lorapro_hf.commands.common.problems import Example
from lorapro_hf.options import UsageError

_FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def final_answer_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The fractions of predictions with the reference's final answer (`exact_match`) and with any (`answered`).

    As in GSM8K's own evaluation, thousands separators do not count and every other character does.

    Raises:
        ValueError: a reference has no final answer.
    """
    expected = [_final_answer(reference) for reference in references]
    if None in expected:
        missing = references[expected.index(None)]
        raise ValueError(f"The reference {missing!r} has no final answer: it must contain '#### ' and a number.")
    given = [_final_answer(prediction) for prediction in predictions]
    return {
        "exact_match": sum(got == want for got, want in zip(given, expected, strict=True)) / len(references),
        "answered": sum(got is not None for got in given) / len(references),
    }


def _final_answer(text: str) -> str | None:
    match = _FINAL_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


class Evaluator:
    """Scores models on the same held-out problems, some of them (`batch_size`) at a time."""

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> None:
        # problems of similar length in a batch need less padding
        self.examples = sorted(examples, key=lambda example: (len(example.prompt_ids), example.prompt))
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        # a wrong answer may be a little longer than the longest right one
        self.max_new_tokens = max(len(example.answer_ids) for example in examples) + 8

    def _batches(self) -> Iterator[list[Example]]:
        for start in range(0, len(self.examples), self.batch_size):
            yield self.examples[start : start + self.batch_size]

    @torch.no_grad()
    def loss(self, model: PeftModel) -> float:
        """The mean loss over the tokens of the answers; `model` is left in evaluation mode."""
        model.eval()
        collate = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        total, count = 0.0, 0
        for batch in self._batches():
            inputs: Any = collate([example.features() for example in batch]).to(model.device)
            targets = int((inputs["labels"][:, 1:] != -100).sum())
            total += float(model(**inputs).loss) * targets
            count += targets
        return total / count

    def answer_scores(self, model: Any) -> dict[str, float]:
        """The `final_answer_scores` of generated answers."""
        answers = [text for batch in self._batches() for text in self.generate(model, [each.prompt for each in batch])]
        return final_answer_scores(answers, [example.answer for example in self.examples])

    def generate(self, model: PeftModel, prompts: list[str]) -> list[str]:
        """The greedy completion of each prompt, up to the end-of-sequence token."""
        return [text.strip() for text in complete(model, self.tokenizer, prompts, self.max_new_tokens)]


@torch.no_grad()
def complete(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """A greedy completion of each prompt, without the end-of-sequence token; one batch, padded on the left.

    Raises:
        UsageError: neither tokenizer nor model names an end-of-sequence token.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # a checkpoint's own settings may ask for a penalty, which is not greedy
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(output, skip_special_tokens=True)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-sequence tokens of the tokenizer and of the model's generation settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise UsageError("neither tokenizer nor model names an end-of-sequence token: set `tokenizer.eos_token`.")
    return sorted(int(end) for end in ends)
