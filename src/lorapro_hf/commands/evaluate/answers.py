"""Is a generated answer to a word problem right? The conventions of lm-evaluation-harness for GSM8K.

Two figures: `strict_match` wants the number after `#### `, `flexible_extract` takes the last number of the text.
"""

from __future__ import annotations

import re

from lorapro_hf.recipes.metrics import OfflineMetric

_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
# in this order: commas and dollars go, then what leads to the mark, then one full stop at the end
_IGNORED = tuple(re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"))
NONE = "[invalid]"


def strict_answer(text: str) -> str:
    """The first number after `#### `, or `[invalid]`."""
    found = _MARKED.search(text)
    return found.group(1) if found else NONE


def flexible_answer(text: str) -> str:
    """The last number, or what looks like one, or `[invalid]`."""
    found = _NUMBER.findall(text)
    return found[-1] if found else NONE


def normalized(text: str) -> str:
    """An answer, or a reference with its working, without what does not count when they are compared."""
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


class FinalAnswer(OfflineMetric):
    """Shares of texts whose final number is the reference's, by either way of finding it."""

    name = "final_answer"
    kind = "string"
    citation = "Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv:2110.14168, 2021."

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        right = [judge(text, reference) for text, reference in zip(predictions, references, strict=True)]
        return {name: sum(each[name] for each in right) / len(right) for name in ("strict_match", "flexible_extract")}


def judge(text: str, reference: str) -> dict[str, bool]:
    """Whether `text` has the reference's final number, by either way of finding it."""
    want = normalized(reference.strip())
    return {
        "strict_match": normalized(strict_answer(text)) == want,
        "flexible_extract": normalized(flexible_answer(text)) == want,
    }
