"""A tiny model with a tokenizer, and models whose answers are written down, for the tests of the evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"
GSM8K = [
    {"question": "What is 1 + 1?", "answer": "1+1=2\n#### 2"},
    {"question": "What do 3 cars for $400 cost together?", "answer": "3*400=1,200\n#### 1,200"},
    {"question": "What is 2 - 5?", "answer": "2-5=-3\n#### -3"},
]


def tiny_model(folder: Path) -> Path:
    """A random Llama, which writes gibberish, and a tokenizer that knows bytes only, saved to `folder`."""
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,  # so that what it writes depends on the prompt
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[[0, 1, *range(96, len(alphabet))]] = 0.0  # it writes printable ASCII
    model.save_pretrained(folder)
    return folder


def tiny_adapter(base: Path, folder: Path) -> Path:
    """An adapter that changes what the tiny model writes, saved without a tokenizer."""
    set_seed(1)
    model = LlamaForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(folder)
    return folder


def plain_greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """The likeliest tokens after one prompt, one at a time, without cache and padding."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        best = model(ids, use_cache=False).logits[0, -1].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as JSON lines in `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answer_with(monkeypatch: pytest.MonkeyPatch, write: Callable[[str], str]) -> list[str]:
    """Let `write` answer each prompt in place of the model; returns the prompts that it is asked."""
    from lorapro_hf.commands.evaluate.model import EvaluatedModel  # imports lm-eval

    prompts: list[str] = []

    def generate_until(self: Any, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        return [write(request.args[0]) for request in requests]

    monkeypatch.setattr(EvaluatedModel, "generate_until", generate_until)
    return prompts
