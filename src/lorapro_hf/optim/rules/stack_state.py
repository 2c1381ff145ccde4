"""What does an update rule keep of each pair?

The state of a stack is batched tensors. `optimizer.state` of each parameter holds views of them, so that `state_dict`
and everything built on it sees ordinary per-parameter tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lorapro_hf.factors.stacks import Rows, Stack, stacked
from lorapro_hf.functional.step_options import FactorDtypes

MASTER = "master"  # the name of a factor's master copy in the state


class StateSpec(NamedTuple):
    """One tensor that an update rule keeps of each pair, beside the step counter.

    The layout decides how the tensors of a stack are batched:

    * `"parameter"`: `(pairs, *shape)`, for shapes like that of the parameter.
    * `"entry"`: `(K, ...)`. The shape begins with the number of packed entries where pairs pack several.
    * `"rows"`: as `"entry"`, with the last two dimensions swapped: B in rows layout.
    """

    name: str
    side: str  # "A" or "B", the factor under which `optimizer.state` keeps it
    shape: tuple[int, ...]  # as `optimizer.state` shows it
    dtype: torch.dtype
    layout: Literal["parameter", "entry", "rows"] = "entry"

    @property
    def nbytes(self) -> int:
        """The size of one tensor in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StackState:
    """The state of one stack: a batched tensor for each `StateSpec`, which `state[side, name]` returns.

    Attributes:
        steps: how often each pair has been stepped, `(pairs,)` float32.
        uniform: whether all pairs are known to have been stepped equally often.

    Raises:
        ValueError: the specs ask for master copies, but the engine keeps some itself.
    """

    def __init__(self, stack: Stack, specs: Sequence[StateSpec]) -> None:
        self.stack = stack
        self.steps = torch.zeros(len(stack.pairs), dtype=torch.float32, device=stack.device)
        self.uniform = True
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self._views: dict[tuple[str, str], list[Tensor]] = {}
        self._shown: dict[Tensor, dict[str, Tensor]] = {}
        for spec in specs:
            self._add(spec)
        pair = stack.pairs[0]
        if self.masters != (None, None) and (pair.A.dtype, pair.B.dtype) != stack.stored_dtypes:
            raise ValueError(
                f"{pair.name}: the engine keeps float32 masters of its factors itself, so that master_factors=True "
                "would keep them twice. Leave master_factors out."
            )

    def _add(self, spec: StateSpec) -> None:
        stack, shape = self.stack, spec.shape
        if spec.layout == "parameter":
            values = torch.zeros((len(stack.pairs), *shape), dtype=spec.dtype, device=stack.device)
            views = list(values)
        else:
            shape = shape if stack.pairs[0].layout == "matrix" else shape[1:]
            shape = (*shape[:-2], shape[-1], shape[-2]) if spec.layout == "rows" else shape
            values = torch.zeros((len(stack.pairs) * stack.packed, *shape), dtype=spec.dtype, device=stack.device)
            views = [view.mT if spec.layout == "rows" else view for view in stack.per_layer(values)]
        self.tensors[spec.side, spec.name], self._views[spec.side, spec.name] = values, views

    def __getitem__(self, key: tuple[str, str]) -> Tensor:
        """The batched tensor of a side and a name."""
        return self.tensors[key]

    @property
    def masters(self) -> tuple[Tensor | None, Tensor | None]:
        """The master copies of A and of B `(pairs, *shape)`; `None` where the parameters themselves are stepped."""
        return self.tensors.get(("A", MASTER)), self.tensors.get(("B", MASTER))

    @property
    def factor_dtypes(self) -> FactorDtypes:
        """The dtypes that new factors are rounded to before they are stored; `None` for a master copy."""
        of_A, of_B = self.stack.stored_dtypes
        master_A, master_B = self.masters
        return of_A if master_A is None else None, of_B if master_B is None else None

    def refresh_masters(self) -> None:
        """Update master copies whose parameters were written since the last step, for instance by loading an adapter.

        A copy that rounds to its parameter stays as it is.
        """
        for master, parameters in zip(self.masters, zip(*self.stack.factors, strict=True), strict=True):
            if master is not None:
                current = stacked(parameters, parameters[0].dtype)
                is_rounding = master.to(current.dtype) == current
                master.copy_(torch.where(is_rounding, master, current.to(master.dtype)))

    def factors(self, read: Rows) -> Rows:
        """The factors to step, in rows layout: master copies where they exist, else the parameters `read`."""
        master_A, master_B = self.masters
        if master_A is None and master_B is None:
            return read
        return self.stack.rows(
            self.stack.layers_A(read.A) if master_A is None else master_A,
            self.stack.layers_B(read.B) if master_B is None else master_B,
        )

    def adopt(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Copy the values in `state`, and replace them by views of the batched tensors."""
        parameters = [(pair.A, pair.B) for pair in self.stack.pairs]
        self._shown = {parameter: {} for factors in parameters for parameter in factors}
        for (side, name), views in self._views.items():
            for factors, view in zip(parameters, views, strict=True):
                parameter = factors["AB".index(side)]
                if name in state[parameter]:
                    view.copy_(state[parameter][name])
                self._shown[parameter][name] = view
        counts = [float(state[A].get("step", 0)) for A, _ in parameters]
        self.steps.copy_(torch.tensor(counts, device="cpu"))
        self.uniform = len(set(counts)) == 1
        for pair, factors, step in zip(self.stack.pairs, parameters, self.steps.unbind(), strict=True):
            # Distributed checkpoints need an entry for each parameter.
            for parameter in (*factors, *pair.tied_parameters):
                self._shown.setdefault(parameter, {})["step"] = step
        for shown, views_of in self._shown.items():
            state[shown].update(views_of)

    def is_shown_by(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether `state` still holds these tensors: loading a checkpoint or moving the state replaces them."""
        for parameter, views in self._shown.items():
            held = state.get(parameter, {})
            for name, view in views.items():
                if held.get(name) is not view:
                    return False
        return True

    def count_step(self, pair_ids: list[int] | None, found_inf: Tensor) -> Tensor:
        """Count a step of some pairs, `None` for all, unless `found_inf` is 1; returns the active pairs, `(pairs,)`."""
        active = self.stack.active(pair_ids, found_inf)
        self.uniform = self.uniform and pair_ids is None
        self.steps += active
        return active
