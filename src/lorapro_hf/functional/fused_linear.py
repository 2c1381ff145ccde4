"""How are a linear layer and its LoRA factors computed as one, without keeping `X Aᵀ` for the backward pass?

A model's own precision stays: the base weight multiplies in the dtype of its input, the factors in theirs, or both in
that of autocast. A CPU without instructions for half precision computes such products in float32, several times as
fast, and rounds the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.benchmark.utils.timer import timer

from lorapro_hf.functional.lora_orders import Needed, Order, needs_projected, orders

_HALF = (torch.bfloat16, torch.float16)
_WIDENS = torch.backends.cpu.get_cpu_capability() == "AVX2"  # has no instructions for half precision
_ROUNDS = 3


class Precision(NamedTuple):
    """The dtypes of a layer's products and of its output."""

    base: torch.dtype
    factors: torch.dtype
    out: torch.dtype

    @classmethod
    def of(cls, base: torch.dtype, factors: torch.dtype, out: torch.dtype, device: torch.device) -> Precision:
        """The dtypes in which products of the given ones are formed on a device."""
        if _WIDENS and device.type == "cpu":
            base, factors = (torch.float32 if dtype in _HALF else dtype for dtype in (base, factors))
        return cls(base, factors, out)

    @property
    def has_range(self) -> bool:
        """Whether the gradient of a weight overflows no sooner than in float32."""
        return self.factors != torch.float16

    @property
    def can_merge(self) -> bool:
        """Whether `W + s B A` keeps small changes of the weight."""
        return self.base == self.factors and self.base in (torch.float32, torch.float64)


class Plan(NamedTuple):
    """How a layer computes: the factor in front of `B A`, dtypes and order."""

    scaling: float
    precision: Precision
    order: Order


class Layer(NamedTuple):
    """The tensors of a layer: a frozen weight `(m, n)` with its bias, or in their place the output of the base."""

    x: Tensor  # (..., n)
    weight: Tensor | None
    bias: Tensor | None
    base: Tensor | None  # (..., m)
    A: Tensor  # (r, n)
    B: Tensor  # (m, r)


def fused_linear(layer: Layer, plan: Plan) -> Tensor:
    """`X (W + s B A)ᵀ + bias`, or `base + s X (B A)ᵀ` where the base is not a plain weight.

    Args:
        layer: tensors of any floating dtypes. The gradient of the weight is not computed.
        plan: see `Plan`; only orders without merging where there is no weight.

    Returns:
        The output `(..., m)` in `plan.precision.out`. A second derivative raises an error.
    """
    # Reshaped out here: autograd forbids the next operation to write to a view that a Function returns.
    base = None if layer.base is None else _rows(layer.base)
    out: Tensor = _FusedLinear.apply(*layer._replace(x=_rows(layer.x), base=base), plan)
    return out.view(*layer.x.shape[:-1], out.shape[-1])


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, base: Any, A: Tensor, B: Tensor, plan: Plan) -> Tensor:
        needs_x, *_, needs_A, needs_B, _ = ctx.needs_input_grad
        if weight is not None and plan.precision.base.itemsize < weight.dtype.itemsize:
            weight = weight.to(plan.precision.base)  # as autocast does; kept as by PEFT's layer
        ctx.save_for_backward(x if needs_A or needs_B else None, weight if needs_x else None, A, B)
        ctx.plan, ctx.x_dtype, ctx.bias_dtype = plan, x.dtype, None if bias is None else bias.dtype
        with _without_autocast(x):
            return _forward(Layer(x, weight, bias, base, A, B), plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, A, B = ctx.saved_tensors
        wants_x, _, wants_bias, wants_base, wants_A, wants_B, _ = ctx.needs_input_grad
        if x is None:
            x = dy.new_empty(0, dtype=ctx.x_dtype)
        with _without_autocast(dy):
            dx, dA, dB = _backward(Layer(x, weight, None, None, A, B), dy, ctx.plan, Needed(wants_x, wants_A, wants_B))
            dbias = dy.sum(0).to(ctx.bias_dtype) if wants_bias else None
        return dx, None, dbias, dy if wants_base else None, dA, dB, None


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # `to` alone takes longer where it does nothing


def _forward(layer: Layer, plan: Plan) -> Tensor:
    (of_base, of_factors, of_out), s = plan.precision, plan.scaling
    A, B, x = _cast(layer.A, of_factors), _cast(layer.B, of_factors), _cast(layer.x, of_factors)
    if layer.weight is None:
        assert layer.base is not None
        return _cast(torch.addmm(_cast(layer.base, of_factors), x @ A.mT, B.mT, alpha=s), of_out)
    weight, bias = _cast(layer.weight, of_base), None if layer.bias is None else _cast(layer.bias, of_base)
    x_of_base = x if of_base == of_factors else _cast(layer.x, of_base)
    if plan.order.merges_output:
        return _cast(F.linear(x_of_base, torch.addmm(weight, B, A, alpha=s), bias), of_out)
    out = _cast(F.linear(x_of_base, weight, bias), of_factors)
    return _cast(out.addmm_(x @ A.mT, B.mT, alpha=s), of_out)


def _backward(layer: Layer, dy: Tensor, plan: Plan, needed: Needed) -> list[Tensor | None]:
    """The gradients of x, A and B that are needed."""
    order, s, of_factors = plan.order, plan.scaling, plan.precision.factors
    A, B, dy_of_factors = _cast(layer.A, of_factors), _cast(layer.B, of_factors), _cast(dy, of_factors)
    # the scaling acts first, as in PEFT's layer: in float16 a small one keeps products from overflowing
    projected = dy_of_factors @ (s * B) if needs_projected(order, needed) else None
    dx = dA = dB = None
    if needed.A or needed.B:
        x = _cast(layer.x, of_factors)
        if order.through_weight:
            dense = dy_of_factors.mT @ x
            dA, dB = (s * B).mT @ dense if needed.A else None, dense @ (s * A).mT if needed.B else None
        else:
            dA = projected.mT @ x if projected is not None and needed.A else None
            dB = dy_of_factors.mT @ (x @ (s * A).mT) if needed.B else None
    if needed.x:
        dx = _input_gradient(layer, dy_of_factors if plan.precision.can_merge else dy, projected, A, B, plan)
    return [
        None if dx is None else _cast(dx, layer.x.dtype),
        None if dA is None else _cast(dA, layer.A.dtype),
        None if dB is None else _cast(dB, layer.B.dtype),
    ]


def _input_gradient(layer: Layer, dy: Tensor, projected: Tensor | None, A: Tensor, B: Tensor, plan: Plan) -> Tensor:
    s, of_base = plan.scaling, plan.precision.base
    if layer.weight is None:
        assert projected is not None
        return projected @ A
    weight = _cast(layer.weight, of_base)
    if plan.order.merges_input:
        return dy @ torch.addmm(weight, B, A, alpha=s)
    assert projected is not None
    return _cast(_cast(dy, of_base) @ weight, A.dtype).addmm_(projected, A)


def fastest_order(
    layer: Layer, scaling: float, precision: Precision, needed: Needed, separate: Callable[[Tensor], Tensor] | None
) -> Order | None:
    """The order that takes the least time on these tensors, measured now; `None` if `separate` takes less.

    Args:
        layer: as for `fused_linear`.
        scaling: as in a `Plan`.
        precision: as in a `Plan`.
        needed: the gradients to compute, at least one.
        separate: another forward pass of the layer, differentiated by autograd, as a function of x `(T, n)`.
    """
    candidates = [*orders(precision.can_merge and layer.weight is not None, precision.has_range)]
    layer = layer._replace(x=_rows(layer.x), base=None if layer.base is None else _rows(layer.base))
    dy = _alone(_forward, layer, Plan(scaling, precision, Order()))

    def with_autograd() -> None:
        assert separate is not None
        x = layer.x.detach().requires_grad_(needed.x)
        wanted = [tensor for tensor, is_needed in zip((x, layer.A, layer.B), needed, strict=True) if is_needed]
        # a gradient checkpoint around the layer counts the tensors that are saved
        with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            torch.autograd.grad(separate(x), wanted, dy, allow_unused=True)  # B may be computed

    work: dict[Any, Callable[[], object]] = {} if separate is None else {"separate": with_autograd}
    for order in candidates:
        plan = Plan(scaling, precision, order)
        work["output", order.merges_output] = partial(_alone, _forward, layer, plan)
        work["gradients", order[1:]] = partial(_alone, _backward, layer, dy, plan, needed)
    times: dict[Any, list[float]] = {name: [] for name in work}
    for _ in range(_ROUNDS + 1):  # the candidates take turns; the first turn warms up
        for name, run in work.items():
            started = timer()
            run()
            times[name].append(timer() - started)
    took = {name: min(each[1:]) for name, each in times.items()}

    def total(order: Order) -> float:
        return took["output", order.merges_output] + took["gradients", order[1:]]

    best = min(candidates, key=total)
    return best if separate is None or total(best) <= took["separate"] else None


@torch.no_grad()
def _alone(work: Callable[..., Any], layer: Layer, *arguments: Any) -> Any:
    """Call a function without autograd and autocast."""
    with _without_autocast(layer.x):
        return work(layer, *arguments)
