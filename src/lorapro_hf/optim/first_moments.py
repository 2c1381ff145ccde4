"""What is the first moment of any optimizer, as a movement of the factors or of the weight?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.factors.stacks import Stack
from lorapro_hf.optim.lora_pro import LoRAProAdamW
from lorapro_hf.optim.rules.base import UpdateRule, moment_of_product

_NAMES = ("exp_avg", "momentum_buffer")  # under which the optimizers of torch keep it
_LOW_BIT = ("bitsandbytes", "torchao")  # libraries whose optimizers keep moments in 8 bits and under other names
_REMEDY = "Use AdamW (optim='adamw_torch'), SGD with momentum, or LoRA-Pro."


def require_first_moment(optimizer: torch.optim.Optimizer) -> None:
    """Raise a `ValueError` if an optimizer, out of its wrappers, will keep no first moment that can be read."""
    if isinstance(optimizer, LoRAProAdamW):
        if type(optimizer.rule).weight_moment is UpdateRule.weight_moment:
            raise ValueError(f"mode {optimizer.rule.name!r} keeps no first moment. Use mode 'efficient' or 'full'.")
    elif not all("betas" in group or group.get("momentum") for group in optimizer.param_groups):
        raise ValueError(f"{type(optimizer).__name__} keeps no first moment to follow. {_REMEDY}")
    elif any(kind.__module__.split(".")[0] in _LOW_BIT for kind in type(optimizer).__mro__):
        raise ValueError(f"{type(optimizer).__name__} keeps its moments in formats that cannot be read. {_REMEDY}")


@torch.no_grad()
def read_moments(
    optimizer: torch.optim.Optimizer, stacks: Sequence[Stack], of_weight: bool
) -> list[tuple[Tensor, Tensor]]:
    """The first moments of all stacks, zeros for pairs that have not been stepped.

    All ranks call it: where they share the pairs out, the owners send theirs to the others.

    Args:
        optimizer: `LoRAProAdamW`, or one with a moment of each factor; out of its wrappers.
        stacks: of all pairs.
        of_weight: whether the results are those of `UpdateRule.weight_moment`, `(K, 2r, m)` and `(K, 2r, n)`, or the
            moments of B, transposed, and of A.

    Raises:
        ValueError: an optimizer has stepped a factor, and its state shows no first moment.
    """
    if isinstance(optimizer, LoRAProAdamW):
        return _of_lora_pro(optimizer, stacks, of_weight)
    moments = []
    for stack in stacks:
        kept = [(_moment(optimizer, pair.A), _moment(optimizer, pair.B)) for pair in stack.pairs]
        rows = stack.read_gradients([None if A is None or B is None else (A, B) for A, B in kept])
        moments.append(moment_of_product(stack.read(), rows, stack.scaling()) if of_weight else (rows.B, rows.A))
    return moments


def _moment(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor | None:
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    found = next((state[name] for name in _NAMES if isinstance(state.get(name), Tensor)), None)
    if state and found is None:
        raise ValueError(
            f"{type(optimizer).__name__} keeps {', '.join(map(repr, state))} of each parameter, but no first moment "
            f"under the names of torch.optim. {_REMEDY}"
        )
    return found


def _of_lora_pro(optimizer: LoRAProAdamW, stacks: Sequence[Stack], of_weight: bool) -> list[tuple[Tensor, Tensor]]:
    own: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for held, state in optimizer.held_states():
        if of_weight:
            both = optimizer.rule.weight_moment(held, state)
        else:
            of_A, of_B = optimizer.rule.factor_moment(held, state)
            both = of_B, of_A
        by_pair = zip(*(part.unflatten(0, (-1, held.packed)) for part in both), strict=True)
        own.update(((id(pair.layer), pair.adapter_name), each) for pair, each in zip(held.pairs, by_pair, strict=True))
    moments = []
    for stack in stacks:
        r, m, n = stack.matrix_shape
        height, K = 2 * r if of_weight else r, len(stack.pairs)
        parts = [torch.zeros(K, stack.packed, height, x, dtype=stack.dtype, device=stack.device) for x in (m, n)]
        for index, pair in enumerate(stack.pairs):
            for part, values in zip(parts, own.get((id(pair.layer), pair.adapter_name), ()), strict=False):
                part[index] = values
        left, right = (optimizer.total_over_owners(part).flatten(0, 1) for part in parts)
        moments.append((left, right))
    return moments
