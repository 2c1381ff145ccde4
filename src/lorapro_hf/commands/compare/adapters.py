"""How is a model prepared for a method: which layers, with which adapter, from which initial values?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorapro_hf.commands.compare.plan import PlannedRun
from lorapro_hf.methods.gelora import gelora_ranks
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.targets import described, ends_of, unmatched


def layers_to_adapt(model: Any, targets: str | Sequence[str], head: nn.Module | None) -> list[str]:
    """Names of the linear layers that every method adapts, or trains as they are; raises `UsageError` if none.

    `targets` is `"all-linear"` for all but the output layer, or ends of names such as `["q_proj", "v_proj"]`. The
    head, which every method trains in full, is not adapted.
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
            message = f"has no linear layer {described(wrong, linear)} to adapt. It has {ends_of(linear)}."
            raise UsageError(f"target_modules: {type(model).__name__} {message}")
        linear = [name for name in linear if len(unmatched(ends, [name])) < len(ends)]
    if not linear:
        raise UsageError(f"target_modules={targets!r} names no linear layer of {type(model).__name__}.")
    return linear


def make_trainable(
    model: Any,
    run: PlannedRun,
    layers: Sequence[str],
    scaling: float,
    take_gradients: Callable[[], None],
    inputs: Iterable[Any] = (),
) -> Any:
    """The model, a PEFT model unless it is fine-tuned in full, with gradients for the parameters of the method only.

    PiSSA and LoRA-GA change the weights of `model`. `take_gradients` runs forward and backward passes of some training
    batches on it, for LoRA-GA alone; `inputs` are the batches of the training without labels, for GeLoRA alone.
    """
    model.requires_grad_(False)
    if run.method.adapter is None:
        for name in layers:
            model.get_submodule(name).weight.requires_grad_(True)
        return model
    if run.method.gelora is not None:
        ranks = gelora_ranks(model, inputs, alpha_over_r=scaling, **run.method.gelora)
    else:
        assert run.rank is not None
        ranks = {"r": run.rank, "lora_alpha": scaling * run.rank}
    settings: dict[str, Any] = {**run.method.adapter, **ranks}
    is_lora_ga = settings.get("init_lora_weights") == "lora_ga"
    if is_lora_ga:
        try:
            from peft import LoraGAConfig, preprocess_loraga
        except ImportError as error:
            raise UsageError("the initialization lora_ga needs a newer peft: pip install -U peft.") from error
        settings["lora_ga_config"] = LoraGAConfig(**settings.get("lora_ga_config", {}))
    config = LoraConfig(target_modules=list(layers), **settings)
    torch.manual_seed(run.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers to PEFT
        if is_lora_ga:
            preprocess_loraga(model, config, take_gradients)
            torch.manual_seed(run.seed)
        return get_peft_model(model, config)
