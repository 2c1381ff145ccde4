"""Which adapters can be aggregated, and how do their tensors hold the factors?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorapro_hf.utils.text_files import shortened, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR_A = re.compile(r"(.+)\.lora_(?:A((?:\.[^.]+)?\.weight)|(embedding_)A((?:\.[^.]+)?))")
_FACTOR_OR_BIAS = re.compile(r".+\.lora_(?:embedding_)?[AB](?:\.[^.]+)?(?:\.weight|\.bias)?")
_BIAS = re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.bias")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Adapters that differ in these are of different base models, or compute different functions of their tensors.
_SHARED = "base_model_name_or_path revision fan_in_fan_out target_parameters layer_replication use_dora use_qalora"
_SHARED += " use_bdlora qalora_group_size trainable_token_indices alora_invocation_tokens"


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter, and its settings if they are known.

    Args:
        name: the folder, or the place in a list, for messages.
        tensors: the state dict.
        config: PEFT's settings; without them all scalings are taken as equal.
    """

    name: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    config: LoraConfig | None = None

    def rank_and_scaling(self, module: str) -> tuple[int | None, float, list[str]]:
        """Rank and scaling of a module by the settings, and the parameters of `target_parameters` that it wraps."""
        config = self.config
        if config is None:
            return None, 1.0, []
        targets = {target: target.rpartition(".")[2] for target in config.target_parameters or ()}
        wrapped = [last for target, last in targets.items() if f".{module}.{last}".endswith(f".{target}")]
        found = set()
        for name in [f"{module}.{each}" for each in wrapped] or [module]:
            r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
            found.add((r, alpha))
        if len(found) > 1:
            raise ValueError(
                f"{self.name}: the parameters {wrapped} of {module} have ranks or alphas of their own, and the file "
                "does not tell which tensor belongs to which. Train them with one rank and one alpha."
            )
        r, alpha = found.pop()
        return r, alpha / (math.sqrt(r) if config.use_rslora else r), wrapped


class Layer(NamedTuple):
    """The pair of factors of a module, or `batch` pairs where experts or groups of a convolution are packed."""

    module: str
    key_A: str
    key_B: str
    batch: int
    is_experts: bool

    def matrices(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """B `(..., m, r)` and A `(..., r, n)` of an adapter in float64 on the CPU."""
        B, A = (adapter.tensors[key].detach().cpu().double() for key in (self.key_B, self.key_A))
        A = A.flatten(1)
        if self.is_experts:  # PEFT packs the experts innermost here and outermost in A
            B = B.unflatten(-1, (-1, self.batch)).movedim(-1, -3)
        elif self.batch > 1:
            B = B.flatten(1).unflatten(0, (self.batch, -1))
        else:
            return B.flatten(1), A
        return B, A.unflatten(0, (self.batch, -1))

    def factors(self, B: Tensor, A: Tensor, like: Adapter) -> dict[str, Tensor]:
        """The entries of a state dict for B and A, of the dtype and the layout that an adapter has, and of any rank."""
        if self.is_experts:
            B = B.movedim(-3, -1).flatten(-2)
        first_A, first_B = (like.tensors[key] for key in (self.key_A, self.key_B))
        A = A.reshape(-1, *first_A.shape[1:])
        B = B.reshape(len(first_B), -1, *first_B.shape[2:])
        return {self.key_A: A.to(first_A), self.key_B: B.to(first_B)}


def read_adapter(folder: str | Path) -> Adapter:
    """Read the adapter that PEFT has saved in a folder; nothing is unpickled.

    Raises:
        ValueError: there is no LoRA adapter, or its files cannot be read.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        fault = f"has no {CONFIG}" if path.is_dir() else "is no folder"
        raise ValueError(f"{folder} {fault}: name the folder of a saved adapter; `hf download NAME` fetches one.")
    if not (path / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} has no {WEIGHTS}; pickled weights are not read. Load the adapter with PEFT, and save it by "
            "save_pretrained."
        )
    try:
        config = PeftConfig.from_pretrained(str(path))
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"cannot read the adapter in {folder}: {shortened(str(error), 500)} Save it again.") from error
    return Adapter(str(folder), tensors, require_lora(config, str(folder)))


def require_lora(config: Any, name: str) -> LoraConfig:
    """The settings, unless a `ValueError` says that they are of another kind of adapter."""
    kind = getattr(config, "peft_type", type(config).__name__)
    if not isinstance(config, LoraConfig) or kind != "LORA":
        raise ValueError(f"{name} is an adapter of the kind {getattr(kind, 'value', kind)}: only LoRA is aggregated.")
    return config


def find_layers(adapters: Sequence[Adapter], method: str) -> list[Layer]:
    """The layers of adapters, once all are known to fit together for a method.

    Raises:
        ValueError: the adapters differ in base model, names or shapes, a value is not finite, or the method would be
            wrong for a layer; the message names adapter and tensor.
    """
    first = adapters[0]
    for other in adapters[1:]:
        _require_same_names(first, other)
        _require_same_settings(first, other)
    if method != "mean" and getattr(first.config, "use_bdlora", None):
        raise ValueError(
            f"{first.name} has use_bdlora: its factors are block-diagonal, so that {method!r} has no meaning. Average "
            'them by the method "mean".'
        )
    for key in first.tensors:
        _require_meaning(first, key, method)
    layers = [_layer(first, match) for key in first.tensors if (match := _FACTOR_A.fullmatch(key))]
    if not layers:
        raise ValueError(f"{first.name} has no LoRA factors: name state dicts or folders of LoRA adapters.")
    for adapter in adapters:
        _require_same_shapes(first, adapter, layers, method)
        for key, tensor in adapter.tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{adapter.name}: {key} holds NaN or Inf. Leave this adapter out, or train it again.")
    return layers


def bias_module(key: str) -> str | None:
    """The module whose `lora_bias` a tensor is; such a bias counts times the scaling, as B does."""
    match = _BIAS.fullmatch(key)
    return match and _plain(match[1])


def _plain(module: str) -> str:
    """The name of a module in the base model."""
    return re.sub(r"\.base_layer\b", "", module.removeprefix("base_model.model."))


def _layer(first: Adapter, match: re.Match[str]) -> Layer:
    place, tail, kind, embedding_tail = match.groups(default="")
    key_A, key_B, module = match[0], f"{place}.lora_{kind}B{tail}{embedding_tail}", _plain(place)
    if key_B not in first.tensors:
        raise ValueError(f"{first.name} has {key_A} without {key_B}: it was not saved whole; save it again.")
    rank, _, wrapped = first.rank_and_scaling(module)
    rows, columns = len(first.tensors[key_A]), first.tensors[key_B].shape[1]
    return Layer(module, key_A, key_B, max(1, rows // ((rank if wrapped else columns) or 1)), bool(wrapped))


def _require_same_names(first: Adapter, other: Adapter) -> None:
    for key in sorted(first.tensors.keys() ^ other.tensors.keys()):
        has, lacks = (first, other) if key in first.tensors else (other, first)
        if "lora_magnitude_vector" in key:
            raise ValueError(
                f"{has.name} is a DoRA adapter ({key}), and {lacks.name} is not: set use_dora alike in all trainings."
            )
        raise ValueError(
            f"{has.name} has {key}, and {lacks.name} has not: aggregate adapters with the same "
            "target_modules and modules_to_save."
        )


def _require_same_settings(first: Adapter, other: Adapter) -> None:
    for name in _SHARED.split() if first.config and other.config else ():
        values = [_comparable(getattr(each.config, name, None)) for each in (first, other)]
        if values[0] != values[1]:
            remedy = "Aggregate adapters of one base model with equal settings."
            if name == "base_model_name_or_path":
                remedy = f"If both are the same model, write one name into {CONFIG} of both."
            raise ValueError(
                f"{first.name} has {name}={shown(values[0])}, and {other.name} {shown(values[1])}. {remedy}"
            )
    inits = [changed_base(each) for each in (first, other)]
    if inits[0] != inits[1]:
        raise ValueError(
            f"{first.name} starts from init_lora_weights={inits[0] or 'True'!r} and {other.name} from "
            f"{inits[1] or 'True'!r}, which subtracts its factors from the base: convert that adapter on saving, by "
            "path_initial_model_for_weight_conversion."
        )


def _comparable(value: Any) -> Any:
    """A value without the order of names, and nothing for settings that are off."""
    return sorted(map(str, value)) if isinstance(value, list | set | tuple) and value else value or None


def changed_base(adapter: Adapter) -> str | None:
    """The `init_lora_weights` of an adapter whose start changes the base model."""
    init = getattr(adapter.config, "init_lora_weights", None)
    return init if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE) else None


def _require_meaning(first: Adapter, key: str, method: str) -> None:
    """Refuse tensors that the method would aggregate wrongly, or whose meaning is not known."""
    if _FACTOR_OR_BIAS.fullmatch(key) is None and ".lora_" in key and "lora_magnitude_vector" not in key:
        raise ValueError(f"{first.name}: {key} belongs to a variant of LoRA that cannot be aggregated; use plain LoRA.")
    if method == "mean":
        return
    if "lora_magnitude_vector" in key:
        raise ValueError(
            f"{first.name}: {key} is DoRA's, whose weight is no linear function of B A, so that {method!r} has no "
            'meaning. Average the factors and magnitudes by the method "mean", or train without use_dora.'
        )
    match = _FACTOR_A.fullmatch(key)
    if first.config is None and match and _plain(match[1]).rpartition(".")[2] == "experts":
        raise ValueError(
            f"{key} may hold the factors of several experts. Give the LoraConfig of the adapters as config, or name "
            "folders instead of state dicts."
        )


def _require_same_shapes(first: Adapter, adapter: Adapter, layers: Sequence[Layer], method: str) -> None:
    for key, shape in _shapes(first, layers, method):
        if dict(_shapes(adapter, layers, method, key))[key] != shape:
            raise ValueError(
                f"{key} is {tuple(first.tensors[key].shape)} in {first.name} and {tuple(adapter.tensors[key].shape)} "
                f"in {adapter.name}: these are adapters of different base models."
            )
    for layer in layers:
        rank, own_rank = (len(each.tensors[layer.key_A]) // layer.batch for each in (first, adapter))
        if rank != own_rank and method != "exact":
            raise ValueError(
                f"{layer.module} has rank {rank} in {first.name} and {own_rank} in {adapter.name}. The method "
                '"exact" takes different ranks; its rank argument (--rank) shortens the result.'
            )
        stated, _, wrapped = adapter.rank_and_scaling(layer.module)
        inner = adapter.tensors[layer.key_B].shape[1]
        if stated is not None and own_rank * (1 if wrapped else layer.batch) != stated:
            raise ValueError(
                f"{adapter.name}: {layer.key_A} has rank {own_rank * layer.batch}, but {CONFIG} says {stated}: the "
                "files are of two adapters. Save the adapter again."
            )
        if own_rank * (layer.batch if wrapped else 1) != inner:
            raise ValueError(
                f"{adapter.name}: {layer.key_A} and {layer.key_B} do not belong together. Save the adapter again."
            )


def _shapes(
    adapter: Adapter, layers: Sequence[Layer], method: str, only: str | None = None
) -> Iterator[tuple[str, list[int]]]:
    """The shapes of the tensors without the dimensions that depend on the rank."""
    rank_dims = {layer.key_A: 0 for layer in layers} | {layer.key_B: 1 for layer in layers}
    for key in adapter.tensors if only is None else (only,):
        shape = list(adapter.tensors[key].shape)
        if key in rank_dims and len(shape) > 1:
            shape[rank_dims[key]] = 0
        yield key, shape
