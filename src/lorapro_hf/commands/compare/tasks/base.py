"""A loaded task: model, data, loss and metrics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorapro_hf.commands.compare.settings import TaskSettings

Features = Mapping[str, Any]
Batch = dict[str, Tensor]
IGNORED = -100


@dataclass(frozen=True)
class Rows(Sequence[Features]):
    """Examples of one shape in a tensor for each name, the rows of which are the examples."""

    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: Any) -> Any:
        rows = {name: column[index] for name, column in self.columns.items()}
        return Rows(rows) if isinstance(index, slice) else rows  # a list of indices gives a batch

    @staticmethod
    def collate(examples: Sequence[Features]) -> Batch:
        """The examples as one batch."""
        if isinstance(examples, Rows):
            return dict(examples.columns)
        return {name: torch.stack([each[name] for each in examples]) for name in examples[0]}


@dataclass
class LoadedTask:
    """A task that is loaded. Held-out examples are in two sets: one decides on the learning rate, one is reported."""

    settings: TaskSettings
    model: Any  # pretrained, never trained: each run trains a copy
    head: str | None  # name of the module that every method trains in full
    sets: Mapping[str, Sequence[Features]]  # "train", "validation" and "test"
    collate: Callable[[Sequence[Features]], Batch]
    loss_of: Callable[[Any, Batch], tuple[Tensor, int]]  # of a model on a batch: the mean, and of how many targets
    measure: Callable[[Any], Mapping[str, float]] = lambda model: {}  # metrics on the test set, its loss if at hand
    held_out_batch: int | None = None  # examples of a batch that needs no gradients; None for twice the batch size

    @cached_property
    def digest(self) -> str:
        """A hash of all examples of all sets, targets included: equal for runs on the same data."""
        content = hashlib.sha256()
        for name in sorted(self.sets):
            content.update(f"{name} {len(self.sets[name])}".encode())
            for example in self.sets[name]:
                for key in sorted(example):
                    values = torch.as_tensor(example[key]).contiguous()
                    content.update(f"{key} {values.dtype} {list(values.shape)}".encode())
                    content.update(values.numpy().tobytes())
        return content.hexdigest()[:16]

    def start_head(self, model: nn.Module, seed: int) -> nn.Module | None:
        """The module of `model` that every method trains in full, with the initial values of the seed."""
        if self.head is None:
            return None
        head = model.get_submodule(self.head)
        torch.manual_seed(seed)
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return head

    @torch.no_grad()
    def loss(self, model: Any, which: str) -> float:
        """The mean loss over the targets of a set; `model` is in evaluation mode."""
        total, count = 0.0, 0
        for batch in self.batches(which):
            loss, targets = self.loss_of(model, to_device(batch, model))
            total += float(loss) * targets
            count += targets
        return total / count

    @torch.no_grad()
    def score(self, model: Any) -> dict[str, dict[str, float]]:
        """The loss on the validation set, and all metrics on the test set; `model` is left in evaluation mode."""
        model.eval()
        measured = self.measure(model)
        test = dict(measured) if "loss" in measured else {"loss": self.loss(model, "test"), **measured}
        return {"validation": {"loss": self.loss(model, "validation")}, "test": test}

    def batch(self, indices: list[int]) -> Batch:
        """The batch of some training examples."""
        examples = self.sets["train"]
        if isinstance(examples, Rows):
            return dict(examples[indices])
        return self.collate([examples[index] for index in indices])

    def batches(self, which: str) -> Iterator[Batch]:
        """The examples of a set in batches of similar lengths."""
        examples = self.sets[which]
        if not isinstance(examples, Rows):
            examples = sorted(examples, key=lambda example: len(example["input_ids"]))
        size = self.held_out_batch or 2 * self.settings.batch_size  # there are no gradients to keep
        for start in range(0, len(examples), size):
            yield self.collate(examples[start : start + size])

    def order(self, seed: int) -> list[list[int]]:
        """The indices of the training examples of each step of the longest run: the same for all methods of a seed."""
        generator, size = torch.Generator().manual_seed(seed), self.settings.batch_size
        wanted = self.settings.longest * size
        indices: list[int] = []
        while len(indices) < wanted:
            indices += torch.randperm(len(self.sets["train"]), generator=generator).tolist()
        return [indices[start : start + size] for start in range(0, wanted, size)]


def to_device(batch: Batch, model: Any) -> Batch:
    """The batch on the device of the model."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def language_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The mean loss of the next tokens that count, and their number."""
    inputs, targets = next_tokens(batch)
    logits = model(**inputs).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
    return loss, int((targets != IGNORED).sum())


def next_tokens(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """The input of a causal model, and the next token at each of its places of output, `IGNORED` if it does not count.

    Logits are computed only at places where some example of the batch has a token that counts: with a small model and a
    large vocabulary they are most of the work. Tokens behind the last of these places are left out.
    """
    targets = batch["labels"][:, 1:]
    places = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    length = int(places[-1]) + 1 if len(places) else targets.shape[1]
    inputs = {name: values[:, :length] for name, values in batch.items() if name != "labels"}
    return {**inputs, "logits_to_keep": places}, targets[:, places]
