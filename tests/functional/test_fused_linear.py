"""A fused LoRA layer equals autograd in float64 in every order, and its products take as many operations as counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorapro_hf.functional import fused_linear as module
from lorapro_hf.functional.fused_linear import Layer, Plan, Precision, fastest_order, fused_linear
from lorapro_hf.functional.lora_orders import (
    Needed,
    Order,
    Sizes,
    backward_flops,
    cheapest_order,
    forward_flops,
    orders,
    takes_more,
)

DOUBLE = Precision(torch.float64, torch.float64, torch.float64)
MASKS = [Needed(*mask) for mask in itertools.product((True, False), repeat=3) if any(mask)]
ALL = Needed()
SCALING = -0.7


def tensors(
    shape: tuple[int, ...] = (2, 7), needed: Needed = ALL, is_bare: bool = False, **dtypes: torch.dtype
) -> Layer:
    """A layer of m = 4, n = 5 and r = 3; `is_bare` gives the base's output in the place of its weight."""
    generator = torch.Generator().manual_seed(0)

    def values(*size: int, name: str, requires_grad: bool = False) -> Tensor:
        drawn = torch.randn(size, generator=generator, dtype=torch.float64).to(dtypes.get(name, torch.float64))
        return drawn.requires_grad_(requires_grad)

    x = values(*shape, 5, name="x", requires_grad=needed.x)
    weight, bias = values(4, 5, name="weight"), values(4, name="bias", requires_grad=True)
    base = values(*shape, 4, name="base", requires_grad=True)
    A, B = values(3, 5, name="A", requires_grad=needed.A), values(4, 3, name="B", requires_grad=needed.B)
    return Layer(x, None, None, base, A, B) if is_bare else Layer(x, weight, bias, None, A, B)


def oracle(layer: Layer) -> Tensor:
    """The dense formula in float64."""
    x, weight, bias, base, A, B = (None if each is None else each.double() for each in layer)
    assert x is not None and A is not None and B is not None
    if weight is None:
        assert base is not None
        return base + SCALING * x @ (B @ A).mT
    return x @ (weight + SCALING * B @ A).mT + bias


def gradients(layer: Layer, out: Tensor) -> tuple[Tensor, ...]:
    wanted = [tensor for tensor in layer if tensor is not None and tensor.requires_grad]
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(out, wanted, dy.to(out.dtype))


def assert_equal(layer: Layer, plan: Plan, tolerance: float) -> None:
    out, expected = fused_linear(layer, plan), oracle(layer)
    assert out.dtype == plan.precision.out
    for one, other in zip((out, *gradients(layer, out)), (expected, *gradients(layer, expected)), strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("order", orders(), ids=lambda order: "".join(str(int(each)) for each in order))
@pytest.mark.parametrize("needed", MASKS, ids=lambda needed: "".join("xAB"[i] for i in range(3) if needed[i]))
def test_every_order_is_autograds(order: Order, needed: Needed):
    assert_equal(tensors(needed=needed), Plan(SCALING, DOUBLE, order), 1e-12)


@pytest.mark.parametrize("order", orders(can_merge=False))
def test_output_of_another_base(order: Order):
    assert_equal(tensors(is_bare=True), Plan(SCALING, DOUBLE, order), 1e-12)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("order", [Order(), Order(True, True, True)])
def test_shapes_of_inputs(shape: tuple[int, ...], order: Order):
    layer = tensors(shape)
    out = fused_linear(layer, Plan(SCALING, DOUBLE, order))
    expected = oracle(layer)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(layer, out), gradients(layer, expected), rtol=1e-12, atol=1e-12)


def test_strided_and_transposed_tensors():
    layer = tensors((7, 2))
    strided = layer._replace(
        x=layer.x.detach().transpose(0, 1).requires_grad_(), weight=layer.weight.mT.contiguous().mT
    )
    assert_equal(strided, Plan(SCALING, DOUBLE, Order(True, True)), 1e-12)


# (x and weight, factors, precision of the products, tolerance): float32 factors on a base in half precision, and all in
# half precision
HALVES = [
    (torch.bfloat16, torch.float32, None, 2e-2),
    (torch.bfloat16, torch.bfloat16, None, 2e-2),
    (torch.float32, torch.float32, torch.bfloat16, 2e-2),
    (torch.float16, torch.float32, torch.float16, 3e-3),
]


@pytest.mark.parametrize("widens", [True, False])
@pytest.mark.parametrize(("of_base", "of_factors", "of_products", "tolerance"), HALVES)
def test_half_precision(monkeypatch, widens, of_base, of_factors, of_products, tolerance):
    monkeypatch.setattr(module, "_WIDENS", widens)
    layer = tensors(x=of_base, weight=of_base, bias=of_base, A=of_factors, B=of_factors)
    out = of_products or of_base
    precision = Precision.of(out, of_products or of_factors, out, torch.device("cpu"))
    assert precision.can_merge is widens
    for order in orders(precision.can_merge):
        assert_equal(layer, Plan(SCALING, precision, order), tolerance)


def test_nothing_but_x_and_parameters_is_kept():
    layer, kept = tensors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused_linear(layer, Plan(SCALING, DOUBLE, Order()))
    known = {tensor.untyped_storage().data_ptr() for tensor in layer if tensor is not None}
    assert len(kept) == 4 and {tensor.untyped_storage().data_ptr() for tensor in kept} <= known


def test_x_may_be_overwritten_where_no_factor_is_trained():
    layer = tensors(needed=Needed(True, False, False))
    written = layer._replace(x=layer.x.clone())
    out = fused_linear(written, Plan(SCALING, DOUBLE, Order()))
    written.x.zero_()
    torch.testing.assert_close(gradients(layer, out), gradients(layer, oracle(layer)))


def test_second_derivative_is_an_error():
    layer = tensors()
    out = fused_linear(layer, Plan(SCALING, DOUBLE, Order()))
    (first,) = torch.autograd.grad(out.square().sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_next_operation_may_write_to_the_output():
    layer = tensors()
    out = torch.relu_(fused_linear(layer, Plan(SCALING, DOUBLE, Order())))
    torch.testing.assert_close(gradients(layer, out), gradients(layer, torch.relu(oracle(layer))))


IN_PLACE = {torch.ops.aten.addmm_: lambda _, one, other, **__: 2 * one[0] * one[1] * other[1]}
SIZES = [Sizes(*sizes) for sizes in ((7, 5, 4, 3), (64, 8, 8, 2), (2, 16, 24, 4))]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operations_are_those_of_the_products(sizes: Sizes):
    T, n, m, r = sizes
    for order, needed in itertools.product(orders(), MASKS):
        x, A, B = (
            torch.randn(*size, requires_grad=wanted)
            for size, wanted in zip(((T, n), (r, n), (m, r)), needed, strict=True)
        )
        layer = Layer(x, torch.randn(m, n), None, None, A, B)
        precision = Precision(torch.float32, torch.float32, torch.float32)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as forward:
            out = fused_linear(layer, Plan(1.0, precision, order))
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as backward:
            out.sum().backward()
        assert forward.get_total_flops() == forward_flops(order, sizes)
        assert backward.get_total_flops() == backward_flops(order, sizes, needed)


def test_cheapest_order_follows_the_published_rules():
    for T, n, m, r in itertools.product((100, 500, 3000), (400, 2000), (300, 1500), (8, 64)):
        order = cheapest_order(Sizes(T, n, m, r), ALL, True)
        assert order.merges_output is (T * (n + m) > n * m)
        if not order.through_weight:
            assert order.merges_input is (m < T)
        assert cheapest_order(Sizes(T, n, m, r), ALL, False)[:2] == (False, False)


def test_every_order_is_the_cheapest_somewhere():
    sizes = [Sizes(*each) for each in itertools.product((16, 128, 1024), (32, 256, 1024), (32, 256, 1024), (8, 32))]
    found = {cheapest_order(*each) for each in itertools.product(sizes, MASKS, (True, False))}
    assert found == set(orders())


def test_shapes_that_take_more_than_separate_products():
    short, long = Sizes(512, 1536, 576, 128), Sizes(2048, 1536, 576, 128)
    assert takes_more(cheapest_order(short, ALL, True), short, ALL)
    assert not takes_more(cheapest_order(long, ALL, True), long, ALL)
    without_B = Needed(True, True, False)  # X Aᵀ is not needed
    assert not takes_more(cheapest_order(short, without_B, True), short, without_B)


def test_float16_keeps_to_products_that_overflow_no_sooner_than_in_peft():
    half = Precision(torch.float16, torch.float16, torch.float16)
    assert not half.has_range and orders(half.can_merge, half.has_range) == [Order()]
    assert cheapest_order(Sizes(1024, 64, 64, 64), ALL, False, False) == Order()
    one = torch.full((512, 8), 256.0, dtype=torch.float16)
    A = torch.ones(2, 8, dtype=torch.float16, requires_grad=True)
    B = torch.full((8, 2), 1 / 8, dtype=torch.float16, requires_grad=True)
    out = fused_linear(Layer(one, torch.zeros(8, 8).half(), None, None, A, B), Plan(1 / 256, half, Order()))
    # 512 * 256 * 1/256 fits, and 512 * 256 does not
    of_A, of_B = torch.autograd.grad(out, (A, B), torch.ones_like(out))
    assert of_A.unique().tolist() == [512.0] and of_B.unique().tolist() == [4096.0]


def test_time_chooses_the_fastest(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def slow(work: Any, layer: Layer, *arguments: Any) -> Any:
        plan = next(each for each in arguments if isinstance(each, Plan))
        is_forward = len(arguments) == 1
        wanted = plan.order.merges_output if is_forward else plan.order[1:] == (False, True)
        now[0] += 1.0 if wanted else 2.0
        return original(work, layer, *arguments)

    original = module._alone
    monkeypatch.setattr(module, "_alone", slow)
    monkeypatch.setattr(module, "timer", lambda: now[0])
    layer = tensors()

    def separate(seconds: float) -> Any:
        def forward(x: Tensor) -> Tensor:
            now[0] += seconds
            return oracle(layer._replace(x=x))

        return forward

    layer = layer._replace(x=layer.x.detach().flatten(0, 1).requires_grad_())
    assert fastest_order(layer, SCALING, DOUBLE, ALL, separate(5.0)) == Order(True, False, True)
    assert fastest_order(layer, SCALING, DOUBLE, ALL, None) == Order(True, False, True)
    assert fastest_order(layer, SCALING, DOUBLE, ALL, separate(1.5)) is None
    assert all(tensor is None or tensor.grad is None for tensor in layer)
