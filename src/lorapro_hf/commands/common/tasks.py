"""Which tasks can a base model be for?"""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    """The class of transformers that loads such models, and PEFT's name of the task, `None` if it has none."""

    auto_class: str
    peft_name: str | None


# In the order in which they are tried for a model that several would load.
TASKS = {
    "causal-lm": Task("AutoModelForCausalLM", "CAUSAL_LM"),
    "seq2seq-lm": Task("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "sequence-classification": Task("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token-classification": Task("AutoModelForTokenClassification", "TOKEN_CLS"),
    "question-answering": Task("AutoModelForQuestionAnswering", "QUESTION_ANS"),
    "image-classification": Task("AutoModelForImageClassification", None),
    "image-text-to-text": Task("AutoModelForImageTextToText", None),
    "speech-seq2seq": Task("AutoModelForSpeechSeq2Seq", None),
    "ctc": Task("AutoModelForCTC", None),
    "masked-lm": Task("AutoModelForMaskedLM", None),
    "feature-extraction": Task("AutoModel", "FEATURE_EXTRACTION"),
}
