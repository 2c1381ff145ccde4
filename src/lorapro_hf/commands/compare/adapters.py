"""How is a model made ready for a method: which layers, with which adapter, from which initial values?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorapro_hf.commands.compare.methods import Method
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.targets import described, ends_of, unmatched


def layers_to_adapt(model: Any, targets: str | Sequence[str], head: nn.Module | None) -> list[str]:
    """Names of the linear layers that every method adapts, or trains as they are.

    Args:
        model: A pretrained model without an adapter.
        targets: `"all-linear"` for all but the output layer, or ends of names such as `["q_proj", "v_proj"]`.
        head: What is trained in full by every method and so not adapted.

    Raises:
        UsageError: if there is none.
    """
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left_out = {id(module) for part in (head, outputs) if part is not None for module in part.modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in left_out
    ]
    if targets != "all-linear":
        ends = [targets] if isinstance(targets, str) else list(targets)
        if wrong := unmatched(ends, linear):
            raise UsageError(
                f"target_modules: {type(model).__name__} has no linear layer {described(wrong, linear)} to adapt. It "
                f"has {ends_of(linear)}."
            )
        linear = [name for name in linear if len(unmatched(ends, [name])) < len(ends)]
    if not linear:
        raise UsageError(f"target_modules={targets!r} names no linear layer of {type(model).__name__}.")
    return linear


def make_trainable(
    model: Any,
    method: Method,
    layers: Sequence[str],
    *,
    rank: int | None,
    scaling: float,
    seed: int,
    take_gradients: Callable[[], None],
) -> Any:
    """The model with what `method` trains requiring gradients and nothing else.

    Args:
        model: A pretrained model of its own for this run: PiSSA and LoRA-GA change its weights.
        method: How it is adapted.
        layers: Names of the layers.
        rank: Of the adapter.
        scaling: Alpha over rank.
        seed: Of the adapter's initial values; methods with the same initialization start from the same.
        take_gradients: Runs forward and backward passes of some training batches on `model`; only LoRA-GA asks for it.

    Returns:
        The PEFT model, or `model` itself for full fine-tuning.
    """
    model.requires_grad_(False)
    if method.adapter is None:
        for name in layers:
            model.get_submodule(name).weight.requires_grad_(True)
        return model
    if rank is None:
        raise ValueError(f"method {method.name} has an adapter and needs a rank.")
    config = LoraConfig(
        r=rank,
        lora_alpha=scaling * rank,  # type: ignore[arg-type, unused-ignore]
        target_modules=list(layers),
        task_type=None,
        **_adapter_settings(method),
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers to PEFT
        if config.init_lora_weights == "lora_ga":
            from peft import preprocess_loraga

            preprocess_loraga(model, config, take_gradients)
            torch.manual_seed(seed)
        return get_peft_model(model, config)


def _adapter_settings(method: Method) -> dict[str, Any]:
    settings = dict(method.adapter or {})
    if settings.get("init_lora_weights") == "lora_ga":
        try:
            from peft import LoraGAConfig
        except ImportError as error:
            raise UsageError("the initialization lora_ga needs a newer peft: pip install -U peft.") from error
        settings["lora_ga_config"] = LoraGAConfig(**settings.get("lora_ga_config", {}))
    return settings
