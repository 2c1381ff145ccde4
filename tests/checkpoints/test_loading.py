"""Adapters are loaded into the parameters that a model has: none is replaced, none changes its dtype or its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_layers import needs_weight_tying, tied_llama
from lorapro_hf.checkpoints.loading import load_adapters
from trainer_helpers import VOCABULARY, assert_same, tiny_base, tiny_lora


def named_mine() -> nn.Module:
    return get_peft_model(tiny_base(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")


def added(**settings: Any) -> nn.Module:
    """An adapter by transformers' own `add_adapter`; PEFT has not wrapped the model."""
    model = tiny_base()
    model.add_adapter(LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}), "mine")
    return model


def several() -> nn.Module:
    """Three adapters of different shapes, of which two are active."""
    model = tiny_lora(target_modules=["q_proj"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.add_adapter("third", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["third", "other"])
    return model


def bert(**settings: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", **settings))


CASES: dict[str, Callable[[], nn.Module]] = {
    "plain": tiny_lora,
    "named": named_mine,
    "several": several,
    "dora": lambda: tiny_lora(use_dora=True),
    "modules_to_save": lambda: tiny_lora(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "tokens": lambda: tiny_lora(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "biases": lambda: bert(bias="all"),
    "head": bert,
    "embedding": lambda: tiny_lora(target_modules=["embed_tokens", "q_proj"]),
    "bias of B": lambda: tiny_lora(target_modules=["q_proj"], lora_bias=True),
    "added": added,
    "added with a head": lambda: added(modules_to_save=["lm_head"], use_dora=True),
}


def fill(model: nn.Module, by: float) -> None:
    """Values of which no two tensors have the same."""
    with torch.no_grad():
        for position, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.linspace(by, by + 1, parameter.numel()).view(parameter.shape) + position)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def what_it_is(model: nn.Module) -> list[tuple[Any, ...]]:
    active = [(name, m.active_adapters) for name, m in model.named_modules() if hasattr(m, "merged_adapters")]
    parameters = [(name, id(p), p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    return [*active, *parameters, (model.training,)]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), ("several", torch.float16), ("several", torch.float32)],
)
def test_into_the_parameters_that_are_there(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, again = (CASES[case]().to(dtype) for _ in range(2))
    fill(model, 0.0)
    fill(again, 7.0)
    model.save_pretrained(tmp_path)
    before = what_it_is(again)
    load_adapters(tmp_path, again)
    assert what_it_is(again) == before
    assert_same(trained(again), trained(model))


@needs_weight_tying
def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model, again = tied_llama().to(torch.bfloat16), tied_llama().to(torch.bfloat16)
    fill(model, 0.0)
    model.save_pretrained(tmp_path)
    before = what_it_is(again)
    load_adapters(tmp_path, again)
    assert what_it_is(again) == before
    assert_same(trained(again), trained(model))


def test_adapters_that_are_not_active(tmp_path: Path) -> None:
    model, again = tiny_lora(), tiny_lora()
    for each in (model, again):
        each.add_adapter("other", each.peft_config["default"])
    expected = {n: p.detach().clone().add_(1) for n, p in model.named_parameters() if "lora_" in n}
    model.load_state_dict(expected, strict=False)
    model.save_pretrained(tmp_path)
    before = what_it_is(again)
    load_adapters(tmp_path, again)
    assert what_it_is(again) == before
    assert_same({name: p.detach() for name, p in again.named_parameters() if name in expected}, expected)


def test_only_what_was_saved_is_loaded(tmp_path: Path) -> None:
    model, again = several(), several()
    fill(model, 0.0)
    model.save_pretrained(tmp_path, selected_adapters=["other", "third"])
    kept = again.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach().clone()
    load_adapters(tmp_path, again)
    assert_same(trained(again), trained(model))
    assert torch.equal(again.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight, kept)


def test_embeddings_that_have_grown(tmp_path: Path) -> None:
    models = []
    for seed in range(2):
        base = tiny_base()
        torch.manual_seed(seed)
        base.resize_token_embeddings(VOCABULARY + 4)  # with rows drawn at random
        models.append(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])))
    model, again = models
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapters(tmp_path, again)
    for one, other in zip(*(each.get_base_model().parameters() for each in models), strict=True):
        assert torch.equal(one, other)


def test_files_of_torch(tmp_path: Path) -> None:
    model, again = tiny_lora(), tiny_lora()
    fill(model, 0.0)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    load_adapters(tmp_path, again)
    assert_same(trained(again), trained(model))


# ---- what does not fit ----


def saved(folder: Path) -> Path:
    """The folder of the adapters of `several`, with other values."""
    model = several()
    fill(model, 0.0)
    model.save_pretrained(folder)
    return folder


def without(file: Path, ending: str) -> None:
    save_file({name: t for name, t in load_file(file).items() if not name.endswith(ending)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "other"), r"trains the adapter 'other', .*\['default', 'third'\].*name"),
        (lambda folder: without(folder / "third/adapter_model.safetensors", "0.self_attn.q_proj.lora_B.weight"),
         r"third/adapter_model.safetensors: .*lora_B.weight is missing"),
        (lambda folder: shutil.copy(folder / "third/adapter_model.safetensors", folder),
         r"adapter_model.safetensors: .* has shape \[3, 32\] in the checkpoint, but has shape \[4, 32\]"),
    ],
)  # fmt: skip
def test_nothing_is_loaded_of_what_does_not_fit(damage: Any, message: str, tmp_path: Path) -> None:
    folder, again = saved(tmp_path), several()
    damage(folder)
    before = {name: p.detach().clone() for name, p in again.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_adapters(folder, again)
    assert_same({name: p.detach() for name, p in again.named_parameters()}, before)


def test_copies_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were PEFT to hand out copies one day, they would be filled, and the model would keep its own values."""
    from lorapro_hf.checkpoints import loading

    folder, again = saved(tmp_path), several()
    given = loading.get_peft_model_state_dict

    def copied(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in given(*args, **kwargs).items()}

    monkeypatch.setattr(loading, "get_peft_model_state_dict", copied)
    with pytest.raises(ValueError, match=r"lora_A.*cannot be loaded in place"):
        load_adapters(folder, again)
