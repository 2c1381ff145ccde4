"""How is the gradient of a frozen weight summed up, which no backward pass computes?

It is `g = Σ dYᵀ X` over the backward passes, with the input X of the PEFT layer and the gradient dY of its output.
While a layer is recorded, its output passes through an identity that saves X and, when dY arrives, adds to a buffer.
Gradient checkpointing treats X like any other activation: X is recomputed with its layer and counted once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import exact_arithmetic
from lorapro_hf.functional.projection import compute_dtype

BLOCK_ELEMENTS = 2**20  # of a matrix of the size of a weight, computed at a time
SMALLEST_BLOCK = 256  # tokens at a time: each block reads and writes the whole gradient
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Recording:
    """The gradient of one adapted weight, summed up until `stop`.

    Args:
        pair: the factors of the weight.
        dtype: of the sum; by default float32, or float64 for float64 factors.

    Attributes:
        pair: the same.
        gradient: `weight_shape(pair)`, the sum so far.
        passes: how many backward passes have been added.
        lost: whether one could not be, as the model has overwritten the layer's input before the pass.
    """

    def __init__(self, pair: LoRAPair, dtype: torch.dtype | None = None) -> None:
        self.pair = pair
        self.gradient = torch.zeros(weight_shape(pair), dtype=dtype or buffer_dtype(pair), device=pair.A.device)
        self.passes, self.lost = 0, False
        self._handles: list[Any] = []

    def listen(self, pair: LoRAPair, module: nn.Module | None = None, transposed: bool = False) -> Recording:
        """Add each backward pass of a pair's layer.

        Args:
            pair: the recording's own, or one of another layer that holds the same factors.
            module: the module whose output gradient is that of `W x`; by default the whole PEFT layer.
            transposed: whether the other layer holds A and B in each other's place.
        """
        hook = partial(self._tap, pair, transposed)
        self.keep((module or pair.layer).register_forward_hook(hook, with_kwargs=True, prepend=True))
        return self

    def keep(self, handle: Any) -> None:
        """Have `stop` call the `remove` of a hook."""
        self._handles.append(handle)

    def stop(self) -> None:
        """Remove all hooks; the sum stays."""
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor, pair: LoRAPair | None = None, transposed: bool = False) -> None:
        """Add one backward pass.

        Args:
            x: the layer's input: features `(..., n)`, token numbers `(...)`, or images of a convolution.
            dy: the gradient of its output.
            pair: whose layer it is, by default the recording's own.
            transposed: see `listen`.
        """
        self.passes += 1
        layer: Any = (pair or self.pair).layer
        target = self.gradient.mT if transposed else self.gradient
        with exact_arithmetic([target]):
            if isinstance(layer.get_base_layer(), _CONVOLUTIONS):
                target += _convolution_gradient(layer.get_base_layer(), x.to(target), dy.to(target)).view_as(target)
            else:
                _add_product(target, x, dy, padding_row(pair or self.pair))

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor) -> None:
        """Add a gradient that autograd has computed, shaped like `gradient`."""
        self.passes += 1
        self.gradient += gradient

    def _tap(
        self,
        pair: LoRAPair,
        transposed: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        layer = pair.layer
        if not torch.is_grad_enabled():
            return None  # evaluation, or the pass that checkpointing will repeat
        if layer.disable_adapters or layer.merged or pair.adapter_name not in layer.active_adapters:
            return None  # the factors have no part in it, as in the pass of a reference model
        x = args[0] if args else kwargs["x"]
        anchor = torch.zeros(
            (), device=output.device, requires_grad=True
        )  # the output of frozen layers has no gradient
        out: Tensor = _Tap.apply(output, x.detach(), anchor, partial(self.add, pair=pair, transposed=transposed), self)
        return out


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
            ctx.recording.lost = True  # without the tap no operation would have needed x
        else:
            ctx.add(x, dy)
        return dy, None, None, None, None


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


def buffer_dtype(pair: LoRAPair) -> torch.dtype:
    """The dtype in which a pair's gradient is summed up: float32, or float64 for float64 factors."""
    return compute_dtype(pair.A, pair.B)


def buffer_bytes(pair: LoRAPair, dtype: torch.dtype | None = None) -> int:
    """The memory of one recording."""
    return math.prod(weight_shape(pair)) * (dtype or buffer_dtype(pair)).itemsize


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix, as many at a time as have about `BLOCK_ELEMENTS` elements."""
    step = max(1, BLOCK_ELEMENTS // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, matrix.shape[0], step))
