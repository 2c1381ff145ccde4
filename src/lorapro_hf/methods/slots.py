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
from lorapro_hf.optim.rules.stack_state import MASTER

Slots = list[tuple[list[int], list[int]]]  # of each matrix of a pair: the slots to replace, and their sources
Moments = Mapping[Tensor, Mapping[str, Tensor]]


def require_slots(pair: LoRAPair) -> None:
    """Raise a `ValueError` that names a pair whose slots cannot be weighed and copied."""
    layer, rank = pair.layer, pair.matrix_A(pair.A).shape[-2]
    if getattr(layer, "use_dora", {}).get(pair.adapter_name, False):
        reason = "DoRA's norm divides its weights out again. Set use_dora=False"
    elif rank < 2:
        reason = "it has one slot, of which none can be copied. Set r (or its rank_pattern) to 2 or more"
    elif pair.tied_parameters:
        reason = "it shares its factors with another layer. Leave one of them out of target_modules"
    else:
        return
    raise ValueError(f"{pair.name} cannot be trained by BeamLoRA: {reason}, or leave BeamLoRA out.")


def require_exact(pairs: Iterable[LoRAPair], optimizer: torch.optim.Optimizer) -> None:
    """Raise a `ValueError` that names a pair in half precision without master copies."""
    has_masters = isinstance(optimizer, LoRAProAdamW) and optimizer.config.master_factors
    for pair in pairs if not has_masters else ():
        if not {pair.A.dtype, pair.B.dtype} <= {torch.float32, torch.float64}:
            raise ValueError(
                f"{pair.name} cannot be trained by BeamLoRA: {pair.B.dtype} rounds small changes away. Keep the "
                "adapter in float32, which is PEFT's default, or train with LoRA-Pro and master_factors=True "
                "(--lora_pro_master_factors)."
            )


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


def remembered(pair: LoRAPair, weights: Tensor, moments: Moments) -> dict[str, Tensor]:
    """Copies of the factors of a pair, B without its weights `(..., r)`, and of their moments, for `replace_slots`."""
    kept: dict[str, Tensor] = {}
    for side, parameter in (("A", pair.A), ("B", pair.B)):
        values = {MASTER: parameter.detach(), **moments.get(parameter, {})}
        kept[side] = values.pop(MASTER).clone()
        kept |= {f"{side}.{name}": value.clone() for name, value in values.items()}
    unweighted = pair.matrix_B(kept["B"]) / weights[..., None, :].to(kept["B"].device)
    return {**kept, "B": pair.factor_B(unweighted).contiguous()}


def replace_slots(
    pair: LoRAPair,
    slots: Slots,
    weights: tuple[Tensor, Tensor],
    then: Mapping[str, Tensor],
    exact: tuple[Tensor, Tensor],
    moments: Moments,
) -> None:
    """Overwrite slots of a pair and their moments by copies of others as these were.

    Args:
        pair: whose B holds its weights.
        slots: which to replace, and their sources.
        weights: of all slots before and after, `(..., r)`.
        then: from `remembered`.
        exact: from `exact_factors`.
        moments: from `moments_of_slots`.
    """
    (A, B), (before, after) = exact, (each[..., None, :] for each in weights)
    A.copy_(with_copies(pair, "A", A, then["A"], slots))
    of_B = pair.factor_B(pair.matrix_B(B) / before)
    B.copy_(pair.factor_B(pair.matrix_B(with_copies(pair, "B", of_B, then["B"], slots)) * after))
    for side, parameter, values in (("A", pair.A, A), ("B", pair.B, B)):
        parameter.copy_(values)
        for name, value in moments.get(parameter, {}).items():
            if name != MASTER:
                of_then = then.get(f"{side}.{name}")  # none of a pair that had not been stepped
                of_then = torch.zeros_like(value) if of_then is None else of_then
                value.copy_(with_copies(pair, side, value, of_then, slots))


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
