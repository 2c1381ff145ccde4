"""Which task is the adapter for, and how does someone load it with PEFT alone?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.models.auto import modeling_auto

_GENERATE = """\
inputs = {processor}("{example}", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print({processor}.decode(output[0], skip_special_tokens=True))"""
_CHAT = """\
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = {processor}.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens=64)
print({processor}.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_CLASSIFY = """\
inputs = {processor}("{example}", return_tensors="pt")
logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])"""
_SCORE = """\
inputs = {processor}("{example}", return_tensors="pt")
print(model(**inputs).logits.item())"""
_TAG = """\
inputs = {processor}("{example}", return_tensors="pt")
print([model.config.id2label[label] for label in model(**inputs).logits[0].argmax(-1).tolist()])"""
_IMAGE = """\
from PIL import Image

inputs = {processor}(Image.open("picture.png").convert("RGB"), return_tensors="pt")
logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])"""
_AUDIO = """\
import soundfile

sound, rate = soundfile.read("speech.wav")  # one channel, at the rate of the model
inputs = {processor}(sound, sampling_rate=rate, return_tensors="pt")"""
_TRANSCRIBE = (
    _AUDIO
    + """
print({processor}.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])"""
)
_CTC = (
    _AUDIO
    + """
print({processor}.batch_decode(model(**inputs).logits.argmax(-1))[0])"""
)
_HEAR = (
    _AUDIO
    + """
print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])"""
)


@dataclass(frozen=True)
class Task:
    """A kind of model as transformers and the Hub name it.

    Args:
        tag: the Hub's name of the task, `None` where there is none.
        name: the same in words.
        auto_class: what loads the base model.
        processor_class: what prepares its inputs, `None` where that is not known.
        example: code that runs the model, in which `{processor}` stands for the processor.
        has_labels: whether the head depends on the number of labels, which the base model does not know.
    """

    tag: str | None
    name: str
    auto_class: str
    processor_class: str | None = None
    example: str = ""
    has_labels: bool = False


_TEXT, _IMAGES = "AutoTokenizer", "AutoImageProcessor"
# By the table in which transformers lists a model's class; the first that has it counts.
_TASKS = {
    "CAUSAL_LM": Task("text-generation", "Text Generation", "AutoModelForCausalLM", _TEXT, _GENERATE),
    "IMAGE_TEXT_TO_TEXT": Task(
        "image-text-to-text", "Image-Text-to-Text", "AutoModelForImageTextToText", "AutoProcessor"
    ),
    "SPEECH_SEQ_2_SEQ": Task(
        "automatic-speech-recognition", "Speech Recognition", "AutoModelForSpeechSeq2Seq", "AutoProcessor", _TRANSCRIBE
    ),
    "CTC": Task("automatic-speech-recognition", "Speech Recognition", "AutoModelForCTC", "AutoProcessor", _CTC),
    "SEQ_TO_SEQ_CAUSAL_LM": Task(
        "text2text-generation", "Text-to-Text Generation", "AutoModelForSeq2SeqLM", _TEXT, _GENERATE
    ),
    "SEQUENCE_CLASSIFICATION": Task(
        "text-classification", "Text Classification", "AutoModelForSequenceClassification", _TEXT, _CLASSIFY, True
    ),
    "TOKEN_CLASSIFICATION": Task(
        "token-classification", "Token Classification", "AutoModelForTokenClassification", _TEXT, _TAG, True
    ),
    "QUESTION_ANSWERING": Task(
        "question-answering", "Question Answering", "AutoModelForQuestionAnswering", _TEXT
    ),
    "MULTIPLE_CHOICE": Task("multiple-choice", "Multiple Choice", "AutoModelForMultipleChoice", _TEXT),
    "MASKED_LM": Task("fill-mask", "Fill-Mask", "AutoModelForMaskedLM", _TEXT),
    "IMAGE_CLASSIFICATION": Task(
        "image-classification", "Image Classification", "AutoModelForImageClassification", _IMAGES, _IMAGE, True
    ),
    "ZERO_SHOT_IMAGE_CLASSIFICATION": Task(
        "zero-shot-image-classification",
        "Zero-Shot Image Classification",
        "AutoModelForZeroShotImageClassification",
        "AutoProcessor",
    ),
    "AUDIO_CLASSIFICATION": Task(
        "audio-classification", "Audio Classification", "AutoModelForAudioClassification", "AutoFeatureExtractor",
        _HEAR, True,
    ),
}  # fmt: skip

# checkpoints for these tasks have heads of their own sizes, which the adapter's head replaces
_NEW_HEADS = ("AutoModelForCTC", "AutoModelForImageClassification", "AutoModelForAudioClassification")


def base_of(model: Any) -> Any:
    """The model inside PEFT's wrapper, with the adapter in it; the model itself where there is no wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def task_of(model: Any) -> Task:
    """The task that a PEFT model's base is for, told by its class."""
    base = base_of(model)
    for table, task in _TASKS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})
        listed = {name for each in names.values() for name in ([each] if isinstance(each, str) else each)}
        if any(cls.__name__ in listed for cls in type(base).__mro__):
            return task
    name, is_public = class_name(base)
    return Task(None, name, name if is_public else "")


def class_name(model: Any) -> tuple[str, bool]:
    """The name of a model's class, and whether transformers exports it; wrapping subclasses (FSDP2's) do not count."""
    import transformers

    for cls in type(model).__mro__:
        if cls.__module__.startswith("transformers.models.") and hasattr(transformers, cls.__name__):
            return cls.__name__, True
    return type(model).__name__, False


@dataclass(frozen=True)
class Source:
    """From where the parts are loaded.

    Args:
        base: name or path of the base model, `None` where that is only known on the machine of the training.
        adapter: name or path of the folder with the adapter.
        subfolder: where in it the adapter lies, "" for the folder itself.
        processor: whether the folder holds the processor too.
    """

    base: str | None
    adapter: str
    subfolder: str = ""
    processor: bool = True


def loading_snippet(model: Any, task: Task, source: Source, processor: Any = None) -> str:
    """Python code that loads base model and adapter with transformers and PEFT, and runs them once.

    Args:
        model: the PEFT model.
        task: from `task_of(model)`.
        source: from where.
        processor: the tokenizer or other processor of the training, if known.
    """
    base = base_of(model)
    labels = f", num_labels={base.config.num_labels}" if task.has_labels else ""
    if task.auto_class == "AutoModelForCTC":  # the head has a place for each letter of the training set
        labels = f", vocab_size={base.config.vocab_size}"
    if task.auto_class in _NEW_HEADS:
        labels += ", ignore_mismatched_sizes=True"
    lines = [f'adapter = "{source.adapter}"']
    if task.auto_class:
        imported = sorted(filter(None, [task.auto_class, task.processor_class]))
        lines = ["from peft import PeftModel", f"from transformers import {', '.join(imported)}", "", *lines]
        place = f'"{source.base}"' if source.base else '"path/to/the/base/model"'
        lines += [f"base_model = {task.auto_class}.from_pretrained({place}{labels})"]
    else:
        lines = ["from peft import PeftModel", "", *lines]
        lines += [f"base_model = ...  # the {class_name(base)[0]} that was trained"]
    subfolder = f', subfolder="{source.subfolder}"' if source.subfolder else ""
    lines += [f"model = PeftModel.from_pretrained(base_model, adapter{subfolder}).eval()"]
    if task.processor_class:
        variable = {"AutoTokenizer": "tokenizer", "AutoFeatureExtractor": "extractor"}.get(
            task.processor_class, "processor"
        )
        place = "adapter" if source.processor else (f'"{source.base}"' if source.base else '"path/to/the/base/model"')
        lines += [f"{variable} = {task.processor_class}.from_pretrained({place})"]
        lines += _example(base, task, variable, processor)
    return "\n".join(lines)


def _example(base: Any, task: Task, variable: str, processor: Any) -> list[str]:
    example = task.example
    if example == _GENERATE and getattr(processor, "chat_template", None):
        example = _CHAT
    if task.has_labels and example == _CLASSIFY and base.config.num_labels == 1:
        example = _SCORE
    return ["", example.format(processor=variable, example="Your text")] if example else []
