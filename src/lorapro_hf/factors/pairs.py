"""Which LoRA pairs does a PEFT model train, and which of its layers are refused?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from lorapro_hf.factors.pair import LoRAPair, check_scaling, factor_of, unwrapped_name
from lorapro_hf.factors.wrappers import require_plain_name

__all__ = ["LoRAPair", "Refusal", "check_scaling", "find_lora_pairs", "survey_lora_pairs", "unwrapped_name"]

# Variants whose forward is `scaling * B A` in A and B, as the projection assumes: DoRA multiplies by a magnitude that
# it detaches, aLoRA selects tokens.
_SUPPORTED_VARIANTS = ("Dora", "ALora")


def find_lora_pairs(model: nn.Module) -> list[LoRAPair]:
    """The trainable LoRA factor pairs of a model, in the order of its modules.

    Handles every layer that PEFT builds with LoRA factors: linear (GPT-2's `Conv1D` and quantised bases included),
    embedding, convolution, `nn.MultiheadAttention` and `target_parameters` (experts), plain, with rsLoRA or with DoRA.
    Of several adapters, each active and trainable one has its own pairs. Layers that share their factors (tied
    embeddings) make one pair.

    Args:
        model: a `PeftModel`, or any module that holds PEFT LoRA layers; wrappers such as DDP may be around it.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no LoRA layer, all are frozen or merged, only one factor of a layer is trainable, a scaling
            is 0, the projection would be wrong for a layer, or PEFT would not save a layer inside a wrapper. The
            message names the layer.
    """
    pairs, refusals = survey_lora_pairs(model)
    if refusals:
        raise refusals[0].error
    return pairs


class Refusal(NamedTuple):
    """Why `find_lora_pairs` refuses a model: the layer and its kind, empty for the model as a whole, and the error."""

    name: str
    kind: str
    error: ValueError


def survey_lora_pairs(model: nn.Module) -> tuple[list[LoRAPair], list[Refusal]]:
    """The pairs that `find_lora_pairs` finds, and all refusals, where that raises the first.

    Raises:
        TypeError: `model` is no module.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model itself, got a {type(model).__name__}; pass model, not model.parameters().")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    refusals: list[Refusal] = []

    @contextmanager
    def noting(name: str = "") -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            refusals.append(Refusal(name, type(layers[name]).__name__ if name else "", error))

    found: list[LoRAPair] = []
    for name, layer in layers.items():
        for adapter_name in layer.active_adapters:
            with noting(name):
                if _is_trainable(name, layer, adapter_name):
                    found.append(_pair(name, layer, adapter_name))
    if not found and not refusals:
        with noting():
            _refuse_no_pair(model, layers)
    for pair in found:
        with noting(pair.name):
            require_plain_name(pair.name)
            check_scaling(pair)
    with noting():
        _refuse_scaling_beside_the_layers(model)
    pairs: list[LoRAPair] = []
    owner: dict[int, LoRAPair] = {}
    for pair in found:
        with noting(pair.name):
            pairs += _unless_tied(pair, owner)
    return pairs, refusals


def _is_trainable(name: str, layer: Any, adapter_name: str) -> bool:
    """Whether this adapter of this layer is trained; raises if only one of its factors is."""
    if adapter_name not in layer.lora_A and adapter_name not in layer.lora_embedding_A:
        return False
    if layer.disable_adapters:
        return False
    if adapter_name in layer.lora_A and not hasattr(layer.lora_A[adapter_name], "weight"):  # AdaLoRA
        raise _unsupported(name, layer, f"its lora_A is a {type(layer.lora_A[adapter_name]).__name__}, not a layer")
    trainable = [factor_of(layer, letter, adapter_name).requires_grad for letter in "AB"]
    if any(trainable) and not all(trainable):
        frozen = "lora_A" if not trainable[0] else "lora_B"
        raise ValueError(
            f"{name}: {frozen} of adapter {adapter_name!r} is frozen and the other factor is not; LoRA-Pro moves both. "
            "Make both trainable, or train this model with a plain optimizer."
        )
    if any(trainable) and adapter_name in layer.merged_adapters:
        raise ValueError(
            f"{name}: adapter {adapter_name!r} is merged into the base weight, so its factors get no gradient. "
            "Call model.unmerge_adapter() first."
        )
    return all(trainable)


def _pair(name: str, layer: Any, adapter_name: str) -> LoRAPair:
    from peft.tuners.lora.layer import ParamWrapper

    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    if variant is not None and not type(variant).__name__.startswith(_SUPPORTED_VARIANTS):
        raise _unsupported(name, layer, f"its LoRA variant {type(variant).__name__} computes more than scaling * B @ A")
    if adapter_name in layer.lora_embedding_A:
        return LoRAPair(name, layer, adapter_name)
    module_A, module_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        return LoRAPair(name, layer, adapter_name, "experts", layer.num_experts)
    if isinstance(module_A, nn.Linear) and isinstance(module_B, nn.Linear):
        return LoRAPair(name, layer, adapter_name)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if isinstance(module_A, convolutions) and isinstance(module_B, convolutions) and module_A.groups == 1:
        layout = "matrix" if module_B.groups == 1 else "groups"
        return LoRAPair(name, layer, adapter_name, layout, module_B.groups)
    kinds = f"{type(module_A).__name__} and {type(module_B).__name__}"
    raise _unsupported(name, layer, f"its factors are of the kinds {kinds}")


def _unsupported(name: str, layer: Any, reason: str) -> ValueError:
    return ValueError(
        f"{name} ({type(layer).__name__}): LoRA-Pro does not support this layer, because {reason}. Leave it out of "
        "target_modules (exclude_modules), or train with a plain optimizer."
    )


def _refuse_no_pair(model: nn.Module, layers: dict[str, Any]) -> None:
    if not layers:
        raise ValueError(_no_lora_message(model))
    adapters = sorted({name for layer in layers.values() for name in (*layer.lora_A, *layer.lora_embedding_A)})
    raise ValueError(
        f"no active LoRA adapter is trainable (adapters {adapters}, {len(layers)} layers): they are frozen, in "
        "inference mode or disabled. Load with PeftModel.from_pretrained(..., is_trainable=True), leave "
        "inference_mode=False in LoraConfig, choose the adapter to train with model.set_adapter(name), or call "
        "model.enable_adapter_layers()."
    )


def _refuse_scaling_beside_the_layers(model: nn.Module) -> None:
    for module in model.modules():
        weight = getattr(getattr(module, "xlora_config", None), "global_scaling_weight", 1)
        if weight != 1:
            raise ValueError(
                f"X-LoRA's global_scaling_weight is {weight:g}, which scales the adapters behind their own scaling. "
                "Set it to 1 and multiply lora_alpha instead."
            )


def _no_lora_message(model: nn.Module) -> str:
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds = {type(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    others = sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
    if others:
        return f"the model has adapter layers {others} but no LoRA layer; LoRA-Pro needs LoRA factors (LoraConfig)."
    return (
        f"{type(model).__name__} has no LoRA layer; wrap it first: "
        'model = peft.get_peft_model(model, LoraConfig(target_modules="all-linear")).'
    )


def _unless_tied(pair: LoRAPair, owner: dict[int, LoRAPair]) -> list[LoRAPair]:
    """The pair, or nothing if it shares its factors with an earlier pair, to which it is then tied.

    Args:
        pair: the next pair.
        owner: the first pair with each factor, by address; new addresses are added.

    Raises:
        ValueError: only one of the factors is shared, or both with another scaling.
    """
    # Meta and partitioned tensors have no address of their own.
    keys = [factor.data_ptr() or id(factor) for factor in (pair.A, pair.B)]
    owners = {id(owner[key]) if key in owner else None for key in keys}
    if owners == {None}:
        owner.update(dict.fromkeys(keys, pair))
        return [pair]
    first = next(owner[key] for key in keys if key in owner)
    if len(owners) > 1 or first.scaling != pair.scaling:
        reason = "only one of the two factors" if len(owners) > 1 else "both factors but with another scaling"
        raise _unsupported(pair.name, pair.layer, f"it shares {reason} with {first.name}")
    if pair.A is not first.A:  # autograd adds up the gradients of one and the same parameter
        first._tied.append(pair)
    return []
