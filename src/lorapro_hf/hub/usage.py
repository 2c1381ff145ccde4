"""Which task is the adapter for, and how does someone load it with PEFT alone?"""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from transformers.models.auto import modeling_auto

_SPEECH = "automatic-speech-recognition"


class Task(NamedTuple):
    """The Hub's tag of a task, the transformers classes that load model and inputs, and the template's example."""

    tag: str | None
    auto_class: str = ""
    processor_class: str = ""
    example: str = ""


# By the table in which transformers lists a model's class; the first table that has it counts.
_TASKS = {
    "CAUSAL_LM": Task("text-generation", "AutoModelForCausalLM", "AutoTokenizer", "generate"),
    "IMAGE_TEXT_TO_TEXT": Task("image-text-to-text", "AutoModelForImageTextToText", "AutoProcessor"),
    "SPEECH_SEQ_2_SEQ": Task(_SPEECH, "AutoModelForSpeechSeq2Seq", "AutoProcessor", "transcribe"),
    "CTC": Task(_SPEECH, "AutoModelForCTC", "AutoProcessor", "ctc"),
    "SEQ_TO_SEQ_CAUSAL_LM": Task("text2text-generation", "AutoModelForSeq2SeqLM", "AutoTokenizer", "generate"),
    "SEQUENCE_CLASSIFICATION": Task(
        "text-classification", "AutoModelForSequenceClassification", "AutoTokenizer", "classify"
    ),
    "TOKEN_CLASSIFICATION": Task("token-classification", "AutoModelForTokenClassification", "AutoTokenizer", "tag"),
    "QUESTION_ANSWERING": Task("question-answering", "AutoModelForQuestionAnswering", "AutoTokenizer"),
    "MULTIPLE_CHOICE": Task("multiple-choice", "AutoModelForMultipleChoice", "AutoTokenizer"),
    "MASKED_LM": Task("fill-mask", "AutoModelForMaskedLM", "AutoTokenizer"),
    "IMAGE_CLASSIFICATION": Task(
        "image-classification", "AutoModelForImageClassification", "AutoImageProcessor", "image"
    ),
    "ZERO_SHOT_IMAGE_CLASSIFICATION": Task(
        "zero-shot-image-classification", "AutoModelForZeroShotImageClassification", "AutoProcessor"
    ),
    "AUDIO_CLASSIFICATION": Task(
        "audio-classification", "AutoModelForAudioClassification", "AutoFeatureExtractor", "sound"
    ),
}


def base_of(model: Any) -> Any:
    """Return the model inside PEFT's wrapper, with the adapter in it; the model itself if there is no wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def task_of(model: Any) -> Task:
    """Return the task of a PEFT model, which the class of its base tells."""
    names = {cls.__name__ for cls in type(base_of(model)).__mro__}
    for table, task in _TASKS.items():
        for listed in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).values():
            if names & ({listed} if isinstance(listed, str) else set(listed)):
                return task
    name, is_public = class_name(base_of(model))
    return Task(None, name if is_public else "")


def class_name(model: Any) -> tuple[str, bool]:
    """Return the name of a model's class, and whether transformers exports it; FSDP2's subclasses do not count."""
    for cls in type(model).__mro__:
        if cls.__module__.startswith("transformers.models.") and hasattr(transformers, cls.__name__):
            return cls.__name__, True
    return type(model).__name__, False


def loading_values(model: Any, processor: Any = None) -> dict[str, Any]:
    """Return the template's values for the code that loads a PEFT model and runs it once.

    Args:
        model: The PEFT model.
        processor: The tokenizer or other processor of the training, if there is one.
    """
    base, task = base_of(model), task_of(model)
    example, options = task.example, ""
    if example == "ctc":  # the head has a place for each letter of the training set
        options = f", vocab_size={base.config.vocab_size}"
    elif example in ("classify", "tag", "image", "sound"):  # the base model does not know the labels
        options = f", num_labels={base.config.num_labels}"
    if example in ("ctc", "image", "sound"):  # base checkpoints have heads of other sizes
        options += ", ignore_mismatched_sizes=True"
    if example == "generate" and getattr(processor, "chat_template", None):
        example = "chat"
    if example == "classify" and base.config.num_labels == 1:
        example = "score"
    variables = {"AutoTokenizer": "tokenizer", "AutoFeatureExtractor": "extractor"}
    return {
        "task": task,
        "base_class": class_name(base)[0],
        "options": options,
        "example": example,
        "processor": variables.get(task.processor_class, "processor"),
        "has_processor": processor is not None,
    }
