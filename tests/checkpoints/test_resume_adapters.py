"""Trainings resume to the bit with adapters in half precision, tied, several at once, or added by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grids import rest_slow
from lora_layers import needs_weight_tying
from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments, create_lorapro_optimizer
from trainer_helpers import arguments, assert_same, build, differ, factors, tiny_base, tiny_lora

SAVED, LAST = 1, 2


def trainer_of(folder: Path, model: nn.Module, is_given: bool = False, **settings: Any) -> Any:
    """A trainer that saves in the middle; `is_given` hands it the optimizer, built before anything is loaded."""
    settings = {"max_steps": LAST, "save_strategy": "steps", "save_steps": SAVED, **settings}
    args = arguments(folder, LoRAProTrainingArguments, **settings)
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config=args.lora_pro_config) if is_given else None
    return build(LoRAProTrainer, args, model=model, optimizers=(optimizer, None))


def assert_resumes(folder: Path, make: Callable[[], nn.Module], **settings: Any) -> None:
    """The end is that of the uninterrupted training, the model's parameters are those that it had."""
    whole = trainer_of(folder, make(), **settings)
    whole.train()
    again = trainer_of(folder, make(), **settings)
    parameters, before = [(id(p), p.dtype) for p in again.model.parameters()], factors(again)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
    assert_same(factors(again), factors(whole))
    assert [(id(p), p.dtype) for p in again.model.parameters()] == parameters
    assert differ(factors(again), before)


@pytest.mark.parametrize(
    ("dtype", "masters", "is_given"),
    rest_slow(
        [
            (torch.bfloat16, False, True),
            (torch.bfloat16, True, False),
            (torch.bfloat16, True, True),
            (torch.float16, False, True),
            (torch.float16, True, True),
        ],
        fast=2,
    ),
)
def test_half_precision(dtype: torch.dtype, masters: bool, is_given: bool, tmp_path: Path) -> None:
    def make() -> nn.Module:
        return tiny_lora(target_modules=["q_proj", "v_proj"]).to(dtype)

    assert_resumes(tmp_path, make, is_given=is_given, lora_pro_master_factors=masters)


@needs_weight_tying
@pytest.mark.parametrize("dtype", rest_slow([torch.bfloat16, torch.float16, torch.float32]), ids=str)
def test_tied_embeddings(dtype: torch.dtype, tmp_path: Path) -> None:
    def make() -> nn.Module:
        base = tiny_base()
        base.config.tie_word_embeddings = True
        base.tie_weights()
        config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
        torch.manual_seed(0)
        return get_peft_model(base.to(dtype), config, autocast_adapter_dtype=False)

    assert_resumes(tmp_path, make)


def both_active() -> nn.Module:
    model = tiny_lora(target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(["other", "default"])
    return model


def test_two_adapters_at_once(tmp_path: Path) -> None:
    assert_resumes(tmp_path, both_active)


def test_one_of_two_adapters_at_once_is_not_there(tmp_path: Path) -> None:
    """Refused before anything is loaded."""
    trainer_of(tmp_path, tiny_lora(target_modules=["q_proj", "v_proj"]), save_only_model=True).train()
    again = trainer_of(tmp_path, both_active())
    before = factors(again)
    with pytest.raises(ValueError, match=r"cannot resume from .*: the model trains the adapter 'other', but .*default"):
        again.train(resume_from_checkpoint=True)
    assert_same(factors(again), before)


def test_an_adapter_whose_name_has_a_slash(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return get_peft_model(tiny_base(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="me/mine")

    assert_resumes(tmp_path, make)
    file = tmp_path / f"checkpoint-{SAVED}" / "me" / "mine" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"me/mine/adapter_model.safetensors is cut off or damaged"):
        trainer_of(tmp_path, make()).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))


def added(names: tuple[str, ...] = ("mine",), dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_base().to(dtype)
    for name in names:
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), name)
    return model


@pytest.mark.parametrize("dtype", rest_slow([torch.bfloat16, torch.float32]), ids=str)
def test_an_adapter_that_transformers_has_added(dtype: torch.dtype, tmp_path: Path) -> None:
    assert_resumes(tmp_path, lambda: added(dtype=dtype))


def test_two_adapters_at_once_that_transformers_has_added(tmp_path: Path) -> None:
    """transformers raises when it saves them, at the first checkpoint or after the training."""
    model = added(("mine", "yours"))
    model.set_adapter(["mine", "yours"])
    with pytest.raises(ValueError, match=r"\['mine', 'yours'\] of model.add_adapter .* peft.get_peft_model"):
        trainer_of(tmp_path, model)


def test_a_model_compiled_by_hand(tmp_path: Path) -> None:
    """transformers saves an empty adapter for it, and one with names of its own for a model with compiled layers."""
    with pytest.raises(ValueError, match="torch_compile=True"):
        trainer_of(tmp_path, torch.compile(tiny_lora(), backend="eager"))
    parts = tiny_lora()
    layers = parts.get_base_model().model.layers
    layers[0] = torch.compile(layers[0], backend="eager")
    with pytest.raises(ValueError, match=r"layer.compile\(\)"):
        trainer_of(tmp_path, parts)
    models = iter([tiny_lora(), torch.compile(tiny_lora(), backend="eager")])  # the second is the one to train
    args = arguments(tmp_path, LoRAProTrainingArguments)
    trainer = build(LoRAProTrainer, args, model_init=lambda: next(models))
    with pytest.raises(ValueError, match="torch_compile=True"):
        trainer.train()
