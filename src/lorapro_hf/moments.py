"""What is remembered of the pairs between steps, in which form and under which parameter?

The moments of a stack are batched tensors; `optimizer.state` of each parameter holds views of them, so that
`state_dict` and everything built on it sees ordinary per-parameter tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.kernels.storage import BLOCK, Moments, new_moments
from lorapro_hf.pairs import LoRAPair
from lorapro_hf.projection import compute_dtype
from lorapro_hf.stacks import Stack

_STORAGE = {"float32": None, "bfloat16": torch.bfloat16}


class Slot(NamedTuple):
    """One remembered tensor of a stack."""

    factor: str  # "A" or "B": under which parameter of a pair it is kept
    name: str
    stacked: Tensor  # (K, ...) or (pairs, ...)
    views: list[Tensor]  # as the state of each pair shows it


class StackMoments:
    """All that is remembered of one stack.

    Args:
        stack: the pairs.
        config: mode and dtype of the moments.

    Attributes:
        steps: how often each pair has been stepped, `(pairs,)` float32.
        uniform: whether all pairs are known to have been stepped equally often.
        slots: the moments by `(factor, name)`.
    """

    def __init__(self, stack: Stack, config: LoRAProConfig) -> None:
        self.stack = stack
        self.steps = torch.zeros(len(stack.pairs), dtype=torch.float32, device=stack.device)
        self.uniform = True
        self._shown: dict[Tensor, dict[str, Tensor]] = {}
        self.slots = {(slot.factor, slot.name): slot for slot in _new_slots(stack, config)}

    def __getitem__(self, key: tuple[str, str]) -> Tensor:
        return self.slots[key].stacked

    @property
    def dense(self) -> Moments:
        """The moments of modes full and full_8bit, as their kernels take them."""
        of_A = {name: slot.stacked for (_, name), slot in self.slots.items()}
        return Moments(*(of_A.get(name) for name in Moments._fields))  # type: ignore[arg-type]

    def adopt(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Take up what `state` holds of the pairs and let it show these tensors instead."""
        self._shown = {parameter: {} for factors in self.stack.factors for parameter in factors}
        for (factor, name), slot in self.slots.items():
            for factors, view in zip(self.stack.factors, slot.views, strict=True):
                parameter = factors["AB".index(factor)]
                if name in state[parameter]:
                    view.copy_(state[parameter][name])
                self._shown[parameter][name] = view
        counts = [float(state[A].get("step", 0)) for A, _ in self.stack.factors]
        self.steps.copy_(torch.tensor(counts, device="cpu"))
        self.uniform = len(set(counts)) == 1
        for pair, factors, step in zip(self.stack.pairs, self.stack.factors, self.steps.unbind(), strict=True):
            # Distributed checkpoints want some state for each parameter.
            for kept in (*factors, *pair.tied_parameters):
                self._shown.setdefault(kept, {})["step"] = step
        for shown, views in self._shown.items():
            state[shown].update(views)

    def is_shown_by(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether `state` still holds these tensors: loading a checkpoint or moving the state replaces them."""
        for parameter, views in self._shown.items():
            kept = state.get(parameter, {})
            for name, view in views.items():
                if kept.get(name) is not view:
                    return False
        return True

    def count_step(self, live: list[int] | None, skip: Tensor) -> None:
        """Count a step of the live pairs unless `skip` is 1."""
        if live is None:
            self.steps += 1 - skip
        else:
            self.uniform = False
            self.steps += self.stack.mask(live) * (1 - skip)


def dense_shape(pair: LoRAPair) -> tuple[int, ...]:
    """Shape `(..., m, n)` of the moments of a pair that are of the size of its weight."""
    A, B = pair.matrix_A(pair.A), pair.matrix_B(pair.B)
    return (*B.shape[:-1], A.shape[-1])


def state_shapes(pair: LoRAPair, mode: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The names and shapes of what is kept under A and under B of a pair, the step counters aside."""
    A, B = pair.A, pair.B
    if mode == "efficient":
        return _twice(tuple(A.shape)), _twice(tuple(B.shape))
    dense = dense_shape(pair)
    if mode == "factored":
        of_A, of_B = tuple(pair.matrix_A(A).shape), tuple(pair.matrix_B(B).shape)
        return (
            {"exp_avg": of_A, "exp_avg_sq": (*dense[:-2], dense[-1])},
            {"exp_avg": of_B, "exp_avg_sq": dense[:-1]},
        )
    if mode == "full":
        return _twice(dense), {}
    scales = (*dense[:-1], -(-dense[-1] // BLOCK))
    return {**_twice(dense), "exp_avg_absmax": scales, "exp_avg_sq_absmax": scales}, {}


def state_dtype(pair: LoRAPair, config: LoRAProConfig, name: str) -> torch.dtype:
    """The dtype in which a moment of a pair is kept."""
    if config.mode == "full_8bit":
        return torch.float32 if name.endswith("absmax") else torch.uint8
    return _STORAGE[config.moments_dtype] or compute_dtype(pair.A, pair.B)


def _twice(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"exp_avg": shape, "exp_avg_sq": shape}


def _new_slots(stack: Stack, config: LoRAProConfig) -> list[Slot]:
    pair = stack.pairs[0]
    if config.keeps_dense_moments:
        m, n = dense_shape(pair)[-2:]
        dtype = state_dtype(pair, config, "exp_avg")
        moments = new_moments((len(stack.pairs) * stack.packed, m, n), dtype, stack.device)
        return [
            Slot("A", name, stacked, list(stack.per_layer(stacked)))
            for name, stacked in moments._asdict().items()
            if stacked is not None
        ]
    if config.mode == "factored":
        return _factored_slots(stack)
    slots = []
    for factor, shapes in zip("AB", state_shapes(pair, config.mode), strict=True):
        for name, shape in shapes.items():
            stacked = torch.zeros((len(stack.pairs), *shape), dtype=stack.dtype, device=stack.device)
            slots.append(Slot(factor, name, stacked, list(stacked)))
    return slots


def _factored_slots(stack: Stack) -> list[Slot]:
    """In rows layout, B's first moment transposed; shown in the shapes of the factors as matrices."""
    entries = len(stack.pairs) * stack.packed
    m, n = dense_shape(stack.pairs[0])[-2:]
    r = stack.pairs[0].matrix_A(stack.factors[0][0]).shape[-2]
    as_is: Callable[[Tensor], Tensor] = lambda view: view  # noqa: E731
    slots = []
    for factor, name, shape, shown in (
        ("A", "exp_avg", (r, n), as_is),
        ("A", "exp_avg_sq", (n,), as_is),
        ("B", "exp_avg", (r, m), lambda view: view.mT),
        ("B", "exp_avg_sq", (m,), as_is),
    ):
        stacked = torch.zeros((entries, *shape), dtype=stack.dtype, device=stack.device)
        slots.append(Slot(factor, name, stacked, [shown(view) for view in stack.per_layer(stacked)]))
    return slots
