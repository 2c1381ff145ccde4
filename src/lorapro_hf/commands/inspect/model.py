"""What does LoRA-Pro find in a model, in memory or on the meta device?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorapro_hf.checkpoints.adapters import PREFIX, active_adapters
from lorapro_hf.commands.inspect.costs import mode_costs
from lorapro_hf.commands.inspect.report import Adapter, Base, ModeCost, Ordinary, PairGroup, Report, Unsupported
from lorapro_hf.factors.pairs import LoRAPair, Refusal, survey_lora_pairs
from lorapro_hf.hub.describe import describe_quantization
from lorapro_hf.hub.usage import base_of

_OPTIONS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")


def inspect_model(model: nn.Module, *, ranks: int = 1, source: str | None = None) -> Report:
    """Report the pairs of a model, other trainable parameters, refused layers, and costs by mode.

    Nothing is changed or allocated; the model may be on the meta device.

    Args:
        model: a `PeftModel`, or any module that holds PEFT layers.
        ranks: number of processes that would share the pairs out.
        source: the report's name for it; by default its class.

    Raises:
        TypeError: `model` is no module.
        ValueError: `ranks` is not at least 1.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1.")
    pairs, refusals = survey_lora_pairs(model)
    base = _base(model)
    ordinary = _ordinary(model, pairs, refusals) if pairs else []
    others = [parameter for _, parameter in ordinary]
    factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
    loaded = any(parameter.device.type != "meta" for parameter in model.parameters())
    costs: list[ModeCost] = []
    memory: dict[str, int | None] = {}
    if pairs:
        weights = 0 if loaded else None if base.bytes is None else base.bytes + _bytes([*factors, *others])
        costs, memory = mode_costs(pairs, others, parameters=base.parameters, weights=weights, ranks=ranks)
    return Report(
        source=source or type(model).__name__,
        base=base,
        adapters=_adapters(model),
        pairs=_grouped(pairs),
        pair_parameters=sum(factor.numel() for factor in factors),
        ordinary=_by_kind(ordinary),
        unsupported=_reasons(refusals),
        costs=costs,
        ranks=ranks,
        memory=memory,
        loaded=loaded,
        notes=_notes(pairs),
    )


def _base(model: nn.Module) -> Base:
    inner = base_of(model)
    config = getattr(inner, "config", None)
    containers = _containers(model)
    own = [parameter for name, parameter in model.named_parameters() if _adapter_of(name, containers) is None]
    quantization = getattr(config, "quantization_config", None)
    is_packed = quantization is not None or any(hasattr(parameter, "quant_state") for parameter in own)
    on_meta = any(parameter.device.type == "meta" for parameter in own)
    sizes: Counter[torch.dtype] = Counter()
    for parameter in own:
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    described = "4 bits (bitsandbytes)" if quantization is None else describe_quantization(quantization)
    return Base(
        model_class=type(inner).__name__,
        name=getattr(config, "name_or_path", None) or getattr(inner, "name_or_path", None) or None,
        parameters=sum(map(_elements, own)),
        dtype=str(sizes.most_common(1)[0][0]).removeprefix("torch.") if sizes else None,
        bytes=None if is_packed and on_meta else _bytes(own),
        quantization=described if is_packed else None,
    )


def _elements(parameter: Tensor) -> int:
    """The number of weights; bitsandbytes packs two of 4 bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    shape = getattr(packed, "shape", None) or getattr(parameter, "ds_shape", None)
    return parameter.numel() if shape is None else torch.Size(shape).numel()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _containers(model: nn.Module) -> set[str]:
    """The attributes in which PEFT keeps the parts of adapters by name, such as `lora_A`."""
    of_layers = {kind for layer in _tuner_layers(model) for kind in layer.adapter_layer_names}
    return {*of_layers, "lora_magnitude_vector", "modules_to_save"}


def _adapter_of(parameter: str, containers: Collection[str]) -> str | None:
    """The adapter that a parameter belongs to: the part of its name that follows a container."""
    parts = parameter.split(".")
    return next((name for kind, name in pairwise(parts) if kind in containers), None)


def _adapters(model: nn.Module) -> list[Adapter]:
    layers: dict[str, list[BaseTunerLayer]] = {name: [] for name in getattr(model, "peft_config", None) or {}}
    for layer in _tuner_layers(model):
        held: list[Any] = [getattr(layer, kind, None) for kind in layer.adapter_layer_names]
        for name in dict.fromkeys(name for each in held if hasattr(each, "keys") for name in each.keys()):  # noqa: SIM118
            layers.setdefault(name, []).append(layer)
    containers = _containers(model)
    trained = {_adapter_of(name, containers) for name, each in model.named_parameters() if each.requires_grad}
    return [_adapter(name, own, name in trained, model) for name, own in layers.items()]


def _adapter(name: str, layers: list[BaseTunerLayer], trainable: bool, model: nn.Module) -> Adapter:
    config = (getattr(model, "peft_config", None) or {}).get(name)
    kind = getattr(config, "peft_type", None) or ("LORA" if any(isinstance(x, LoraLayer) for x in layers) else None)
    targets = getattr(config, "target_modules", None) or []
    active = any(name in layer.active_adapters and not layer.disable_adapters for layer in layers)
    return Adapter(
        name=name,
        kind=str(getattr(kind, "value", kind)),
        layers=len(layers),
        active=active if layers else name in active_adapters(model),
        trainable=trainable,
        merged=any(name in layer.merged_adapters for layer in layers),
        rank=getattr(config, "r", None),
        alpha=getattr(config, "lora_alpha", None),
        targets=[targets] if isinstance(targets, str) else sorted(targets),
        options=[_option(option, value) for option in _OPTIONS if (value := getattr(config, option, None))],
    )


def _option(name: str, value: Any) -> str:
    if value is True:
        return name
    return f"{name}={dict(value) if isinstance(value, dict) else sorted(map(str, value))}"


def _grouped(pairs: list[LoRAPair]) -> list[PairGroup]:
    groups: dict[tuple[str, int, int, int, int, float, str], list[str]] = {}
    for pair in pairs:
        r, n = pair.matrix_A(torch.empty(pair.shape_A, device="meta")).shape[-2:]
        m = pair.matrix_B(torch.empty(pair.shape_B, device="meta")).shape[-2]
        dtype = str(torch.promote_types(pair.A.dtype, pair.B.dtype)).removeprefix("torch.")
        key = (_kind(pair.layer), m, n, r, pair.batch, pair.scaling, dtype)
        several = len(pair.layer.lora_A) + len(pair.layer.lora_embedding_A) > 1
        groups.setdefault(key, []).append(f"{pair.name} ({pair.adapter_name})" if several else pair.name)
    return [PairGroup(*key, names) for key, names in groups.items()]


def _kind(layer: Any) -> str:
    """The class of the adapted layer, or the parameter of a module."""
    parameter = getattr(layer, "parameter_name", None)
    return type(layer.get_base_layer()).__name__ + (f".{parameter}" if parameter and parameter != "weight" else "")


def _ordinary(model: nn.Module, pairs: list[LoRAPair], refusals: list[Refusal]) -> list[tuple[str, nn.Parameter]]:
    """Trainable parameters outside the pairs, by name, without the factors of refused layers."""
    of_pairs = {id(p) for pair in pairs for p in (pair.A, pair.B, *pair.tied_parameters)}
    refused = tuple(f"{refusal.name}." for refusal in refusals if refusal.name)
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in of_pairs
        and not (name.startswith(refused) and "lora_" in name.rpartition(".base_layer.")[2])
    ]


def _by_kind(named: list[tuple[str, nn.Parameter]]) -> list[Ordinary]:
    groups: dict[str, list[int]] = {}
    for name, parameter in named:
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removeprefix(PREFIX))
        if ".lora_magnitude_vector." in kind:
            kind = "*.lora_magnitude_vector (DoRA)"
        groups.setdefault(kind, []).append(parameter.numel())
    return [Ordinary(name, len(sizes), sum(sizes)) for name, sizes in groups.items()]


def _reasons(refusals: list[Refusal]) -> list[Unsupported]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, kind, error in refusals:
        reason = str(error)
        for opening in (f"{name} ({kind}): ", f"{name}: ") if name else ():
            reason = reason.removeprefix(opening)
        groups.setdefault((reason, kind), []).extend([name] if name else [])
    return [Unsupported(reason, kind, names) for (reason, kind), names in groups.items()]


def _notes(pairs: list[LoRAPair]) -> list[str]:
    tied = sum(len(pair.tied_parameters) // 2 for pair in pairs)
    notes = [f"{tied} more layers share the factors of another and count as one pair with it."] if tied else []
    if any(min(pair.A.element_size(), pair.B.element_size()) < 4 for pair in pairs):
        notes.append(
            "Factors in 16 bits lose small steps: set lora_pro_master_factors (LoRAProConfig(master_factors=True)), "
            "which keeps float32 copies, 4 bytes more for each element of a factor."
        )
    return notes
