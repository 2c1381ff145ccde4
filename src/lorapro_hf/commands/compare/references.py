"""Reference losses: the untrained model and a unigram model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.commands.compare.plan import code_versions, digest
from lorapro_hf.commands.compare.settings import CompareSettings, TaskSettings
from lorapro_hf.commands.compare.tasks.base import IGNORED, LoadedTask


def reference_losses(task: LoadedTask, seed: int, device: torch.device) -> dict[str, float]:
    """Test losses of two models that have learned nothing from their inputs.

    Returns:
        `untrained`: of the model before the first step, its classifier drawn from `seed`. `frequencies`: of a unigram
        model, which gives every target its frequency among the targets of the training set, for tokens with one added
        to each token's count.
    """
    model = copy.deepcopy(task.model).to(device)
    task.start_head(model, seed)
    return {"untrained": task.loss(model.eval(), "test"), "frequencies": _unigram_loss(task, model)}


def references_key(settings: CompareSettings, task: TaskSettings) -> str:
    """A hash of the settings and versions that decide the reference losses of a task."""
    versions = code_versions(settings.methods[0])
    versions = {name: versions[name] for name in ("lorapro_hf", "python", "torch", "transformers")}
    return digest({"task": task.decides(), "seed": settings.seeds[0], "versions": versions})


def _unigram_loss(task: LoadedTask, model: Any) -> float:
    if task.head is None:
        size, added = int(model.get_output_embeddings().weight.shape[0]), 1.0
    else:  # every class is in the training set: a task without one is refused
        size, added = int(model.get_submodule(task.head).out_features), 0.0
    counts = torch.full((size,), added, dtype=torch.float64)
    for targets in _targets(task, "train"):
        counts += torch.bincount(targets, minlength=size)
    scores = (counts / counts.sum()).log()
    return -float(scores[torch.cat(list(_targets(task, "test")))].mean())


def _targets(task: LoadedTask, which: str) -> Iterator[Tensor]:
    """The targets of the loss, batch by batch: the next tokens that count, or the classes."""
    for batch in task.batches(which):
        labels = batch["labels"] if task.head is not None else batch["labels"][:, 1:]
        yield labels[labels != IGNORED].flatten()
