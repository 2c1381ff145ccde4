"""How is a model prepared for a method: which layers, with which adapter, from which initial values?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorapro_hf.commands.compare.plan import PlannedRun
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.targets import described, ends_of, unmatched


def layers_to_adapt(model: Any, targets: str | Sequence[str], head: nn.Module | None) -> list[str]:
    """Names of the linear layers that every method adapts, or trains as they are.

    Args:
        model: A pretrained model without an adapter.
        targets: `"all-linear"` for all but the output layer, or ends of names such as `["q_proj", "v_proj"]`.
        head: The module that every method trains in full; it is not adapted.

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
    model: Any, run: PlannedRun, layers: Sequence[str], scaling: float, take_gradients: Callable[[], None]
) -> Any:
    """The model with gradients for the parameters that the method trains, and for no others.

    Args:
        model: A pretrained model for this run alone: PiSSA and LoRA-GA change its weights.
        run: Says the method, the rank and the seed of the adapter's initial values: methods with the same
            initialization start from the same.
        layers: Names of the layers.
        scaling: Alpha over rank.
        take_gradients: Runs forward and backward passes of some training batches on `model`; only LoRA-GA asks for it.

    Returns:
        The PEFT model, or `model` itself for full fine-tuning.
    """
    model.requires_grad_(False)
    if run.method.adapter is None:
        for name in layers:
            model.get_submodule(name).weight.requires_grad_(True)
        return model
    assert run.rank is not None
    config = LoraConfig(
        r=run.rank,
        lora_alpha=scaling * run.rank,  # type: ignore[arg-type, unused-ignore]
        target_modules=list(layers),
        task_type=None,
        **_adapter_settings(run.method.adapter),
    )
    torch.manual_seed(run.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers to PEFT
        if config.init_lora_weights == "lora_ga":
            from peft import preprocess_loraga

            preprocess_loraga(model, config, take_gradients)
            torch.manual_seed(run.seed)
        return get_peft_model(model, config)


def _adapter_settings(adapter: Any) -> dict[str, Any]:
    settings = dict(adapter)
    if settings.get("init_lora_weights") == "lora_ga":
        try:
            from peft import LoraGAConfig
        except ImportError as error:
            raise UsageError("the initialization lora_ga needs a newer peft: pip install -U peft.") from error
        settings["lora_ga_config"] = LoraGAConfig(**settings.get("lora_ga_config", {}))
    return settings
