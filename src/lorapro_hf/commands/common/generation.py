"""What does a model write after a prompt, many prompts at a time?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from lorapro_hf.options import UsageError


@dataclass(frozen=True)
class Completion:
    """What stands after a prompt, without what ended it, and whether it came to an end before its tokens ran out."""

    text: str
    finished: bool


class StopAtStrings(StoppingCriteria):
    """Ends a row of a batch as soon as its new text contains one of `strings`; the prompt does not count.

    Args:
        tokenizer: the model's.
        strings: none of them empty.
        prompt_length: tokens of the padded prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Collection[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.strings = strings
        self.prompt_length = prompt_length
        # a token has at least one byte: in so many last tokens lies every string that the last token completes
        self.window = max(len(string.encode()) for string in strings) + 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Which rows are done: a boolean for each row of `input_ids`, which is `(batch, length)`."""
        new = input_ids[:, self.prompt_length :][:, -self.window :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        done = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def cut_at(text: str, strings: Collection[str]) -> str:
    """The text before the first of `strings` that occurs in it."""
    return text[: min((at for string in strings if (at := text.find(string)) >= 0), default=len(text))]


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    stop: Collection[str] = (),
    add_special_tokens: bool = True,
) -> list[Completion]:
    """What `model` writes after each prompt, greedily, in one batch that is padded on the left.

    Args:
        model: a causal language model, with an adapter or without, in the mode (training, evaluation) that it is in.
        tokenizer: the model's, with a padding token.
        prompts: alike lengths need less padding.
        max_new_tokens: the most tokens after a prompt.
        stop: strings that end a text and do not belong to it, beside the end-of-sequence tokens of tokenizer and model.
            Those that are tokens of their own, such as `<|im_end|>`, end it as such, for they leave no text behind.
        add_special_tokens: whether the tokenizer adds those that open a text; a chat template has done so already.
    """
    inputs = tokenizer(
        list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=add_special_tokens
    ).to(model.device)
    length = inputs["input_ids"].shape[1]
    single = tokenizer.get_added_vocab()
    ends = sorted({*end_tokens(model, tokenizer), *(single[string] for string in stop if string in single)})
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # some checkpoints' settings ask for another, with which it would not be greedy
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([StopAtStrings(tokenizer, stop, length)] if stop else []),
    )[:, length:]
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    cut = [cut_at(text, stop) for text in texts]
    ended = torch.isin(output, torch.tensor(ends, device=output.device)).any(dim=1).tolist()
    return [
        Completion(short, end or len(short) < len(text)) for short, text, end in zip(cut, texts, ended, strict=True)
    ]


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those that the model's generation settings add.

    Raises:
        UsageError: there is none.
    """
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise UsageError("neither tokenizer nor model names an end-of-sequence token: set `tokenizer.eos_token`.")
    return sorted(int(end) for end in ends)


def check_room(model: Any, lengths: Collection[int], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for an answer.

    Raises:
        UsageError: the longest prompt and the new tokens together exceed the positions that the model knows.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(lengths)
    if positions is not None and longest + max_new_tokens > positions:
        raise UsageError(
            f"the longest prompt has {longest} tokens, which with max_new_tokens={max_new_tokens} is more than the "
            f"{positions} that the model reads; lower --max_new_tokens or use fewer examples in the prompt."
        )
