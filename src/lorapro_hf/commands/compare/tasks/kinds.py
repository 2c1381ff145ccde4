"""How is each kind of task loaded: its examples, its loss and its metrics?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithPadding

from lorapro_hf.commands.common.problems import encode, load_problems
from lorapro_hf.commands.common.scoring import Evaluator
from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.base import IGNORED, Batch, Features, LoadedTask, language_loss, to_device
from lorapro_hf.commands.compare.tasks.characters import load_characters
from lorapro_hf.commands.compare.tasks.digits import load_digits
from lorapro_hf.commands.compare.tasks.models import causal_model, sentence_classifier
from lorapro_hf.commands.compare.tasks.sources import docstrings, library_code, table
from lorapro_hf.options import UsageError

_MOST_FROM_ONE_TEXT = 8  # blocks: no single long text fills a set
# Messages shared with the demo name its options; a task has them as keys, one under another name.
_KEYS = {"eval_size": "validation_size or test_size"}


def load_task(settings: TaskSettings) -> LoadedTask:
    """Load the model and the data of a task; a `UsageError` names the task and the keys of the YAML."""
    try:
        return _LOADERS[settings.kind](settings)
    except UsageError as error:
        text = re.sub(r"`--(\w+) ([^`]+)`", r"`\1: \2`", str(error))
        text = re.sub(r"(?<![\w/.-])--(\w+)", lambda option: f"`{_KEYS.get(option[1], option[1])}`", text)
        text = text.replace("The demo's model", "The model of a task without `model`")
        named = re.search(rf"\btask {re.escape(settings.name)}(?![\w.-])", text, re.IGNORECASE)
        raise UsageError(text if named else f"Task {settings.name}: {text}") from error


def _load_questions(settings: TaskSettings) -> LoadedTask:
    """Arithmetic word problems, or a dataset with the columns `question` and `answer` as GSM8K has.

    The loss counts on the answers only. With `generate`, some test questions are answered greedily and the final
    numbers compared (`exact_match`).
    """
    model, tokenizer = causal_model(settings.model)
    held_out = settings.validation_size + settings.test_size
    train, rest = load_problems(
        settings.examples, held_out, settings.data_seed, settings.dataset, settings.dataset_config
    )
    examples = encode(rest, tokenizer, settings.max_length)
    if len(examples) < 2:
        raise UsageError(f"Task {settings.name}: too few held-out questions of at most {settings.max_length} tokens.")
    # in the same proportion where long ones had to go
    cut = max(1, len(examples) * settings.validation_size // held_out)
    parts = {"train": encode(train, tokenizer, settings.max_length), "validation": examples[:cut]}
    parts["test"] = examples[cut:]
    sets: Mapping[str, Sequence[Features]] = {name: [each.features() for each in part] for name, part in parts.items()}
    task = LoadedTask(settings, model, None, sets, _padded, language_loss)
    if asked := parts["test"][: settings.generate]:
        evaluator = Evaluator(asked, tokenizer)
        task.measure = lambda trained: {"exact_match": evaluator.answer_scores(trained)["exact_match"]}
    return task


def _padded(batch: Sequence[Features]) -> Batch:
    """The examples as rows of one length; a masked place may hold any token."""
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: pad_sequence([torch.tensor(each[name]) for each in batch], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def _load_text(settings: TaskSettings) -> LoadedTask:
    """Modules of Python's standard library, whole packages held out, or a text column of a dataset.

    Each text is cut into blocks of `max_length` tokens; the rest at its end is not used.
    """
    model, tokenizer = causal_model(settings.model)
    if settings.dataset is None:
        texts: Mapping[str, Iterable[str]] = library_code(settings.data_seed)
    else:
        texts = {name: part[settings.text_column] for name, part in table(settings, (settings.text_column,)).items()}
    sets = {
        name: _blocks(texts[name], tokenizer, settings.max_length, count) for name, count in _sizes(settings).items()
    }
    for name, blocks in sets.items():
        if not blocks:
            raise UsageError(f"Task {settings.name}: no text for {name} has {settings.max_length} tokens.")
    return LoadedTask(settings, model, None, sets, _stacked, language_loss)


def _sizes(settings: TaskSettings) -> dict[str, int]:
    return {"validation": settings.validation_size, "test": settings.test_size, "train": settings.examples}


def _blocks(texts: Iterable[str], tokenizer: Any, length: int, count: int) -> list[Features]:
    blocks: list[Features] = []
    for text in texts:
        ids = tokenizer(text[: 12 * length * _MOST_FROM_ONE_TEXT], add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - length + 1, length)[:_MOST_FROM_ONE_TEXT]
        blocks += [{"input_ids": ids[start : start + length]} for start in starts]
        if len(blocks) >= count:
            break
    return blocks[:count]


def _stacked(batch: Sequence[Features]) -> Batch:
    ids = torch.tensor([example["input_ids"] for example in batch])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _load_classification(settings: TaskSettings) -> LoadedTask:
    """Docstrings of the standard library by the package they are from, or a text and a label column of a dataset."""
    if settings.dataset is None:
        rows = docstrings(settings.classes, settings.data_seed)
    else:
        text, label = columns = (settings.text_column, settings.label_column)
        rows = {name: [(row[text], str(row[label])) for row in part] for name, part in table(settings, columns).items()}
    rows = {name: rows[name][:count] for name, count in _sizes(settings).items()}
    labels = sorted({label for _, label in rows["train"]})
    strange = sorted({label for part in rows.values() for _, label in part} - set(labels))
    if len(labels) < 2 or strange:
        lacks = f"has the classes {labels} and lacks {strange}; it needs all of them, at least two. Raise train_size."
        raise UsageError(f"Task {settings.name}: the training set {lacks}")
    model, tokenizer = sentence_classifier(settings.model, len(labels))
    sets = {}
    for name, part in rows.items():
        ids = tokenizer([text for text, _ in part], truncation=True, max_length=settings.max_length)["input_ids"]
        classes = [labels.index(label) for _, label in part]
        sets[name] = [{"input_ids": each, "labels": label} for each, label in zip(ids, classes, strict=True)]
    collate = DataCollatorWithPadding(tokenizer)
    task = LoadedTask(settings, model, "classifier", sets, lambda batch: dict(collate(batch)), _class_loss)

    def accuracy(trained: Any) -> Mapping[str, float]:
        batches = [to_device(batch, trained) for batch in task.batches("test")]
        right = sum(int((_logits(trained, each).argmax(dim=-1) == each["labels"]).sum()) for each in batches)
        return {"accuracy": right / len(sets["test"])}

    task.measure = accuracy
    return task


def _logits(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()


def _class_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    return cross_entropy(_logits(model, batch), batch["labels"]), len(batch["labels"])


_LOADERS: Mapping[str, Callable[[TaskSettings], LoadedTask]] = {
    "questions": _load_questions,
    "text": _load_text,
    "classification": _load_classification,
    "characters": load_characters,
    "digits": load_digits,
}
