"""Exact match of the final answer, the number after `####`, as in GSM8K."""

from __future__ import annotations

import re

import datasets
import evaluate

_FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")

_DESCRIPTION = """
The share of predictions whose final answer, the number after `####`, is the reference's. Thousands separators do not
count; everything else has to agree character by character, as in GSM8K's own evaluation. A prediction without `####`
is wrong.
"""

_INPUTS = """
Args:
    predictions (`list[str]`): generated texts.
    references (`list[str]`): reference texts, each with a final answer.

Returns:
    exact_match (`float`): the share of right answers, from 0 to 1.
    answered (`float`): the share of predictions that contain a final answer, right or wrong.

Example:
    >>> metric = evaluate.load("final_answer_match")
    >>> metric.compute(predictions=["3 + 5 = 8 apples\\n#### 8"], references=["#### 8"])
    {'exact_match': 1.0, 'answered': 1.0}
"""

_CITATION = """
@article{cobbe2021gsm8k,
  title={Training Verifiers to Solve Math Word Problems},
  author={Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and Chen, Mark and Jun, Heewoo and Kaiser, Lukasz and
          Plappert, Matthias and Tworek, Jerry and Hilton, Jacob and Nakano, Reiichiro and Hesse, Christopher and
          Schulman, John},
  journal={arXiv preprint arXiv:2110.14168},
  year={2021}
}
"""


def final_answer(text: str) -> str | None:
    """The first number after `#### ` without thousands separators, or `None` if there is none."""
    match = _FINAL_ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class FinalAnswerMatch(evaluate.Metric):
    """The metric; get it with `evaluate.load` and the path of this folder."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        expected = [final_answer(reference) for reference in references]
        if None in expected:
            missing = references[expected.index(None)]
            raise ValueError(f"The reference {missing!r} has no final answer: it must contain '#### ' and a number.")
        found = [final_answer(prediction) for prediction in predictions]
        count = len(references)
        return {
            "exact_match": sum(got == want for got, want in zip(found, expected, strict=True)) / count,
            "answered": sum(got is not None for got in found) / count,
        }
