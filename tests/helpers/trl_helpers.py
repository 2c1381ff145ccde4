"""A tiny chat model, data and trainings for the tests of TRL's trainers; nothing is downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from lorapro_hf import find_lora_pairs, project_lora_gradients

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "A:{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}U:{{ message['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a chat template that marks what the assistant says."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds token types
    )
    fast.chat_template = TEMPLATE
    return fast


def config(**settings: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(vocab_size=len(tokenizer()), **sizes, **tokens, **settings)


def chat_model() -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(config())


def reward_model() -> LlamaForSequenceClassification:
    set_seed(0)
    return LlamaForSequenceClassification(config(num_labels=1))


def saved_chat_model(folder: Path) -> Path:
    """The model and its tokenizer in a folder, as `from_pretrained` wants them."""
    chat_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapter(**settings: Any) -> LoraConfig:
    # B is not 0, so that both factors matter from the first step
    settings = {"init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)


def adapted_chat_model() -> PeftModel:
    return get_peft_model(chat_model(), adapter())


def conversations(count: int = 8) -> Dataset:
    rows = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n + 1}."}] for n in range(count)]
    return Dataset.from_dict({"messages": rows})


def completions(count: int = 8) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [f"{n}?" for n in range(count)], "completion": [f"{n + 1}." for n in range(count)]}
    )


def preferences(count: int = 8) -> Dataset:
    numbers = range(count)
    answers = {"chosen": [f"{n + 1}." for n in numbers], "rejected": [f"{n + 5}!" for n in numbers]}
    return Dataset.from_dict({"prompt": [f"{n}?" for n in numbers], **answers})


def judged(count: int = 8) -> Dataset:
    rows = completions(count)
    return rows.add_column("label", [n % 2 == 0 for n in range(count)])


def prompts(count: int = 8) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{n}?" for n in range(count)]})


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions of one prompt."""
    return [float(sum(letter in "aeiou" for letter in text)) + len(text) / 100 for text in completions]


class FirstStep(TrainerCallback):
    """Records what the factors and their gradients were before the first step, and what the factors were after it."""

    def __init__(self) -> None:
        self.before: dict[str, tuple[torch.Tensor, ...]] = {}
        self.after: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.pairs: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.before:
            self.pairs = find_lora_pairs(kwargs["model"])
            self.before = {
                pair.name: tuple(x.detach().clone() for x in (pair.A, pair.B, pair.A.grad, pair.B.grad))
                for pair in self.pairs
            }

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.after:
            self.after = {p.name: (p.A.detach().clone(), p.B.detach().clone()) for p in self.pairs}

    def assert_efficient_step(self, learning_rate: float) -> None:
        """The first step was AdamW's with the gradients that the projection makes of the recorded ones."""
        assert self.before and self.after
        moved = 0
        for pair in self.pairs:
            A, B, grad_A, grad_B = self.before[pair.name]
            projected = project_lora_gradients(A, B, grad_A, grad_B, pair.scaling)
            for start, gradient, end in zip((A, B), projected, self.after[pair.name], strict=True):
                expected = torch.nn.Parameter(start.clone())
                expected.grad = gradient
                torch.optim.AdamW([expected], lr=learning_rate, weight_decay=0.0).step()
                # where a gradient is all but zero Adam's first step turns on its last digits
                sure = gradient.abs() > 1e-3 * gradient.abs().max()
                torch.testing.assert_close(end[sure], expected.detach()[sure], rtol=1e-3, atol=1e-3 * learning_rate)
                moved += int((end != start).sum())
        assert moved > 0
