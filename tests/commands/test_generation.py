"""Greedy answers in batches, as the demo and the comparison generate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_helpers import plain_greedy, tiny_model
from lorapro_hf.commands.common.scoring import complete
from lorapro_hf.options import UsageError

PROMPTS = ["a", "Question: how much?\nAnswer:", "def f(x):\n", "1, 2, 3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_a_batch_is_answered_as_single_prompts_are_without_cache_and_padding(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)  # greedy answers ignore it
    expected = [plain_greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)  # the prompts matter
    assert complete(model, tokenizer, PROMPTS, 12) == expected


def test_end_tokens_of_the_generation_settings_count(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = complete(model, tokenizer, ["a"], 8)[0]
    ids = tokenizer(whole)["input_ids"]
    assert len(ids) == 8
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, ids[3]])
    ended = complete(model, tokenizer, ["a"], 8)[0]
    assert whole.startswith(ended) and len(ended) <= 4


def test_a_model_without_an_end_token_is_refused(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    with pytest.raises(UsageError, match=r"set `tokenizer\.eos_token`"):
        complete(model, tokenizer, ["a"], 8)
