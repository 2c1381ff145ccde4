"""Handwritten digits: a small ViT is pretrained on half of scikit-learn's, and learns the rest and inverted images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.base import Batch, LoadedTask, Rows, to_device
from lorapro_hf.commands.compare.tasks.pretrained import pretrained
from lorapro_hf.options import UsageError, require_packages

SIDE, PATCH, CLASSES = 8, 2, 10
_PRETRAINING_BATCH = 64
_HEAD_WIDTH = 16


class DigitsModel(ViTForImageClassification):
    """A ViT whose classifier counts as its output layer, which no method adapts: it stays as it was pretrained."""

    def get_output_embeddings(self) -> nn.Module:
        """The classifier."""
        return self.classifier


def load_digits(settings: TaskSettings) -> LoadedTask:
    """The model after its pretraining; images that it has not seen, each also in inverted grey values.

    `data_seed` decides which half is for the pretraining, and which images of the other half are held out. The
    metrics are the accuracy on the test set, and on its originals and its inverted images alone.
    """
    first, second = _halves(settings.data_seed)
    sizes = {"validation": settings.validation_size, "test": settings.test_size}
    if odd := [f"{name}_size={size}" for name, size in sizes.items() if size % 2]:
        raise UsageError(f"Task {settings.name}: {', '.join(odd)} must be even: each image is there in two forms.")
    images = len(second) - sum(sizes.values()) // 2
    if images < 1 or (settings.train_size or 2) // 2 > images:
        rows = f"{2 * len(second)} images for training, validation and test"
        raise UsageError(f"Task {settings.name}: there are {rows}. Lower train_size, validation_size or test_size.")
    sizes["train"] = settings.train_size or 2 * images
    sets, start = {}, 0
    for name, size in sizes.items():
        stop = start + (size + 1) // 2
        sets[name] = _both_forms(second[start:stop])[:size]
        start = stop
    task = LoadedTask(settings, _model(settings, first), None, sets, Rows.collate, _loss, held_out_batch=500)

    def accuracy(trained: Any) -> Mapping[str, float]:
        right = torch.cat([_right(trained, to_device(batch, trained)) for batch in task.batches("test")])
        originals, inverted = right.float().chunk(2)
        shares = {"accuracy": right.float(), "accuracy_original": originals, "accuracy_inverted": inverted}
        return {name: float(share.mean()) for name, share in shares.items()}

    task.measure = accuracy
    return task


def _halves(seed: int) -> tuple[Rows, Rows]:
    """All images, from -1 to 1, in an order that the seed decides, in two halves."""
    require_packages("A task of kind digits", "sklearn", extra="demo")
    from sklearn.datasets import load_digits as read

    digits = read()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = (torch.from_numpy(digits.images).float() / 8.0 - 1.0).unsqueeze(1)[order]
    rows = Rows({"pixel_values": images, "labels": torch.from_numpy(digits.target).long()[order]})
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def _both_forms(rows: Rows) -> Rows:
    """The images, and then their negatives."""
    images, labels = rows.columns["pixel_values"], rows.columns["labels"]
    return Rows({"pixel_values": torch.cat([images, -images]), "labels": labels.repeat(2)})


def _loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    logits = model(pixel_values=batch["pixel_values"]).logits
    return cross_entropy(logits.float(), batch["labels"]), len(batch["labels"])


def _right(model: Any, batch: Batch) -> Tensor:
    return model(pixel_values=batch["pixel_values"]).logits.argmax(dim=-1) == batch["labels"]


def _model(settings: TaskSettings, rows: Rows) -> Any:
    width = settings.width
    if width % _HEAD_WIDTH:
        raise UsageError(f"Task {settings.name}: width={width} must be a multiple of {_HEAD_WIDTH}.")
    size = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": width // _HEAD_WIDTH,
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_channels": 1,
        "num_labels": CLASSES,
    }
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "tie_word_embeddings": False}

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(settings.pretraining_steps):
            chosen = torch.randint(len(rows), (_PRETRAINING_BATCH,), generator=generator)
            yield {name: column[chosen] for name, column in rows.columns.items()}

    facts = {**size, "batch": _PRETRAINING_BATCH, "steps": settings.pretraining_steps, "learning_rate": 1e-3}
    facts["data_seed"] = settings.data_seed
    return pretrained("digits", lambda: DigitsModel(ViTConfig(**size, **plain)), facts, batches, _loss)
