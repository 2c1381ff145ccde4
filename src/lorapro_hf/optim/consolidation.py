"""How does state that is spread over ranks become a checkpoint that any number of ranks can load?

Where every rank holds whole factors, one rank collects the state of all pairs. Where factors are DTensors, their state
is cut into rows, as DTensors on the same mesh, which distributed checkpoints require. All functions are collective
unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import ShardedAccess
from lorapro_hf.distributed.attendance import Attendance
from lorapro_hf.distributed.ownership import PairOwnership
from lorapro_hf.factors.pairs import LoRAPair, unwrapped_name
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.base import UpdateRule
from lorapro_hf.optim.state import StateSpec

States = dict[Tensor, dict[str, Tensor]]


class _Entry(NamedTuple):
    parameter: Tensor
    spec: StateSpec

    @property
    def name(self) -> str:
        return self.spec.name

    def of(self, state: Mapping[Tensor, dict[str, Any]]) -> Tensor:
        return state[self.parameter][self.name]


def collect_states(
    ownership: PairOwnership, state: Mapping[Tensor, dict[str, Any]], config: LoRAProConfig, to: int
) -> States:
    """The state of all pairs, on the CPU of the rank `to` of the group.

    The other ranks get the state of their own pairs and the step counts of the others, so that every rank has an entry
    for each pair that has been stepped. Distributed checkpoints combine the entries of all ranks.
    """
    assert ownership.group is not None
    rule, found = rule_of(config), States()
    for index, (pair, steps) in enumerate(zip(ownership.pairs, _steps(ownership, state, rule), strict=True)):
        owner = ownership.owner_of(index)
        for entry in [] if steps is None else _entries(pair, rule):
            own = None
            if ownership.rank == owner:
                own = entry.of(state).contiguous()
                if owner != to:
                    dist.send(own, dst=dist.get_global_rank(ownership.group, to), group=ownership.group)
            elif ownership.rank == to:
                own = torch.empty(entry.spec.shape, dtype=entry.spec.dtype, device=pair.A.device)
                dist.recv(own, src=dist.get_global_rank(ownership.group, owner), group=ownership.group)
            elif entry.name == "step":
                own = torch.tensor(steps, dtype=torch.float32)
            if own is not None:
                found.setdefault(entry.parameter, {})[entry.name] = own.cpu() if ownership.rank == to else own
    return found


def shard_states(ownership: PairOwnership, state: Mapping[Tensor, dict[str, Any]], config: LoRAProConfig) -> States:
    """The state of all pairs, each moment a DTensor of rows on the mesh of the factors, step counts on every rank."""
    access = ownership.access
    assert isinstance(access, ShardedAccess)
    rule, found = rule_of(config), States()
    for index, (pair, steps) in enumerate(zip(ownership.pairs, _steps(ownership, state, rule), strict=True)):
        for entry in [] if steps is None else _entries(pair, rule):
            owner = ownership.owner_of(index) if ownership.group else None
            own = entry.of(state) if owner in (None, ownership.rank) else None
            found.setdefault(entry.parameter, {})[entry.name] = _rows_of(access, entry, own, owner)
    return found


def await_all(attendance: Attendance, saves: bool) -> None:
    """Wait until all ranks are ready to give their parts of the state.

    Args:
        attendance: of the ranks.
        saves: whether all ranks are known to save together; otherwise `state_dict()` may have been called on some only.

    Raises:
        RuntimeError: a rank has not come within the limit of the process group.
    """
    try:
        absent = attendance.wait_for_all()
    except dist.DistError as error:
        raise RuntimeError(
            "the process that kept the store of the process group, rank 0 or its launcher, ended before the "
            "optimizer's state was collected. See its output for the reason, and resume from the last complete "
            "checkpoint."
        ) from error
    if absent:
        raise RuntimeError(_reason(absent, attendance, saves))


def _reason(absent: list[int], attendance: Attendance, saves: bool) -> str:
    who = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
    limit = f"{attendance.limit.total_seconds():g} seconds"
    if saves:
        return (
            f"saving takes all ranks: rank {dist.get_rank()} has waited {limit}, the limit of the process group, for "
            f"{who} to give its part of the optimizer's state. It ended, or is still writing other files. If its disk "
            "is that slow, raise the limit: ddp_timeout in the arguments of a trainer, or "
            "init_process_group(timeout=...)."
        )
    return (
        f"state_dict() was called on rank {dist.get_rank()}, but not on all ranks that share the optimizer's state: "
        f"{who} did not call it within {limit}, the limit of the process group. Call it on all ranks (under DDP, or "
        "optimizer.consolidate_state_dict() on all ranks before it), or keep the whole state on each with "
        "LoRAProConfig(shard_states=False)."
    )


def own_state(
    ownership: PairOwnership, state: Mapping[Tensor, dict[str, Any]], config: LoRAProConfig
) -> dict[str, Tensor]:
    """The state of this rank's pairs, by names that are the same on any number of ranks. Not collective."""
    rule = rule_of(config)
    return {
        f"{_key(pair, entry)}.{entry.name}": entry.of(state).contiguous()
        for pair in ownership.owned
        if _has_begun(pair, rule, state)
        for entry in _entries(pair, rule)
    }


def read_own_state(ownership: PairOwnership, read: Callable[[str], Tensor | None], config: LoRAProConfig) -> States:
    """The state of this rank's pairs from files written by `own_state` on any number of ranks. Not collective.

    Args:
        ownership: the present ownership of the pairs.
        read: gives the tensor of a name, `None` where there is none.
        config: the settings of the optimizer.

    Raises:
        ValueError: a pair has part of its state only, or state of another shape.
    """
    rule, found = rule_of(config), States()
    for pair in ownership.owned:
        entries = _entries(pair, rule)
        names = [f"{_key(pair, entry)}.{entry.name}" for entry in entries]
        values = [read(name) for name in names]
        if all(value is None for value in values):  # never stepped
            continue
        for entry, name, value in zip(entries, names, values, strict=True):
            if value is None or tuple(value.shape) != entry.spec.shape:
                fault = "missing" if value is None else f"of shape {tuple(value.shape)} instead of {entry.spec.shape}"
                raise ValueError(
                    f"the checkpoint does not fit: {name} is {fault}. Resume with the model, rank and mode it was "
                    "written with, or from an earlier checkpoint."
                )
            found.setdefault(entry.parameter, {})[entry.name] = value.to(pair.A.device, entry.spec.dtype, copy=True)
    return found


def _key(pair: LoRAPair, entry: _Entry) -> str:
    return f"{unwrapped_name(pair.name)}.{pair.adapter_name}.{entry.spec.side}"


def whole(tensor: Any) -> Tensor:
    """A state tensor of a checkpoint, gathered if it is a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _rows_of(access: ShardedAccess, entry: _Entry, own: Tensor | None, owner: int | None) -> Tensor:
    """This rank's part of a tensor that its owner holds; without an owner every rank holds it."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    group, device = access.group, entry.parameter.device
    shape, dtype = entry.spec.shape, entry.spec.dtype
    source = None if owner is None else dist.get_global_rank(group, owner)
    if not shape:
        step = torch.empty((), dtype=dtype, device=device) if own is None else own.clone()
        if source is not None:
            dist.broadcast(step, src=source, group=group)
        return step
    ranks, rank = group.size(), group.rank()
    height = -(-shape[0] // ranks)
    rows = max(0, min(height, shape[0] - rank * height))
    if source is None or not height:
        part = torch.empty(0, *shape[1:], dtype=dtype, device=device) if own is None else own
        part = part[rank * height : rank * height + rows].clone()
    else:
        cut = None if own is None else list(_padded(own, height * ranks).split(height))
        part = torch.empty(height, *shape[1:], dtype=dtype, device=device)
        dist.scatter(part, cut, src=source, group=group)
        part = part[:rows].contiguous()
    placements = [Replicate() for _ in range(access.mesh.ndim)]
    placements[access.mesh_dim or 0] = Shard(0)  # type: ignore[call-overload]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, access.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _entries(pair: LoRAPair, rule: UpdateRule) -> list[_Entry]:
    specs = rule.specs(pair)
    entries = []
    for side, parameter in (("A", pair.A), ("B", pair.B)):
        entries.append(_Entry(parameter, StateSpec("step", side, (), torch.float32)))
        entries += [_Entry(parameter, spec) for spec in specs if spec.side == side]
    return entries


def _has_begun(pair: LoRAPair, rule: UpdateRule, state: Mapping[Tensor, dict[str, Any]]) -> bool:
    """Whether the state of a pair exists: before its first step, distributed checkpoints keep a step count alone."""
    return all(entry.name in state.get(entry.parameter, {}) for entry in _entries(pair, rule))


def _steps(ownership: PairOwnership, state: Mapping[Tensor, dict[str, Any]], rule: UpdateRule) -> list[float | None]:
    """How often each pair has been stepped, as its owner knows; `None` for a pair without any state."""
    begun = [_has_begun(pair, rule, state) for pair in ownership.owned]
    known = {id(pair): float(state[pair.A]["step"]) for pair, has in zip(ownership.owned, begun, strict=True) if has}
    flags = [
        [float(id(pair) in known) for pair in ownership.pairs],
        [known.get(id(pair), 0.0) for pair in ownership.pairs],
    ]
    together = ownership.total(torch.tensor(flags, dtype=torch.float32, device=ownership.pairs[0].A.device)).tolist()
    return [steps if has_begun else None for has_begun, steps in zip(*together, strict=True)]
