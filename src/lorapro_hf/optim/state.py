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
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Rows, Stack, stacked
from lorapro_hf.functional.projection import compute_dtype
from lorapro_hf.kernels.storage import BLOCK, Moments, new_moments

MASTER = "master"  # the name of a factor's master copy in the state
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
        config: mode and dtype of the moments, and whether master copies of the factors are kept.

    Raises:
        ValueError: master copies are asked for where the engine keeps some itself.

    Attributes:
        steps: how often each pair has been stepped, `(pairs,)` float32.
        uniform: whether all pairs are known to have been stepped equally often.
        slots: the moments by `(factor, name)`.
    """

    def __init__(self, stack: Stack, config: LoRAProConfig) -> None:
        pair = stack.pairs[0]
        if config.master_factors and (pair.A.dtype, pair.B.dtype) != stack.stored_dtypes:
            raise ValueError(
                f"{pair.name}: the engine keeps float32 masters of its factors itself, so that master_factors=True "
                "would keep them twice. Leave master_factors out."
            )
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

    @property
    def masters(self) -> tuple[Tensor | None, Tensor | None]:
        """The master copies of A and of B `(pairs, *shape)`; `None` where the parameters themselves are stepped."""
        A, B = (self.slots.get((factor, MASTER)) for factor in "AB")
        return (A.stacked if A else None, B.stacked if B else None)

    def refresh_masters(self) -> None:
        """Bring the master copies up to date where others have written parameters, as loading an adapter does."""
        for master, parameters in zip(self.masters, zip(*self.stack.factors, strict=True), strict=True):
            if master is not None:
                current = stacked(parameters, parameters[0].dtype)
                is_rounding = master.to(current.dtype) == current
                master.copy_(torch.where(is_rounding, master, current.to(master.dtype)))

    def factors(self, read: Rows) -> tuple[Rows, tuple[torch.dtype | None, torch.dtype | None]]:
        """The factors to step, in rows layout, and the dtypes to round them to before they are stored.

        Args:
            read: the parameters, which are stepped themselves where there are no master copies.
        """
        master_A, master_B = self.masters
        if master_A is None and master_B is None:
            return read, self.stack.stored_dtypes
        rows = self.stack.rows(
            self.stack.layers_A(read.A) if master_A is None else master_A,
            self.stack.layers_B(read.B) if master_B is None else master_B,
        )
        of_A, of_B = self.stack.stored_dtypes
        return rows, (of_A if master_A is None else None, of_B if master_B is None else None)

    def adopt(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Take up what `state` holds of the pairs and let it show these tensors instead."""
        parameters = [(pair.A, pair.B) for pair in self.stack.pairs]
        self._shown = {parameter: {} for factors in parameters for parameter in factors}
        for (factor, name), slot in self.slots.items():
            for factors, view in zip(parameters, slot.views, strict=True):
                parameter = factors["AB".index(factor)]
                if name in state[parameter]:
                    view.copy_(state[parameter][name])
                self._shown[parameter][name] = view
        counts = [float(state[A].get("step", 0)) for A, _ in parameters]
        self.steps.copy_(torch.tensor(counts, device="cpu"))
        self.uniform = len(set(counts)) == 1
        for pair, factors, step in zip(self.stack.pairs, parameters, self.steps.unbind(), strict=True):
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
    A, B = _matrix_shapes(pair)
    return (*B[:-1], A[-1])


def state_shapes(
    pair: LoRAPair, mode: str, master_factors: bool = False
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The names and shapes of what is kept under A and under B of a pair, the step counters aside."""
    of_A, of_B = _moment_shapes(pair, mode)
    exact = compute_dtype(pair.A, pair.B)
    if master_factors and pair.A.dtype != exact:
        of_A[MASTER] = tuple(pair.shape_A)
    if master_factors and pair.B.dtype != exact:
        of_B[MASTER] = tuple(pair.shape_B)
    return of_A, of_B


def _moment_shapes(pair: LoRAPair, mode: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    if mode == "efficient":
        return _twice(tuple(pair.shape_A)), _twice(tuple(pair.shape_B))
    dense = dense_shape(pair)
    if mode == "factored":
        A, B = _matrix_shapes(pair)
        return (
            {"exp_avg": tuple(A), "exp_avg_sq": (*dense[:-2], dense[-1])},
            {"exp_avg": tuple(B), "exp_avg_sq": dense[:-1]},
        )
    if mode == "full":
        return _twice(dense), {}
    scales = (*dense[:-1], -(-dense[-1] // BLOCK))
    return {**_twice(dense), "exp_avg_absmax": scales, "exp_avg_sq_absmax": scales}, {}


def state_dtype(pair: LoRAPair, config: LoRAProConfig, name: str) -> torch.dtype:
    """The dtype in which a moment or master copy of a pair is kept."""
    if name == MASTER:
        return compute_dtype(pair.A, pair.B)
    if config.mode == "full_8bit":
        return torch.float32 if name.endswith("absmax") else torch.uint8
    return _STORAGE[config.moments_dtype] or compute_dtype(pair.A, pair.B)


def _matrix_shapes(pair: LoRAPair) -> tuple[torch.Size, torch.Size]:
    whole = torch.empty(pair.shape_A, device="meta"), torch.empty(pair.shape_B, device="meta")
    return pair.matrix_A(whole[0]).shape, pair.matrix_B(whole[1]).shape


def _twice(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"exp_avg": shape, "exp_avg_sq": shape}


def _new_slots(stack: Stack, config: LoRAProConfig) -> list[Slot]:
    slots = _moment_slots(stack, config)
    for factor, shapes in zip("AB", state_shapes(stack.pairs[0], config.mode, config.master_factors), strict=True):
        if MASTER in shapes:  # zeros until `refresh_masters` takes the parameters' values
            slots.append(_like_factors(stack, factor, MASTER, shapes[MASTER]))
    return slots


def _moment_slots(stack: Stack, config: LoRAProConfig) -> list[Slot]:
    pair = stack.pairs[0]
    if config.keeps_dense_moments:
        m, n = dense_shape(pair)[-2:]
        dtype = state_dtype(pair, config, "exp_avg")
        moments = new_moments((len(stack.pairs) * stack.packed, m, n), dtype, stack.device)
        return [
            Slot("A", name, values, list(stack.per_layer(values)))
            for name, values in moments._asdict().items()
            if values is not None
        ]
    if config.mode == "factored":
        return _factored_slots(stack)
    return [
        _like_factors(stack, factor, name, shape)
        for factor, shapes in zip("AB", _moment_shapes(pair, config.mode), strict=True)
        for name, shape in shapes.items()
    ]


def _like_factors(stack: Stack, factor: str, name: str, shape: tuple[int, ...]) -> Slot:
    values = torch.zeros((len(stack.pairs), *shape), dtype=stack.dtype, device=stack.device)
    return Slot(factor, name, values, list(values))


def _factored_slots(stack: Stack) -> list[Slot]:
    """In rows layout, B's first moment transposed; shown in the shapes of the factors as matrices."""
    entries = len(stack.pairs) * stack.packed
    m, n = dense_shape(stack.pairs[0])[-2:]
    r = _matrix_shapes(stack.pairs[0])[0][-2]
    as_is: Callable[[Tensor], Tensor] = lambda view: view  # noqa: E731
    slots = []
    for factor, name, shape, shown in (
        ("A", "exp_avg", (r, n), as_is),
        ("A", "exp_avg_sq", (n,), as_is),
        ("B", "exp_avg", (r, m), lambda view: view.mT),
        ("B", "exp_avg_sq", (m,), as_is),
    ):
        values = torch.zeros((entries, *shape), dtype=stack.dtype, device=stack.device)
        slots.append(Slot(factor, name, values, [shown(view) for view in stack.per_layer(values)]))
    return slots
