"""Which layers compute with a pair's factors, and by which way does each one's weight get its gradient?

Hooks on the layer need no weight at all and therefore work over quantised ones. Where the gradient is no product of the
layer's input and output gradient, autograd computes it: for a stand-in parameter that shares the weight's memory, or
for the weight that PEFT has merged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorapro_hf.factors.pairs import LoRAPair, address, find_lora_pairs
from lorapro_hf.factors.recording import Recording

_TORCH_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AdaptedWeight(NamedTuple):
    """The weight of one layer that holds a pair's factors.

    Attributes:
        pair: the factors, as this layer holds them.
        transposed: whether the layer holds A and B in each other's place.
        attention: the `nn.MultiheadAttention` around the layer, for whose forward PEFT merges factors and weight.
    """

    pair: LoRAPair
    transposed: bool = False
    attention: Any = None

    def record(self, recording: Recording) -> None:
        """Have a recording add the gradient of each backward pass."""
        if self.attention is not None:
            recording.keep(self.attention.register_forward_pre_hook(partial(self._watch_merged, recording)))
        elif self._is_product:  # under DoRA the output of the quantised layer alone is W x
            recording.listen(self.pair, self._base if self._has_dora else None, self.transposed)
        else:
            recording.keep(_StandIn(self._base, self._name, partial(self._add, recording)))

    def refusal(self) -> str | None:
        """Why the gradient cannot be computed; `None` where it can."""
        if not self._is_quantised:
            return None
        if not self._is_product:
            return "its parameter is quantised, which autograd cannot differentiate. Load the model unquantised"
        if self._has_dora and has_active_dropout(self.pair):
            return "DoRA reads the quantised weight itself while dropout is on. Call model.eval() before"
        return None

    @property
    def _base(self) -> Any:
        return self.pair.layer.get_base_layer()

    @property
    def _name(self) -> str:
        default = "in_proj_weight" if self.attention is self._base else "weight"
        return str(getattr(self.pair.layer, "parameter_name", default))

    @property
    def _is_quantised(self) -> bool:
        weight = getattr(self._base, self._name, None)  # GPTQ has none of that name
        return weight is None or not weight.is_floating_point()

    @property
    def _has_dora(self) -> bool:
        layer: Any = self.pair.layer
        return any(layer.use_dora.get(name, False) for name in layer.active_adapters)

    @property
    def _is_product(self) -> bool:
        """Whether the gradient is the product of the layer's output gradient and input."""
        base = self._base
        if type(self.pair.layer).__name__ == "ParamWrapper":
            return False
        if self._is_quantised:
            return True
        overrides = any(isinstance(base, kind) and type(base).forward is not kind.forward for kind in _TORCH_LAYERS)
        return not (overrides or self._has_dora or getattr(base, "scale_grad_by_freq", False))

    def _add(self, recording: Recording, gradient: Tensor) -> None:
        """Add a gradient that is shaped like the weight."""
        layer: Any = self.pair.layer
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        if self.pair.layout == "experts":
            turned = not getattr(layer, "_did_swap_in_out_features", False)
        else:
            turned = self.pair.adapter_name in layer.lora_embedding_A or getattr(layer, "fan_in_fan_out", False)
        gradient = gradient.mT if turned != self.transposed else gradient
        recording.add_gradient(gradient.reshape(recording.gradient.shape))

    def _watch_merged(self, recording: Recording, module: Any, args: Any) -> None:
        if torch.is_grad_enabled() and not self.pair.layer.disable_adapters:
            weight = getattr(self._base, self._name).requires_grad_()
            weight.register_hook(partial(self._add, recording))


class _StandIn:
    """A parameter that takes a frozen weight's place and memory, and hands its gradient on, until `remove`."""

    def __init__(self, module: nn.Module, name: str, take: Callable[[Tensor], None]) -> None:
        self._module, self._name, self._weight, self._take = module, name, getattr(module, name), take
        parameter = nn.Parameter(self._weight.detach())
        parameter.register_post_accumulate_grad_hook(self._hand_on)
        setattr(module, name, parameter)

    def _hand_on(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._take(parameter.grad)
        parameter.grad = None

    def remove(self) -> None:
        setattr(self._module, self._name, self._weight)


class AdaptedLayer(NamedTuple):
    """A layer with its pairs, one for each active adapter, and the weights of all layers with the same factors."""

    pairs: list[LoRAPair]
    weights: list[AdaptedWeight]


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The layers of all pairs, in the order of `find_lora_pairs`.

    Raises:
        ValueError: the gradient of a weight cannot be computed, or `find_lora_pairs` refuses the model.
    """
    attention, holders = _attention_around(model), holders_of_factors(model)
    layers: dict[tuple[tuple[int, bool], ...], AdaptedLayer] = {}
    for pair in find_lora_pairs(model):
        sharing = [(each, False) for each in holders[address(pair.A)]]
        sharing += [(each, True) for each in holders.get(address(pair.B), [])]
        weights = [
            AdaptedWeight(pair if each.layer is pair.layer else each, transposed, attention.get(id(each.layer)))
            for each, transposed in sharing
        ]
        for weight in weights:
            if (reason := weight.refusal()) is not None:
                raise ValueError(f"{weight.pair.name}: its gradient cannot be computed, because {reason}.")
        key = tuple((id(each.layer), transposed) for each, transposed in sharing)
        layers.setdefault(key, AdaptedLayer([], weights)).pairs.append(pair)
    return list(layers.values())


def holders_of_factors(model: nn.Module) -> dict[int, list[LoRAPair]]:
    """The layers that hold each A, by its address, each as a pair of its own."""
    from peft.tuners.lora import LoraLayer

    holders: dict[int, list[LoRAPair]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter_name in layer.active_adapters:
                if adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A:
                    pair = LoRAPair(name, layer, adapter_name)
                    holders.setdefault(address(pair.A), []).append(pair)
    return holders


def has_active_dropout(pair: LoRAPair) -> bool:
    """Whether A sees another input than the weight, as dropout is on."""
    layer: Any = pair.layer
    if pair.adapter_name in layer.lora_embedding_A:
        return False
    dropout = layer.lora_dropout[pair.adapter_name]
    return bool(dropout.training and getattr(dropout, "p", 0.0) > 0)


def merging_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights PEFT replaces in each forward pass by rounded ones."""
    attention = {id(base): base for base in _attention_around(model).values()}
    return [module for base in attention.values() for module in (base, base.out_proj.get_base_layer())]


def _attention_around(model: nn.Module) -> dict[int, Any]:
    """The `nn.MultiheadAttention` of each PEFT layer that is computed inside one, by the layer's `id`."""
    from peft.tuners.lora import LoraLayer

    found: dict[int, Any] = {}
    for module in model.modules():
        base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if isinstance(base, nn.MultiheadAttention):
            found |= {id(module): base, id(base.out_proj): base}
    return found
