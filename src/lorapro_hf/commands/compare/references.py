"""Reference losses: the untrained model and a unigram model."""

from __future__ import annotations

import copy

import torch

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
    untrained = task.loss(model.eval(), "test")
    if task.head is None:
        size, added = int(model.get_output_embeddings().weight.shape[0]), 1.0
    else:  # every class is in the training set: a task without one is refused
        size, added = int(model.get_submodule(task.head).out_features), 0.0
    targets = {}
    for which in ("train", "test"):
        labels = [batch["labels"] for batch in task.batches(which)]
        labels = [each[:, 1:] if each.dim() > 1 else each for each in labels]  # next tokens, or classes
        targets[which] = torch.cat([each[each != IGNORED] for each in labels])
    counts = torch.bincount(targets["train"], minlength=size).double() + added
    scores = (counts / counts.sum()).log()
    return {"untrained": untrained, "frequencies": -float(scores[targets["test"]].mean())}


def references_key(settings: CompareSettings, task: TaskSettings) -> str:
    """A hash of the settings and versions that decide the reference losses of a task."""
    versions = code_versions(settings.methods[0])
    versions = {name: versions[name] for name in ("lorapro_hf", "python", "torch", "transformers")}
    return digest({"task": task.decides(), "seed": settings.seeds[0], "versions": versions})
