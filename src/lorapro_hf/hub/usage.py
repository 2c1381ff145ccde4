"""Which task is the adapter for, and how does someone load it with PEFT alone?"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.models.auto import modeling_auto


class Task(NamedTuple):
    """A kind of model.

    Args:
        tag: the Hub's name of the task, `None` if it has none.
        auto_class: the class of transformers that loads the base model, "" if there is none.
        processor_class: the class that prepares inputs, "" if it is not known.
        example: the template's example of use, "" for none.
    """

    tag: str | None
    auto_class: str
    processor_class: str = ""
    example: str = ""

    @property
    def has_labels(self) -> bool:
        """Whether the head depends on the number of labels, which the base model does not know."""
        return self.example in ("classify", "tag", "image", "sound")


_SPEECH = "automatic-speech-recognition"
_ZERO_SHOT = "zero-shot-image-classification"
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
    "ZERO_SHOT_IMAGE_CLASSIFICATION": Task(_ZERO_SHOT, "AutoModelForZeroShotImageClassification", "AutoProcessor"),
    "AUDIO_CLASSIFICATION": Task(
        "audio-classification", "AutoModelForAudioClassification", "AutoFeatureExtractor", "sound"
    ),
}


def base_of(model: Any) -> Any:
    """The model inside PEFT's wrapper, with the adapter in it; the model itself if there is no wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def task_of(model: Any) -> Task:
    """The task of a PEFT model, which the class of its base tells."""
    base = base_of(model)
    for table, task in _TASKS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})
        listed = {name for each in names.values() for name in ([each] if isinstance(each, str) else each)}
        if any(cls.__name__ in listed for cls in type(base).__mro__):
            return task
    name, is_public = class_name(base)
    return Task(None, name if is_public else "")


def class_name(model: Any) -> tuple[str, bool]:
    """The name of a model's class, and whether transformers exports it; wrapping subclasses (FSDP2's) do not count."""
    import transformers

    for cls in type(model).__mro__:
        if cls.__module__.startswith("transformers.models.") and hasattr(transformers, cls.__name__):
            return cls.__name__, True
    return type(model).__name__, False


def loading_values(model: Any, processor: Any = None) -> dict[str, Any]:
    """The template's values for the code that loads base model and adapter and runs them once.

    Args:
        model: the PEFT model.
        processor: the tokenizer or other processor of the training, if known.
    """
    base, task = base_of(model), task_of(model)
    options = f", num_labels={base.config.num_labels}" if task.has_labels else ""
    if task.example == "ctc":  # the head has a place for each letter of the training set
        options = f", vocab_size={base.config.vocab_size}"
    if task.example in ("ctc", "image", "sound"):  # base checkpoints have heads of other sizes
        options += ", ignore_mismatched_sizes=True"
    example = task.example
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
