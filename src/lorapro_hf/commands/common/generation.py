"""How does a model go on from a prompt, many prompts at a time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorapro_hf.options import UsageError


@dataclass(frozen=True)
class Completion:
    """The text that a model wrote after a prompt, without the end-of-sequence token."""

    text: str


@torch.no_grad()
def complete(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[Completion]:
    """A greedy completion of each prompt; the prompts form one batch, padded on the left.

    Args:
        model: a causal language model, with or without an adapter, in training or evaluation mode as it is.
        tokenizer: the model's, with a padding token.
        prompts: similar lengths need less padding.
        max_new_tokens: the most tokens after a prompt.

    Raises:
        UsageError: neither tokenizer nor model names an end-of-sequence token.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # a checkpoint's own settings may ask for a penalty, which is not greedy
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )[:, inputs["input_ids"].shape[1] :]
    return [Completion(text) for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-sequence tokens of the tokenizer and of the model's generation settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise UsageError("neither tokenizer nor model names an end-of-sequence token: set `tokenizer.eos_token`.")
    return sorted(int(end) for end in ends)
