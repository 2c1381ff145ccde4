"""How is a slot of a LoRA pair copied, a column of B and a row of A, with its part of the optimizer's state?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Rows, Stack
from lorapro_hf.functional.rank_gates import squared_change
from lorapro_hf.optim.lora_pro import LoRAProAdamW
from lorapro_hf.optim.rules.base import MASTER

Slots = list[tuple[list[int], list[int]]]  # of each matrix of a pair: the slots to replace, and their sources
Moments = Mapping[Tensor, Mapping[str, Tensor]]


def moments_of_slots(pairs: Iterable[LoRAPair], optimizer: torch.optim.Optimizer, saved: bool = False) -> Moments:
    """The tensors of an optimizer's state that have a part for each slot, by factor and name; master copies included.

    Args:
        pairs: with factors in the optimizer.
        optimizer: out of accelerate's wrapper.
        saved: take them as they are saved. Where ranks share the state, the first one then has that of all pairs; all
            ranks take part.

    Raises:
        ValueError: a tensor is neither shaped like its factor nor a count.
    """
    state: Mapping[Any, Any] = optimizer.state
    if isinstance(optimizer, LoRAProAdamW):
        if not (optimizer.rule.keeps_state_of_slots or optimizer.config.master_factors):
            return {}
        if saved:
            content = optimizer.state_dict()
            keys = [key for group in content["param_groups"] for key in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {p: content["state"].get(key, {}) for key, p in zip(keys, parameters, strict=True)}
    factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
    return {factor: _parts_of_slots(factor, state.get(factor, {}), optimizer) for factor in factors}


def exact_factors(pair: LoRAPair, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor]:
    """A and B of a pair, or their master copies where the optimizer keeps some on this rank."""
    if not isinstance(optimizer, LoRAProAdamW):
        return pair.A, pair.B
    A, B = (optimizer.state.get(factor, {}).get(MASTER, factor) for factor in (pair.A, pair.B))
    return A, B


def _parts_of_slots(factor: Tensor, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parts = {}
    if isinstance(optimizer, LoRAProAdamW) and not optimizer.rule.keeps_state_of_slots:
        state = {name: value for name, value in state.items() if name == MASTER}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == factor.shape and value.is_floating_point():
            parts[name] = value
        elif isinstance(value, Tensor) and value.numel() > 1:
            raise ValueError(
                f"the state {name!r} of {type(optimizer).__name__} cannot be copied by slots: it is {value.dtype} of "
                f"shape {tuple(value.shape)}, for a factor of {tuple(factor.shape)}. Use optim='adamw_torch' or "
                "LoRA-Pro."
            )
    return parts


def with_copies(pair: LoRAPair, side: str, now: Tensor, then: Tensor, slots: Slots) -> Tensor:
    """A tensor shaped like a factor, with the slots to replace as their sources are in another one."""
    as_matrix, as_factor = (pair.matrix_A, pair.factor_A) if side == "A" else (pair.matrix_B, pair.factor_B)
    new = as_matrix(now).clone()
    rows, of_then = (x if side == "A" else x.mT for x in (new, as_matrix(then.to(now))))
    if rows.dim() == 2:
        rows, of_then = rows[None], of_then[None]
    for to, source, (replaced, sources) in zip(rows, of_then, slots, strict=True):
        to[replaced] = source[sources]
    return as_factor(new)


def relative_change(stacks: Iterable[Stack], before: Iterable[Rows]) -> float:
    """The norm of the change of all `s B A` since their factors were `before`, as a part of their norm then."""
    changes = sizes = 0.0
    for stack, old in zip(stacks, before, strict=True):
        square = stack.scaling().square()
        changes += float((square * squared_change(*old, *stack.read())).sum())
        sizes += float((square * squared_change(old.A, torch.zeros_like(old.B), *old)).sum())
    return (changes / sizes) ** 0.5 if sizes else 0.0
