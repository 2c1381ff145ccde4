"""How low is the loss of who has learned nothing, or nothing but how frequent each token is?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.commands.compare.plan import code_versions, digest
from lorapro_hf.commands.compare.settings import CompareSettings, TaskSettings
from lorapro_hf.commands.compare.tasks.base import IGNORED, Task
from lorapro_hf.commands.compare.training import start_head


def levels_of(task: Task, seed: int, device: torch.device) -> dict[str, float]:
    """Test losses to read the others by.

    Args:
        task: A loaded task, which is left as it is.
        seed: Of the classifier on top, where there is one.
        device: Where the untrained model is evaluated.

    Returns:
        `untrained`: of the model before the first step. `frequencies`: of a model that gives every target its frequency
        among the targets of the training set, for tokens with one added to each token's count in the model's vocabulary
        (no context at all), for classes as they are.
    """
    model = copy.deepcopy(task.model).to(device)
    head = task.head_of(model)
    if head is not None:
        start_head(head, seed)
    untrained = task.loss(model.eval(), "test")
    return {"untrained": untrained, "frequencies": _frequency_loss(task, model)}


def level_key(settings: CompareSettings, task: TaskSettings) -> str:
    """A hash of what decides the levels of a task."""
    of_code = code_versions(settings.methods[0])
    versions = {name: of_code[name] for name in ("lorapro_hf", "python", "torch", "transformers")}
    return digest({"task": task.decides(), "seed": settings.seeds[0], "versions": versions})


def _frequency_loss(task: Task, model: Any) -> float:
    if task.head is None:
        # as wide as the scores that the loss is of
        size, added = int(model.get_output_embeddings().weight.shape[0]), 1.0
    else:
        # every class is in the training set: a task without one is refused
        size, added = int(model.get_submodule(task.head).out_features), 0.0
    counts = torch.full((size,), added, dtype=torch.float64)
    for targets in _targets(task, "train"):
        counts += torch.bincount(targets, minlength=size)
    scores = (counts / counts.sum()).log()
    held_out = torch.cat(list(_targets(task, "test")))
    return -float(scores[held_out].mean())


def _targets(task: Task, which: str) -> Iterator[Tensor]:
    """What the loss asks for, batch by batch: the next tokens that count, or the classes."""
    for batch in task.batches(which):
        labels = batch["labels"] if task.head is not None else batch["labels"][:, 1:]
        yield labels[labels != IGNORED].flatten()
