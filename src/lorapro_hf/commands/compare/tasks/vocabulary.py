"""A vocabulary cut to the tokens of a task's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorapro_hf.commands.compare.tasks.base import IGNORED, Features

Sets = Mapping[str, Sequence[Features]]


def cut_vocabulary(model: Any, sets: Sets) -> dict[str, list[Features]]:
    """Leave only the tokens that occur in the data, held-out data included, in the embedding and the output layer.

    Under a few transformer blocks a vocabulary of tens of thousands takes most of the time, for tokens that never
    occur. The model can no longer write them, and its tokenizer no longer fits it.

    Args:
        model: A causal language model, which is changed.
        sets: Examples with `input_ids` and perhaps `labels`.

    Returns:
        The examples with the new numbers of the tokens.
    """
    kept = sorted({token for examples in sets.values() for example in examples for token in example["input_ids"]})
    number = {token: place for place, token in enumerate(kept)} | {IGNORED: IGNORED}
    rows = torch.tensor(kept)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is embedding.weight
    smaller = nn.Embedding.from_pretrained(embedding.weight.detach()[rows], freeze=False)
    scores = nn.Linear(output.in_features, len(kept), bias=output.bias is not None)
    scores.weight = smaller.weight if tied else nn.Parameter(output.weight.detach()[rows])
    if output.bias is not None:
        scores.bias = nn.Parameter(output.bias.detach()[rows])
    model.set_input_embeddings(smaller)
    model.set_output_embeddings(scores)
    model.config.vocab_size = len(kept)
    model.config.pad_token_id = None  # the old number may be that of no token, or of another
    return {name: [_renumbered(example, number) for example in examples] for name, examples in sets.items()}


def _renumbered(example: Features, number: Mapping[int, int]) -> Features:
    lists = {name: [number[token] for token in example[name]] for name in ("input_ids", "labels") if name in example}
    return {**example, **lists}
