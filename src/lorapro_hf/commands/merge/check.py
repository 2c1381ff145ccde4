"""Does the written model give the logits of the adapter on its base?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.options import UsageError

_TEXT = "The quick brown fox jumps over the lazy dog. 12 + 30 = 42, and so on."
_TOLERANCE = 1e-4
"""Share of the largest logit by which two ways to compute in float32 may differ."""


@dataclass(frozen=True)
class Agreement:
    """How far the logits of the written model are from those of the adapter on its base.

    Args:
        difference: the largest difference, all computed in float32.
        rounding: the part that rounding the merged weights to their precision makes, measured before they are written.
        largest: the largest logit.
    """

    difference: float
    rounding: float
    largest: float

    @property
    def is_close(self) -> bool:
        """Whether the difference is that of the rounding; never for numbers that are not finite."""
        return self.difference <= self.rounding + _TOLERANCE * self.largest < float("inf")


def agreement(unmerged: Tensor, merged: Tensor, rounded: Tensor, written: Tensor) -> Agreement:
    """Compare logits: of the adapter, of the merged weights, of these rounded, and of the model as it was written."""
    return Agreement(
        difference=float((written - unmerged).abs().max()),
        rounding=float((rounded - merged).abs().max()),
        largest=float(unmerged.abs().max()),
    )


def probe(model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """A small input of the kind that a base model takes: a sentence, or noise as pictures and sounds.

    Raises:
        UsageError: the kind is not known.
    """
    config, name = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        if tokenizer is not None:
            ids = torch.tensor(tokenizer(_TEXT)["input_ids"]).view(1, -1)
        else:
            ids = torch.randint(model.get_input_embeddings().num_embeddings, (1, 16), generator=generator)
        return {name: ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {name: torch.randn(1, getattr(config, "num_channels", 3), height, width, generator=generator)}
    if name == "input_values":
        return {name: torch.randn(1, 16000, generator=generator)}
    if name == "input_features" and hasattr(config, "max_source_positions"):
        sound = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {name: sound, "decoder_input_ids": torch.tensor([[config.decoder_start_token_id]])}
    raise UsageError(f"{type(model).__name__} takes {name}, for which no outputs can be compared: merge it in Python.")


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of a model in float32, or its last hidden states."""
    outputs = model(**inputs)
    found: Tensor = outputs["logits"] if "logits" in outputs else outputs[0]
    return found.float()
