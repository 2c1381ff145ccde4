"""How does a forward pass run with another weight or with other factors, while no parameter is written to?

The factors of a layer are replaced for the time of its forward pass. A change of low rank of the frozen weight becomes
further rows of A and columns of B: on CPUs a thin product takes about as long at three times the rank, and the layer
reads its input and writes its output once. Where factors do not see the whole input (dropout, variants), the change is
computed beside the layer and added to its output. Gradient checkpointing runs all of this again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.utils.private_names import private

Changed = Callable[[], tuple[Tensor, Tensor]]  # gives A and B to compute with, in the shapes of their parameters
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WithGradients:
    """Whether the present forward pass of a model was begun with gradients; those for evaluation and sampling are not.

    The layers cannot tell: reentrant gradient checkpointing runs them without gradients first.
    """

    def __init__(self) -> None:
        self._begun: list[bool] = []

    def __bool__(self) -> bool:
        return self._begun[0] if self._begun else True

    @contextmanager
    def watching(self, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """Watch the modules that contain all layers of these names."""
        paths = [name.split(".")[:-1] for name in names]
        common = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), None)
        shared = paths[0][: min(map(len, paths)) if common is None else common]
        with ExitStack() as hooks:
            for module in {model.get_submodule(".".join(shared[:depth])) for depth in range(len(shared) + 1)}:
                before = module.register_forward_pre_hook(lambda *_: self._begun.append(torch.is_grad_enabled()))
                after = module.register_forward_hook(lambda *_: self._end(), always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            hooks.callback(self._begun.clear)
            yield

    def _end(self) -> None:
        if self._begun:
            self._begun.pop()


def require_perturbable(pairs: Sequence[LoRAPair], method: str) -> None:
    """Raise a `ValueError` that names a pair whose layer cannot compute with another weight or other factors."""
    for pair in pairs:
        if type(pair.layer).__name__ == "MultiheadAttention":
            reason = "PEFT merges the factors into its weight for each pass"
        elif pair.tied_parameters:
            reason = "it shares its factors with another layer"
        else:
            continue
        raise ValueError(
            f"{pair.name}: {method} cannot change its forward pass, because {reason}. Leave it out of "
            "target_modules (exclude_modules)."
        )


def add_to_weight(pair: LoRAPair, left: Tensor, right: Tensor, is_on: WithGradients, hooks: ExitStack) -> None:
    """Have the layer of a pair compute with `W + leftᵀ right`, until `hooks` is closed.

    Gradients flow to the layer's input and, as for the changed weight, to the factors.

    Args:
        pair: the layer and the shapes of its weight.
        left: `(k, m)`, or `(batch, k, m)` where pairs are packed.
        right: `(k, n)`, or `(batch, k, n)`.
        is_on: whether a pass is changed.
        hooks: takes the callbacks that remove the hooks.
    """
    if not _drops_inputs(pair):
        replace_factors(pair, lambda: _extended(pair, left, right), is_on, hooks)
        return
    cast: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def beside(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if not _acts(pair, is_on):
            return None
        where = output.device, output.dtype
        if where not in cast:
            cast[where] = left.to(output), right.to(output)
        with torch.autocast(output.device.type, enabled=False):
            return _plus(output, args[0] if args else kwargs["x"], *cast[where], pair)

    handle = pair.layer.register_forward_hook(beside, with_kwargs=True, prepend=True)
    hooks.callback(handle.remove)


def _drops_inputs(pair: LoRAPair) -> bool:
    """Whether the factors may see less of the input than the weight does."""
    layer: Any = pair.layer
    variant = type(getattr(layer, "lora_variant", {}).get(pair.adapter_name)).__name__
    if variant != "NoneType":
        return not variant.startswith("Dora")
    return pair.adapter_name in layer.lora_A and not isinstance(layer.lora_dropout[pair.adapter_name], nn.Identity)


def replace_factors(pair: LoRAPair, changed: Changed, is_on: WithGradients, hooks: ExitStack) -> None:
    """Have the layer of a pair compute with other factors, made from the parameters, until `hooks` is closed.

    The parameters are in their places again whenever the layer's forward pass has ended, also by an exception.
    """
    kept: list[tuple[Tensor, Tensor]] = []

    def before(*_: Any) -> None:
        if _acts(pair, is_on) and not kept:
            kept.append((pair.A, pair.B))
            _put(pair, changed())

    def after(*_: Any) -> None:
        if kept:
            _put(pair, kept.pop())

    handles = pair.layer.register_forward_pre_hook(before), pair.layer.register_forward_hook(after, always_call=True)
    for handle in handles:
        hooks.callback(handle.remove)


def _acts(pair: LoRAPair, is_on: WithGradients) -> bool:
    """Whether a pass is changed; one with another adapter, or without one (a reference model's), is not."""
    layer = pair.layer
    return bool(is_on) and not (
        layer.disable_adapters or layer.merged or pair.adapter_name not in layer.active_adapters
    )


def _put(pair: LoRAPair, factors: tuple[Tensor, Tensor]) -> None:
    layer, name = pair.layer, pair.adapter_name
    for letter, factor in zip("AB", factors, strict=True):
        holder = layer._modules[f"lora_{letter}"]._modules.get(name)
        if holder is None:
            layer._modules[f"lora_embedding_{letter}"]._parameters[name] = factor
        else:
            holder._parameters["weight"] = factor  # a plain tensor in the place of the parameter


def _extended(pair: LoRAPair, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of a higher rank with `s B' A' = s B A + leftᵀ right`."""
    A, B = pair.A, pair.B
    matrix_A = torch.cat([pair.matrix_A(A), right.to(A.dtype)], dim=-2)
    matrix_B = torch.cat([pair.matrix_B(B), (left / pair.scaling).mT.to(B.dtype)], dim=-1)
    if pair.layout == "experts":
        matrix_B = matrix_B.movedim(-3, -1)
    return matrix_A.reshape(-1, *A.shape[1:]), matrix_B.reshape(len(B), -1, *B.shape[2:])


def _plus(output: Tensor, x: Tensor, left: Tensor, right: Tensor, pair: LoRAPair) -> Tensor:
    """`output + x rightᵀ left` for a linear layer or a convolution."""
    base = pair.layer.get_base_layer()
    if isinstance(base, _CONVOLUTIONS):
        dense = copy.copy(base)
        dense.groups = 1  # LoRA's A sees all inputs
        between = private(dense, "_conv_forward")(x.to(output.dtype), right.reshape(-1, *pair.A.shape[1:]), None)
        batch = pair.batch if left.dim() == 3 else 1
        kernel = left.mT.reshape(-1, right.shape[-2], *(1,) * len(base.kernel_size))
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(base.kernel_size) - 1]
        return output + convolution(between, kernel, groups=batch)
    # PEFT's last operation is a sum or a cast, which keeps no output; a copy would cost as much as both products.
    is_own = output.grad_fn is None or output.grad_fn.name() in ("AddBackward0", "ToCopyBackward0")
    if is_own and output.is_contiguous():
        added_to: Tensor = _AddProduct.apply(output, x, left, right, True)
        return added_to
    # Reshaped out here: autograd forbids the next operation to write to a view that a Function returns.
    flat: Tensor = _AddProduct.apply(output.reshape(-1, output.shape[-1]), x, left, right, False)
    return flat.view(output.shape)


class _AddProduct(torch.autograd.Function):
    """`output + x rightᵀ left`, which keeps neither x nor what lies between."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, left: Tensor, right: Tensor, in_place: bool) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.dtype, ctx.shape = x.dtype, x.shape
        between = x.reshape(-1, x.shape[-1]).to(output.dtype) @ right.mT
        if not in_place:
            return torch.addmm(output, between, left)
        ctx.mark_dirty(output)
        output.view(-1, output.shape[-1]).addmm_(between, left)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[1]:
            return dy, None, None, None, None
        left, right = ctx.saved_tensors
        dx = (dy.reshape(-1, dy.shape[-1]) @ left.mT) @ right
        return dy, dx.view(ctx.shape).to(ctx.dtype), None, None, None
