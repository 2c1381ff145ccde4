"""How is the gradient of a frozen weight summed up, which no backward pass computes?

It is `g = Σ dYᵀ X` over the backward passes, with the input X of the PEFT layer and the gradient dY of its output.
While a layer is recorded, its output passes through an identity that saves X and adds to a buffer when dY arrives.
Gradient checkpointing treats X like any other activation: X is recomputed with its layer and counted once.

These hooks need no weight and therefore work over quantised ones. Where the gradient is no such product, autograd
computes it for a stand-in parameter that shares the weight's memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorapro_hf.factors.pairs import LoRAPair, address, find_lora_pairs
from lorapro_hf.factors.stacks import exact_arithmetic
from lorapro_hf.functional.bases import compute_dtype

BLOCK_ELEMENTS = 2**20  # of a matrix of the size of a weight, computed at a time
SMALLEST_BLOCK = 256  # tokens at a time: each block reads and writes the whole gradient
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TORCH_LAYERS = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)


class Recording:
    """The gradient of one adapted weight, summed up until `stop`.

    Args:
        pair: the factors of the weight.
        dtype: of the sum; by default float32, or float64 for float64 factors.

    Attributes:
        gradient: the sum so far, shaped like `B @ A`.
        passes: how many backward passes have been added.
        lost: whether the model has overwritten the layer's input before a pass, which could not be added.
        hooks: removes all hooks when it is closed.
    """

    def __init__(self, pair: LoRAPair, dtype: torch.dtype | None = None) -> None:
        self.pair = pair
        dtype = dtype or compute_dtype(pair.A, pair.B)
        self.gradient = torch.zeros(weight_shape(pair), dtype=dtype, device=pair.A.device)
        self.passes, self.lost = 0, False
        self.hooks = ExitStack()

    def listen(self, pair: LoRAPair, module: nn.Module | None = None, transposed: bool = False) -> Recording:
        """Add each backward pass of a pair's layer, and return this recording.

        Args:
            pair: the recording's own, or one of another layer that holds the same factors.
            module: the module whose output gradient is that of `W x`; by default the whole PEFT layer.
            transposed: whether the other layer holds A and B in each other's place.
        """
        hook = partial(self._tap, pair, transposed)
        handle = (module or pair.layer).register_forward_hook(hook, with_kwargs=True, prepend=True)
        self.hooks.callback(handle.remove)
        return self

    def stop(self) -> None:
        """Remove all hooks; the sum stays."""
        self.hooks.close()

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor, pair: LoRAPair | None = None, transposed: bool = False) -> None:
        """Add one backward pass of a layer; `pair` and `transposed` as in `listen`.

        Args:
            x: the layer's input: features `(..., n)`, token numbers `(...)`, or images of a convolution.
            dy: the gradient of its output.
            pair: by default the recording's own.
            transposed: by default False.
        """
        self.passes += 1
        pair = pair or self.pair
        base = pair.layer.get_base_layer()
        target = self.gradient.mT if transposed else self.gradient
        with exact_arithmetic([target]):
            if isinstance(base, _CONVOLUTIONS):
                target += _convolution_gradient(base, x.to(target), dy.to(target)).view_as(target)
            else:
                _add_product(target, x, dy, padding_row(pair))

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor) -> None:
        """Add a gradient that autograd has computed, shaped like `gradient`."""
        self.passes += 1
        self.gradient += gradient

    def _tap(self, pair: LoRAPair, transposed: bool, module: Any, args: Any, kwargs: Any, output: Tensor) -> Any:
        layer = pair.layer
        if not torch.is_grad_enabled():
            return None  # evaluation, or the pass that checkpointing will repeat
        if layer.disable_adapters or layer.merged or pair.adapter_name not in layer.active_adapters:
            return None  # the factors have no part in it, as in the pass of a reference model
        x = args[0] if args else kwargs["x"]
        # The output of frozen layers has no gradient without it.
        anchor = torch.zeros((), device=output.device, requires_grad=True)
        return _Tap.apply(output, x.detach(), anchor, partial(self.add, pair=pair, transposed=transposed), self)


class _Tap(torch.autograd.Function):
    """The identity on a layer's output. A copy, not a view: the next operation may write to it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, add: Any, recording: Recording) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add, ctx.recording = add, recording
        return output.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        try:
            (x,) = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            ctx.recording.lost = True  # no operation but the tap needs x
        else:
            ctx.add(x, dy)
        return dy, None, None, None, None


class AdaptedWeight(NamedTuple):
    """The weight of one layer that holds a pair's factors, A and B in each other's place if `transposed`."""

    pair: LoRAPair
    transposed: bool

    def record(self, recording: Recording) -> None:
        """Have a recording add the gradient of each backward pass."""
        if self._is_product:  # under DoRA the output of the quantised layer alone is W x
            recording.listen(self.pair, self._base if self._has_dora else None, self.transposed)
        else:
            self._watch_stand_in(recording)

    def refusal(self) -> str | None:
        """Why the gradient cannot be computed; `None` where it can."""
        if type(self.pair.layer).__name__ == "MultiheadAttention":
            return "PEFT merges the factors into its weight for each pass. Leave it out of target_modules"
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
        return str(getattr(self.pair.layer, "parameter_name", "weight"))

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

    def _watch_stand_in(self, recording: Recording) -> None:
        """Put a parameter in the place and memory of the frozen weight, and add its gradients."""
        module, name = self._base, self._name
        weight = getattr(module, name)
        stand_in = nn.Parameter(weight.detach())

        def hand_on(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._add(recording, parameter.grad)
            parameter.grad = None

        stand_in.register_post_accumulate_grad_hook(hand_on)
        recording.hooks.callback(setattr, module, name, weight)
        setattr(module, name, stand_in)


class AdaptedLayer(NamedTuple):
    """A layer with its pairs, one for each active adapter, and the weights of all layers with the same factors."""

    pairs: list[LoRAPair]
    weights: list[AdaptedWeight]


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The layers of all pairs, in the order of `find_lora_pairs`; a `ValueError` names one without a gradient."""
    holders = holders_of_factors(model)
    layers: dict[tuple[tuple[int, bool], ...], AdaptedLayer] = {}
    for pair in find_lora_pairs(model):
        sharing = [(each, False) for each in holders[address(pair.A)]]
        sharing += [(each, True) for each in holders.get(address(pair.B), [])]
        weights = [
            AdaptedWeight(pair if each.layer is pair.layer else each, transposed) for each, transposed in sharing
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
    """Whether dropout is on, so that A sees another input than the weight."""
    layer: Any = pair.layer
    if pair.adapter_name in layer.lora_embedding_A:
        return False
    dropout = layer.lora_dropout[pair.adapter_name]
    return bool(dropout.training and getattr(dropout, "p", 0.0) > 0)


def _add_product(target: Tensor, x: Tensor, dy: Tensor, padding: int | None) -> None:
    """Add `dYᵀ X` to a matrix `(m, n)`; casting a block of tokens at a time bounds the memory."""
    dy = dy.reshape(-1, dy.shape[-1])
    x = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1).to(dy.device)
    size = max(SMALLEST_BLOCK, BLOCK_ELEMENTS // sum(target.shape))
    for some_x, some_dy in zip(x.split(size), dy.split(size), strict=True):
        some_dy = some_dy.to(target)
        if x.is_floating_point():
            target.addmm_(some_dy.mT, some_x.to(target))
            continue
        if padding is not None:
            some_dy = some_dy.masked_fill((some_x == padding)[:, None], 0)
        target.index_add_(1, some_x, some_dy.mT)


def _convolution_gradient(layer: Any, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of a convolution's weight `(out, in, *kernel)`, as if it had one group: LoRA's A sees all inputs."""
    dense = copy.copy(layer)
    dense.groups = 1
    weight = x.new_zeros(layer.out_channels, layer.in_channels, *layer.kernel_size).requires_grad_()
    dense._parameters = {"weight": weight, "bias": None}
    with torch.enable_grad():
        out = dense.forward(x)
    return torch.autograd.grad(out, weight, dy)[0]


def padding_row(pair: LoRAPair) -> int | None:
    """The token of an embedding whose row of the weight gets no gradient."""
    return getattr(pair.layer.get_base_layer(), "padding_idx", None)


def weight_shape(pair: LoRAPair) -> tuple[int, ...]:
    """The shape of `B @ A`: `(m, n)`, or `(batch, m, n)` where pairs are packed."""
    A, B = (torch.empty(shape, device="meta") for shape in (pair.shape_A, pair.shape_B))
    return (*pair.matrix_B(B).shape[:-1], pair.matrix_A(A).shape[-1])


def buffer_bytes(pair: LoRAPair, dtype: torch.dtype | None = None) -> int:
    """The memory of one recording."""
    return math.prod(weight_shape(pair)) * (dtype or compute_dtype(pair.A, pair.B)).itemsize


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of a matrix's rows with about `BLOCK_ELEMENTS` elements each."""
    step = max(1, BLOCK_ELEMENTS // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))
