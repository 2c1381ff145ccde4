"""In which order are the products of a LoRA layer formed, and how many operations does each order take?

With T tokens, a weight W `(m, n)` and factors B `(m, r)` and A `(r, n)`, a layer returns `Y = X (W + s B A)ᵀ`. Only X,
A and B are kept for the backward pass (RunLoRA, arXiv 2312.03415). Orders that are the cheapest for no shape with
`r <= min(m, n)` are left out: `X (B A)ᵀ` apart from W, a merged weight in the backward pass alone, and `dYᵀ X` for the
gradient of one factor alone where both are needed.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

_SPARED = 1.03  # a fused layer makes up for so many more operations by passing over its output less often


class Order(NamedTuple):
    """An order of the products in the forward and the backward pass of a layer."""

    merges_output: bool = False
    """Y is `X (W + s B A)ᵀ`, else `X Wᵀ + s (X Aᵀ) Bᵀ`."""
    merges_input: bool = False
    """dX is `dY (W + s B A)`, else `dY W + s (dY B) A`."""
    through_weight: bool = False
    """dA is `s Bᵀ (dYᵀ X)` and dB `s (dYᵀ X) Aᵀ`, else `s (dY B)ᵀ X` and `s dYᵀ (X Aᵀ)`."""


class Needed(NamedTuple):
    """Which gradients a backward pass computes."""

    x: bool = True
    A: bool = True
    B: bool = True


class Sizes(NamedTuple):
    """The sizes of a layer and its input."""

    tokens: int
    n: int
    m: int
    r: int


def orders(can_merge: bool = True, has_range: bool = True) -> list[Order]:
    """All orders that a precision permits.

    Args:
        can_merge: whether `s B A` may be added to the weight, which rounds it to the weight's precision.
        has_range: whether the gradient of the weight may be formed, which overflows sooner than those of the factors.
    """
    merges = [(False, False), (True, False), (True, True)] if can_merge else [(False, False)]
    return [Order(*merge, through_weight) for merge in merges for through_weight in (False, True)[: 1 + has_range]]


def forward_flops(order: Order, sizes: Sizes) -> int:
    """Operations of the forward pass, a product and a sum counted as two."""
    T, n, m, r = sizes
    return 2 * T * n * m + (2 * n * m * r if order.merges_output else 2 * T * r * (n + m))


def backward_flops(order: Order, sizes: Sizes, needed: Needed) -> int:
    """Operations of the backward pass, of the base weight as well."""
    T, n, m, r = sizes
    count = 2 * T * r * m * needs_projected(order, needed)
    if needed.x:
        count += 2 * T * n * m + (2 * n * m * r if order.merges_input else 2 * T * r * n)
    if order.through_weight:
        return count + (2 * T * n * m + 2 * n * m * r * (needed.A + needed.B)) * (needed.A or needed.B)
    return count + 2 * T * r * n * needed.A + 2 * T * r * (n + m) * needed.B


def needs_projected(order: Order, needed: Needed) -> bool:
    """Whether the backward pass forms `dY B`."""
    return (needed.x and not order.merges_input) or (needed.A and not order.through_weight)


@cache
def cheapest_order(sizes: Sizes, needed: Needed, can_merge: bool, has_range: bool = True) -> Order:
    """The order with the fewest operations; the forward pass does not depend on `needed`. Arguments as for `orders`."""
    best = Order()  # a loop, since torch.compile does not trace min() with a key
    for order in orders(can_merge, has_range):
        if forward_flops(order, sizes) > forward_flops(best, sizes):
            continue
        if forward_flops(order, sizes) < forward_flops(best, sizes) or backward_flops(
            order, sizes, needed
        ) < backward_flops(best, sizes, needed):
            best = order
    return best


@cache
def takes_more(order: Order, sizes: Sizes, needed: Needed) -> bool:
    """Whether an order takes notably more operations than separate products that keep `X Aᵀ`."""
    T, n, _, r = sizes
    fused, separate = (forward_flops(each, sizes) + backward_flops(each, sizes, needed) for each in (order, Order()))
    return fused > _SPARED * (separate - 2 * T * n * r * needed.B)
