"""How does a frozen layer compute with `W + noise`, in both passes, while nothing but W is held?

The forward of the base layer is replaced for a while. Noise is made in tiles, in the forward pass and again in the
backward pass. Weights of float32 and float64 are multiplied together with their noise, at the cost of the plain
product. For other weights, and under autocast, the sum would be rounded: the noise is multiplied by itself, beside the
plain product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from lorapro_hf.factors.perturbing import WithGradients
from lorapro_hf.methods.noisy_layers import Noise, NoisyLayer
from lorapro_hf.utils.private_names import private


@contextmanager
def perturbed(layers: Sequence[tuple[NoisyLayer, Noise]], is_on: WithGradients | None) -> Iterator[None]:
    """Perturb the weights of layers within this context; their modules are as before when it ends.

    `is_on` limits this to forward passes of a training. Raises a `RuntimeError` within another such context.
    """
    with ExitStack() as replaced:
        for layer, noise in layers:
            takes_part = partial(layer.takes_part, is_on)
            if layer.is_parameter:
                activate = partial(_activate, private(layer.layer, "_activate_lora"), layer, noise, takes_part)
                replaced.enter_context(_replaced(layer.layer, "_activate_lora", activate))
            else:
                own = layer.base.forward
                forward = _FORWARDS[next(kind for kind in _FORWARDS if isinstance(layer.base, kind))]
                replaced.enter_context(
                    _replaced(layer.base, "forward", partial(_forward, own, forward, layer, noise, takes_part))
                )
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = vars(module).get(name)  # of accelerate's hooks, say
    if isinstance(before, partial) and before.func in (_forward, _activate):
        raise RuntimeError(
            "the weights are perturbed already, and a second noise would replace or add to the first. End "
            "perturbed_weights or the method's forward_context first. After an exception in a plain Trainer call the "
            "callback's release()."
        )
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


def _forward(
    own: Callable[..., Tensor],
    forward: Callable[[Callable[..., Tensor], NoisyLayer, Noise, Tensor], Tensor],
    layer: NoisyLayer,
    noise: Noise,
    takes_part: Callable[[], bool],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """The forward of a base layer: its own, unless a trained adapter takes part."""
    if not takes_part():
        return own(x, *args, **kwargs)
    if noise.scale.device != x.device:
        raise RuntimeError(
            f"{layer.name} runs on {x.device}, but its noise lies on {noise.scale.device}. Use "
            "DistributedDataParallel in the place of DataParallel, and move the model before the training."
        )
    return forward(own, layer, noise, x)


def _embedding(own: Callable[..., Tensor], layer: NoisyLayer, noise: Noise, x: Tensor) -> Tensor:
    y = own(x)
    return y + noise.rows(x.reshape(-1)).view_as(y).to(y.dtype)


def _linear(own: Callable[..., Tensor], layer: NoisyLayer, noise: Noise, x: Tensor) -> Tensor:
    if _is_exact(layer, x):
        product: Tensor = _Product.apply(x, layer.base.weight, layer.base.bias, noise, layer.is_turned)
        return product
    y = own(x)
    return y + _Product.apply(_as_computed(x), None, None, noise, layer.is_turned).to(y.dtype)


def _convolution(own: Callable[..., Tensor], layer: NoisyLayer, noise: Noise, x: Tensor) -> Tensor:
    base = layer.base
    padding = base.padding
    padded = x
    if isinstance(padding, str) or base.padding_mode != "zeros":
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        padded, padding = F.pad(x, private(base, "_reversed_padding_repeated_twice"), mode=mode), 0
    settings = {"stride": base.stride, "padding": padding, "dilation": base.dilation}
    if _is_exact(layer, x):
        convolved: Tensor = _Convolution.apply(padded, base.weight, base.bias, noise, base.kernel_size, settings)
        return convolved
    y = own(x)
    return y + _Convolution.apply(_as_computed(padded), None, None, noise, base.kernel_size, settings).to(y.dtype)


_FORWARDS: dict[type, Callable[[Callable[..., Tensor], NoisyLayer, Noise, Tensor], Tensor]] = {
    nn.Embedding: _embedding,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Module: _linear,
}


def _is_exact(layer: NoisyLayer, x: Tensor) -> bool:
    """Whether the weight and its noise are added up in the precision of the product."""
    wide = x.dtype in (torch.float32, torch.float64) and not layer.is_quantised and layer.base.weight.dtype == x.dtype
    return wide and not torch.is_autocast_enabled(x.device.type)


def _as_computed(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


class _Product(torch.autograd.Function):
    """`(W + noise) x + bias`; without W and bias `noise x`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, noise: Noise, is_turned: bool
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.noise, ctx.is_turned = noise, is_turned
        return _multiply(x, weight, bias, noise, along_rows=is_turned)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        dx = _multiply(dy, weight, None, ctx.noise, along_rows=not ctx.is_turned) if ctx.needs_input_grad[0] else None
        return dx, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, None, None


def _multiply(x: Tensor, weight: Tensor | None, bias: Tensor | None, noise: Noise, along_rows: bool) -> Tensor:
    """`x V + bias` if the sum runs along the rows of `V = W + noise`, else `x Vᵀ + bias`."""
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor | None = None
    with torch.autocast(x.device.type, enabled=False):
        for block, tile in noise.tiles(None if weight is None else weight.detach()[None]):
            tile = tile.to(x.dtype)
            if along_rows:
                start = bias if out is None else out
                some = flat[:, block]
                out = some @ tile if start is None else torch.addmm(start, some, tile)
            elif block == slice(0, noise.shape[1]):
                out = F.linear(flat, tile, bias)
            else:
                out = flat.new_empty(len(flat), noise.shape[1]) if out is None else out
                torch.mm(flat, tile.mT, out=out[:, block])
                if bias is not None:
                    out[:, block] += bias[block]
    assert out is not None
    return out.view(*x.shape[:-1], out.shape[-1])


class _Convolution(torch.autograd.Function):
    """The convolution of x with `W + noise`, plus the bias; without W and bias that with the noise."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        noise: Noise,
        kernel_size: tuple[int, ...],
        settings: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.noise, ctx.kernel_size, ctx.settings, ctx.shape = noise, kernel_size, settings, x.shape
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel_size) - 1]
        with torch.autocast(x.device.type, enabled=False):
            parts = [
                convolve(x, kernel, None if bias is None else bias[block], **settings)
                for block, kernel in _kernels(weight, noise, kernel_size, x.dtype)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1 - len(kernel_size))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None, None]:
        (weight,) = ctx.saved_tensors
        d = len(ctx.kernel_size)
        dx: Any = None
        if ctx.needs_input_grad[0]:
            of_input = (conv1d_input, conv2d_input, conv3d_input)[d - 1]
            for block, kernel in _kernels(weight, ctx.noise, ctx.kernel_size, dy.dtype):
                part = dy.movedim(-1 - d, 0)[block].movedim(0, -1 - d)
                added = of_input(ctx.shape, kernel, part, **ctx.settings)
                dx = added if dx is None else dx.add_(added)
        channels = [axis for axis in range(dy.dim()) if axis != dy.dim() - 1 - d]
        return dx, None, dy.sum(channels) if ctx.needs_input_grad[2] else None, None, None, None


def _kernels(
    weight: Tensor | None, noise: Noise, kernel_size: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    matrix = None if weight is None else weight.detach().flatten(1)[None]
    for block, tile in noise.tiles(matrix):
        yield block, tile.to(dtype).view(len(tile), -1, *kernel_size)


@contextmanager
def _activate(
    own: Callable[..., Any], layer: NoisyLayer, noise: Noise, takes_part: Callable[[], bool], *args: Any, **kwargs: Any
) -> Iterator[None]:
    """PEFT's context in which a parameter reads as `W + s B A`, with noise added to this new tensor."""
    with own(*args, **kwargs):
        if not takes_part():
            yield
            return
        chain: Any = layer.base.parametrizations[layer.layer.parameter_name]
        chain.append(_AddedNoise(noise))
        try:
            yield
        finally:
            del chain[-1]


class _AddedNoise(nn.Module):
    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, weight: Tensor) -> Any:
        return _Addition.apply(weight, self.noise)


class _Addition(torch.autograd.Function):
    """Adds noise to a tensor in place, a tile at a time."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, noise: Noise) -> Tensor:
        ctx.mark_dirty(weight)
        matrices = weight.view(noise.shape)
        for entry in range(noise.shape[0]):
            for block, tile in noise.tiles(matrices, entry):
                matrices[entry, block] = tile.to(weight.dtype)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
