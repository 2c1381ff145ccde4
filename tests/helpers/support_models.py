"""Models and adapters that take more than `get_peft_model` to build, for the support table."""

from __future__ import annotations

import tempfile
from typing import Any
from unittest import mock

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from lora_layers import DEFAULTS
from trainer_helpers import VOCABULARY, tiny_base

_FOLDERS = tempfile.TemporaryDirectory(prefix="lorapro-tests-")
Q_AND_V = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def llama() -> LlamaForCausalLM:
    model = tiny_base()
    model.config.use_cache = False
    return model


def token_ids() -> torch.Tensor:
    return torch.arange(16).view(2, 8) * 5 % VOCABULARY


def two_adapters(model: nn.Module, config: LoraConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    adapted.add_adapter("other", LoraConfig(**{**DEFAULTS, "r": 2}))
    adapted.base_model.set_adapter(["default", "other"])
    return adapted


def with_second_adapter_active(model: nn.Module, config: LoraConfig) -> PeftModel:
    adapted = two_adapters(model, config)
    adapted.set_adapter("other")
    return adapted


def saved_adapters() -> list[str]:
    folders = [tempfile.mkdtemp(dir=_FOLDERS.name) for _ in range(2)]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        get_peft_model(tiny_base(), LoraConfig(r=3, init_lora_weights=False, **Q_AND_V)).save_pretrained(folder)
    return folders


def x_lora(model: nn.Module, _: LoraConfig, **settings: Any) -> PeftModel:
    adapters = {str(number): folder for number, folder in enumerate(saved_adapters())}
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, xlora_dropout_p=0.0, adapters=adapters, **settings
    )
    return get_peft_model(model, config)


def corda(model: nn.Module, config: LoraConfig) -> PeftModel:
    from peft.tuners.lora.corda import preprocess_corda

    data = torch.randn(40, 6)
    preprocess_corda(model, config, run_model=lambda: model(data))
    return get_peft_model(model, config)


def lora_ga(model: nn.Module, config: LoraConfig) -> PeftModel:
    from peft.tuners.lora.loraga import preprocess_loraga

    data = torch.randn(40, 6)
    preprocess_loraga(model, config, lambda: model(data).square().sum().backward())
    return get_peft_model(model, config)


def eva(model: nn.Module, config: LoraConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    ids = torch.randint(3, VOCABULARY, (16, 8))
    batches = [{"input_ids": ids, "labels": ids}] * 3
    peft.initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    return adapted


def made_in_double(model: nn.Module, config: LoraConfig) -> PeftModel:
    """The orthogonal factors have half the rank: to the last digit, not to that of float32."""
    torch.set_default_dtype(torch.float64)
    try:
        return get_peft_model(model.double(), config)
    finally:
        torch.set_default_dtype(torch.float32)


def loftq(model: nn.Module, config: LoraConfig) -> PeftModel:
    """LoftQ, which PEFT computes on CUDA whatever the model is on, on the CPU."""
    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *where: Any, **more: Any) -> torch.Tensor:
        where = tuple("cpu" if place == "cuda" else place for place in where)
        return move(tensor, *where, **{key: "cpu" if place == "cuda" else place for key, place in more.items()})

    with mock.patch.object(torch.Tensor, "to", to):
        return get_peft_model(model, config)


def arrow(model: nn.Module, _: LoraConfig) -> PeftModel:
    from peft.tuners.lora import create_arrow_model

    return create_arrow_model(model, task_specific_adapter_paths=saved_adapters(), arrow_config=peft.ArrowConfig())


def qalora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """What PEFT builds on a GPTQ base, whose package is not needed for that: a layer with this variant."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    adapted = get_peft_model(model, config)
    adapted.base_model.model.body.lora_variant["default"] = QALoraLinearVariant()
    return adapted


def merged(model: nn.Module, config: LoraConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    adapted.merge_adapter()
    return adapted


def disabled(model: nn.Module, config: LoraConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    adapted.base_model.disable_adapter_layers()
    return adapted


def with_frozen_A(model: nn.Module, config: LoraConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    adapted.base_model.model.body.lora_A.requires_grad_(False)
    return adapted


def checkpointed(model: nn.Module, config: LoraConfig) -> PeftModel:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, config).train()


def compiled(model: nn.Module, config: LoraConfig) -> PeftModel:
    adapted = get_peft_model(model, config)
    adapted.compile(backend="aot_eager")
    return adapted


def narrow(model: nn.Module, config: LoraConfig) -> PeftModel:
    return get_peft_model(model, config).bfloat16()
