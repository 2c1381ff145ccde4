"""Classes of text, told apart by an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithPadding

from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.base import Batch, LoadedTask, to_device
from lorapro_hf.commands.compare.tasks.models import sentence_classifier
from lorapro_hf.commands.compare.tasks.sources import docstrings, table
from lorapro_hf.options import UsageError

_Rows = dict[str, list[tuple[str, str]]]


def load_classification(settings: TaskSettings) -> LoadedTask:
    """Docstrings of the standard library by the package they are from, or a text and a label column of a dataset.

    Raises:
        UsageError: for a model or data that are not there, or fewer than two classes.
    """
    rows = _rows(settings)
    labels = sorted({label for _, label in rows["train"]})
    strange = sorted({label for part in rows.values() for _, label in part} - set(labels))
    if len(labels) < 2 or strange:
        raise UsageError(
            f"Task {settings.name}: the training set has the classes {labels}, the held-out ones {strange} besides; it "
            "needs two classes or more, and all of them. Raise train_size."
        )
    model, tokenizer = sentence_classifier(settings.model, settings.layers, len(labels))
    sets = {}
    for name, part in rows.items():
        ids = tokenizer([text for text, _ in part], truncation=True, max_length=settings.max_length)["input_ids"]
        sets[name] = [
            {"input_ids": tokens, "labels": labels.index(label)} for tokens, (_, label) in zip(ids, part, strict=True)
        ]
    collate = DataCollatorWithPadding(tokenizer)

    def measure(trained: Any) -> Mapping[str, float]:
        right = sum(
            int((_logits(trained, batch).argmax(dim=-1) == batch["labels"]).sum())
            for batch in (to_device(each, trained) for each in task.batches("test"))
        )
        return {"accuracy": right / len(sets["test"])}

    task = LoadedTask(settings, model, "classifier", sets, lambda batch: dict(collate(batch)), _loss, measure)
    return task


def _rows(settings: TaskSettings) -> _Rows:
    sizes = {"train": settings.examples, "validation": settings.validation_size, "test": settings.test_size}
    if settings.dataset is None:
        rows = docstrings(settings.classes, settings.data_seed)
    else:
        columns = (settings.text_column, settings.label_column)
        rows = {
            name: [(row[columns[0]], str(row[columns[1]])) for row in part]
            for name, part in table(settings, columns).items()
        }
    return {name: part[: sizes[name]] for name, part in rows.items()}


def _logits(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()


def _loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    return cross_entropy(_logits(model, batch), batch["labels"]), len(batch["labels"])
