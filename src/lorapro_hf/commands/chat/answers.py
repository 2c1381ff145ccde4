"""How does a model answer, token by token?"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from lorapro_hf.commands.common.console import ctrl_c
from lorapro_hf.options import UsageError

_LENGTH = 512


@dataclass
class Voice:
    """One side of the chat, with a conversation of its own.

    Args:
        title: the words before its answers; empty where it is alone.
        context: a function that gives the context in which the model speaks so.
        messages: the conversation so far.
    """

    title: str
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    messages: list[dict[str, str]] = field(default_factory=list)


class Speaker:
    """A model that answers on stdout.

    Args:
        model: the model, with or without an adapter.
        tokenizer: its tokenizer.
        settings: how it samples.
        has_template: whether prompts go through the chat template, with the conversation before them.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GenerationConfig, has_template: bool) -> None:
        self.model, self.tokenizer, self.settings, self.has_template = model, tokenizer, settings, has_template
        config = model.config.get_text_config()
        self.length: int | None = getattr(config, "max_position_embeddings", None)

    @torch.no_grad()
    def answer(self, voice: Voice, prompt: str) -> str:
        """Print the answer while it is written, and return it; Ctrl-C ends it early.

        Raises:
            UsageError: the prompt leaves no room for an answer.
            KeyboardInterrupt: Ctrl-C came twice.
        """
        voice.messages.append({"role": "user", "content": prompt})
        inputs = self._encoded(voice)
        read, stopped = inputs["input_ids"].shape[1], threading.Event()

        def stop(*_: Any) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            stopped.set()

        def is_stopped(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), stopped.is_set(), dtype=torch.bool, device=ids.device)

        with ctrl_c(stop), voice.context():
            ids = self.model.generate(
                **inputs,
                generation_config=self.settings,
                stopping_criteria=StoppingCriteriaList([is_stopped]),
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        text: str = self.tokenizer.decode(ids[0, read:], skip_special_tokens=True)
        voice.messages.append({"role": "assistant", "content": text})
        return text

    def _encoded(self, voice: Voice) -> Any:
        """The conversation as tokens; where it has grown too long, its last message alone."""
        inputs = self._tokens(voice.messages)
        if not self._fits(inputs) and len(voice.messages) > 1 and self.has_template:
            print(f"(the chat is longer than the {self.length} tokens that the model reads: it starts anew)")
            del voice.messages[:-1]
            inputs = self._tokens(voice.messages)
        if not self._fits(inputs):
            count = inputs["input_ids"].shape[1]
            raise UsageError(
                f"a prompt of {count} tokens and an answer of up to {self.settings.max_new_tokens} are more than the "
                f"{self.length} tokens that the model reads: shorten the prompt, or lower --max_new_tokens."
            )
        return inputs

    def _tokens(self, messages: list[dict[str, str]]) -> Any:
        if self.has_template:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            inputs = self.tokenizer(messages[-1]["content"], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        return inputs.to(self.model.device)

    def _fits(self, inputs: Any) -> bool:
        return self.length is None or inputs["input_ids"].shape[1] + self.settings.max_new_tokens <= self.length


def sampling(model: Any, tokenizer: Any, asked: dict[str, Any]) -> GenerationConfig:
    """The model's settings of generation with those that the command line asks for."""
    settings = copy.deepcopy(model.generation_config)
    settings.max_length = None
    settings.max_new_tokens = asked.pop("max_new_tokens", None) or settings.max_new_tokens or _LENGTH
    if asked.get("temperature") == 0:
        settings.do_sample = False
    elif asked:
        settings.do_sample = True
        for name, value in asked.items():
            setattr(settings, name, value)
    if settings.pad_token_id is None:
        ends = settings.eos_token_id
        ends = ends[0] if isinstance(ends, list) else ends
        settings.pad_token_id = ends if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return settings
