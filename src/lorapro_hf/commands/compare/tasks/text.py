"""Language modeling on running text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.base import Batch, Features, LoadedTask, language_loss
from lorapro_hf.commands.compare.tasks.models import causal_model
from lorapro_hf.commands.compare.tasks.sources import library_code, table
from lorapro_hf.commands.compare.tasks.vocabulary import cut_vocabulary
from lorapro_hf.options import UsageError

_MOST_FROM_ONE_TEXT = 8  # blocks: no single long text fills a set


def load_text(settings: TaskSettings) -> LoadedTask:
    """Modules of Python's standard library, whole modules held out, or a text column of a dataset.

    Each text is cut into blocks of `max_length` tokens; the rest at its end is not used.

    Raises:
        UsageError: for a model or data that are not there, or too little text.
    """
    model, tokenizer = causal_model(settings.model, settings.layers)
    wanted = {"train": settings.examples, "validation": settings.validation_size, "test": settings.test_size}
    if settings.dataset is None:
        texts: Any = library_code(settings.data_seed)
    else:
        rows = table(settings, (settings.text_column,))
        texts = {name: [row[settings.text_column] for row in part] for name, part in rows.items()}
    sets = {name: _blocks(texts[name], tokenizer, settings.max_length, wanted[name]) for name in ("validation", "test")}
    # longer trainings see them again
    sets["train"] = _blocks(texts["train"], tokenizer, settings.max_length, wanted["train"])
    for name, blocks in sets.items():
        if not blocks:
            raise UsageError(f"Task {settings.name}: no text for {name} has {settings.max_length} tokens.")
    if settings.cut_vocabulary:
        sets = cut_vocabulary(model, sets)
    return LoadedTask(settings, model, None, sets, _stack, language_loss, lambda trained: {})


def _blocks(texts: Iterable[str], tokenizer: Any, length: int, count: int) -> list[Features]:
    blocks: list[Features] = []
    for text in texts:
        ids = tokenizer(text[: 12 * length * _MOST_FROM_ONE_TEXT], add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - length + 1, length)[:_MOST_FROM_ONE_TEXT]
        blocks += [{"input_ids": ids[start : start + length]} for start in starts]
        if len(blocks) >= count:
            break
    return blocks[:count]


def _stack(batch: list[Features]) -> Batch:
    ids = torch.tensor([example["input_ids"] for example in batch])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
