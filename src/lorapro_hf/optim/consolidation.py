"""How does state that is spread over ranks become a checkpoint that any number of ranks can load?

Where every rank holds whole factors, one rank collects the state of all pairs. Where factors are DTensors, their state
is cut into rows, as DTensors on the same mesh, which distributed checkpoints require. All functions are collective
except `own_state` and `read_own_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.distributed.access import ShardedAccess
from lorapro_hf.distributed.attendance import Attendance
from lorapro_hf.distributed.ownership import PairOwnership
from lorapro_hf.factors.pairs import LoRAPair, unwrapped_name
from lorapro_hf.optim.rules.base import UpdateRule
from lorapro_hf.optim.rules.stack_state import StateSpec

State = Mapping[Tensor, dict[str, Any]]
States = dict[Tensor, dict[str, Tensor]]


def collect_states(ownership: PairOwnership, state: State, rule: UpdateRule, to: int) -> States:
    """The state of all pairs, on the CPU of the rank `to` of the group.

    The other ranks get the state of their own pairs and the step counts of the others, so that every rank has an entry
    for each pair that has been stepped. Distributed checkpoints combine the entries of all ranks.
    """
    group = ownership.group
    assert group is not None
    collected = States()
    for pair, owner, steps, parameter, spec in _stepped(ownership, state, rule):
        value = None
        if ownership.rank == owner:
            value = state[parameter][spec.name].contiguous()
            if owner != to:
                dist.send(value, dst=dist.get_global_rank(group, to), group=group)
        elif ownership.rank == to:
            value = torch.empty(spec.shape, dtype=spec.dtype, device=pair.A.device)
            dist.recv(value, src=dist.get_global_rank(group, owner), group=group)
        elif spec.name == "step":
            value = torch.tensor(steps, dtype=torch.float32)
        if value is not None:
            collected.setdefault(parameter, {})[spec.name] = value.cpu() if ownership.rank == to else value
    return collected


def shard_states(ownership: PairOwnership, state: State, rule: UpdateRule) -> States:
    """The state of all pairs, each moment a DTensor of rows on the mesh of the factors, step counts on every rank."""
    access = ownership.access
    assert isinstance(access, ShardedAccess)
    sharded = States()
    for _, owner, _, parameter, spec in _stepped(ownership, state, rule):
        source = owner if ownership.group else None
        value = state[parameter][spec.name] if source in (None, ownership.rank) else None
        sharded.setdefault(parameter, {})[spec.name] = _rows_of(access, spec, value, source, parameter.device)
    return sharded


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


def own_state(ownership: PairOwnership, state: State, rule: UpdateRule) -> dict[str, Tensor]:
    """The state of this rank's pairs, by names that are the same on any number of ranks."""
    return {
        _key(pair, spec): state[parameter][spec.name].contiguous()
        for pair in ownership.owned
        if _has_begun(pair, rule, state)
        for parameter, spec in _entries(pair, rule)
    }


def read_own_state(ownership: PairOwnership, read: Callable[[str], Tensor | None], rule: UpdateRule) -> States:
    """The state of this rank's pairs from files written by `own_state` on any number of ranks.

    `read` gives the tensor of a name, `None` where there is none.

    Raises:
        ValueError: a pair has part of its state only, or state of another shape.
    """
    states = States()
    for pair in ownership.owned:
        entries = _entries(pair, rule)
        values = [read(_key(pair, spec)) for _, spec in entries]
        if all(value is None for value in values):  # never stepped
            continue
        for (parameter, spec), value in zip(entries, values, strict=True):
            if value is None or tuple(value.shape) != spec.shape:
                fault = "missing" if value is None else f"of shape {tuple(value.shape)} instead of {spec.shape}"
                raise ValueError(
                    f"the checkpoint does not fit: {_key(pair, spec)} is {fault}. Resume with the model, rank and mode "
                    "it was written with, or from an earlier checkpoint."
                )
            states.setdefault(parameter, {})[spec.name] = value.to(pair.A.device, spec.dtype, copy=True)
    return states


def whole(tensor: Any) -> Tensor:
    """A state tensor of a checkpoint, gathered if it is a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _key(pair: LoRAPair, spec: StateSpec) -> str:
    return f"{unwrapped_name(pair.name)}.{pair.adapter_name}.{spec.side}.{spec.name}"


def _entries(pair: LoRAPair, rule: UpdateRule) -> list[tuple[Tensor, StateSpec]]:
    """Each tensor of the state of a pair, with the parameter under which it is kept: the step counts come first."""
    specs = rule.specs(pair)
    entries: list[tuple[Tensor, StateSpec]] = []
    for side, parameter in (("A", pair.A), ("B", pair.B)):
        entries.append((parameter, StateSpec("step", side, (), torch.float32)))
        entries += [(parameter, spec) for spec in specs if spec.side == side]
    return entries


def _has_begun(pair: LoRAPair, rule: UpdateRule, state: State) -> bool:
    """Whether the state of a pair exists: before its first step, distributed checkpoints keep a step count alone."""
    return all(spec.name in state.get(parameter, {}) for parameter, spec in _entries(pair, rule))


def _stepped(
    ownership: PairOwnership, state: State, rule: UpdateRule
) -> Iterator[tuple[LoRAPair, int, float, Tensor, StateSpec]]:
    """The entries of all pairs that have been stepped, with their pairs, owners and step counts, on all ranks alike."""
    begun = [_has_begun(pair, rule, state) for pair in ownership.owned]
    known = {id(pair): float(state[pair.A]["step"]) for pair, has in zip(ownership.owned, begun, strict=True) if has}
    flags = [
        [float(id(pair) in known) for pair in ownership.pairs],
        [known.get(id(pair), 0.0) for pair in ownership.pairs],
    ]
    together = ownership.total(torch.tensor(flags, dtype=torch.float32, device=ownership.pairs[0].A.device)).tolist()
    for index, (pair, has_begun, steps) in enumerate(zip(ownership.pairs, *together, strict=True)):
        for parameter, spec in _entries(pair, rule) if has_begun else ():
            yield pair, ownership.owner_of(index), steps, parameter, spec


def _rows_of(
    access: ShardedAccess, spec: StateSpec, value: Tensor | None, source: int | None, device: torch.device
) -> Tensor:
    """This rank's rows of a tensor that the rank `source` holds, or every rank if that is `None`."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    group, shape, dtype = access.group, spec.shape, spec.dtype
    root = None if source is None else dist.get_global_rank(group, source)
    if not shape:
        step = torch.empty((), dtype=dtype, device=device) if value is None else value.clone()
        if root is not None:
            dist.broadcast(step, src=root, group=group)
        return step
    ranks, rank = group.size(), group.rank()
    height = -(-shape[0] // ranks)
    rows = max(0, min(height, shape[0] - rank * height))
    if root is None or not height:
        part = torch.empty(0, *shape[1:], dtype=dtype, device=device) if value is None else value
        part = part[rank * height : rank * height + rows].clone()
    else:
        parts = None if value is None else list(_padded(value, height * ranks).split(height))
        part = torch.empty(height, *shape[1:], dtype=dtype, device=device)
        dist.scatter(part, parts, src=root, group=group)
        part = part[:rows].contiguous()
    placements = [Replicate() for _ in range(access.mesh.ndim)]
    placements[access.mesh_dim or 0] = Shard(0)  # type: ignore[call-overload]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, access.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])
