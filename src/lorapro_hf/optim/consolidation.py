"""How does state that is spread over ranks become a checkpoint that any number of ranks can load?

Where every rank holds whole factors, one rank collects the state of all pairs. Where factors are DTensors their state
is cut into rows as DTensors on the same mesh, as distributed checkpoints want it. All functions are collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import ShardedAccess
from lorapro_hf.distributed.attendance import Absence, Attendance
from lorapro_hf.distributed.ownership import PairOwnership
from lorapro_hf.factors.pairs import LoRAPair, unwrapped_name
from lorapro_hf.optim.state import state_dtype, state_shapes

States = dict[Tensor, dict[str, Tensor]]


class _Entry(NamedTuple):
    parameter: Tensor
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def collect_states(
    ownership: PairOwnership, state: Mapping[Tensor, dict[str, Any]], config: LoRAProConfig, to: int
) -> States:
    """The state of all pairs, on the CPU of the rank `to` of the group.

    The other ranks get the state of their own pairs and the steps of the others', so that all ranks have an entry for
    each pair that has been stepped. Distributed checkpoints take from a rank what it has, and put it together.
    """
    assert ownership.group is not None
    found: States = {}
    for index, (pair, steps) in enumerate(zip(ownership.pairs, _steps(ownership, state), strict=True)):
        owner = ownership.owner_of(index)
        for entry in [] if steps is None else _entries(pair, config):
            own = None
            if ownership.rank == owner:
                own = state[entry.parameter][entry.name].contiguous()
                if owner != to:
                    dist.send(own, dst=dist.get_global_rank(ownership.group, to), group=ownership.group)
            elif ownership.rank == to:
                own = torch.empty(entry.shape, dtype=entry.dtype, device=pair.A.device)
                dist.recv(own, src=dist.get_global_rank(ownership.group, owner), group=ownership.group)
            elif entry.name == "step":
                own = torch.tensor(steps, dtype=torch.float32)
            if own is not None:
                found.setdefault(entry.parameter, {})[entry.name] = own.cpu() if ownership.rank == to else own
    return found


def shard_states(ownership: PairOwnership, state: Mapping[Tensor, dict[str, Any]], config: LoRAProConfig) -> States:
    """The state of all pairs in rows: a DTensor on the mesh of the factors for each moment, steps on every rank."""
    access = ownership.access
    assert isinstance(access, ShardedAccess)
    found: States = {}
    for index, (pair, steps) in enumerate(zip(ownership.pairs, _steps(ownership, state), strict=True)):
        for entry in [] if steps is None else _entries(pair, config):
            owner = ownership.owner_of(index) if ownership.group else None
            own = state[entry.parameter][entry.name] if owner in (None, ownership.rank) else None
            found.setdefault(entry.parameter, {})[entry.name] = _rows_of(access, entry, own, owner)
    return found


def await_all(attendance: Attendance, saves: bool) -> None:
    """Wait until all ranks have come to give their parts of the state.

    Args:
        attendance: of the ranks.
        saves: whether it is known that all ranks save together; otherwise `state_dict()` may have been called on some.

    Raises:
        RuntimeError: a rank has ended, or has not come within the limit of the process group.
    """
    try:
        absence = attendance.wait_for_all()
    except dist.DistError as error:
        raise RuntimeError(
            "the store of the process group has gone with the process that kept it, rank 0 or its launcher, before "
            f"the optimizer's state was collected. {_GO_ON}"
        ) from error
    if absence is not None:
        raise RuntimeError(_reason(absence, attendance, saves))


_GO_ON = "See its output for the reason, and go on from the last complete checkpoint."


def _reason(absence: Absence, attendance: Attendance, saves: bool) -> str:
    several = len(absence.ranks) > 1
    who = f"rank{'s' if several else ''} {', '.join(map(str, absence.ranks))}"
    if absence.ended:
        return f"{who} ended before the optimizer's state was collected, of which each rank holds a part. {_GO_ON}"
    limit = f"{attendance.limit.total_seconds():g} seconds"
    if saves:
        return (
            f"saving takes all ranks: rank {dist.get_rank()} has waited {limit}, the limit of the process group, for "
            f"{who} to come and give its part of the optimizer's state. It ended, or still writes other files. Raise "
            "the limit where a disk is that slow: ddp_timeout in the arguments of a trainer, or "
            "init_process_group(timeout=...)."
        )
    return (
        f"state_dict() was called on rank {dist.get_rank()}, but not on all ranks that share the optimizer's state "
        f"out among themselves: {who} did not call it within {limit}, the limit of the process group. Call it on all "
        "ranks (under DDP optimizer.consolidate_state_dict() on all ranks first will do), or keep the whole state on "
        "each with LoRAProConfig(shard_states=False)."
    )


def own_state(
    ownership: PairOwnership, state: Mapping[Tensor, dict[str, Any]], config: LoRAProConfig
) -> dict[str, Tensor]:
    """The state of this rank's pairs by names that hold on any number of ranks. Not collective."""
    return {
        f"{_key(pair, entry)}.{entry.name}": state[entry.parameter][entry.name].contiguous()
        for pair in ownership.owned
        for entry in _entries(pair, config)
        if "exp_avg" in state.get(pair.A, {})
    }


def read_own_state(ownership: PairOwnership, read: Callable[[str], Tensor | None], config: LoRAProConfig) -> States:
    """The inverse of `own_state`, from what any number of ranks have saved. Not collective.

    Args:
        ownership: who steps what now.
        read: gives the tensor of a name, `None` where there is none.
        config: mode and dtype of the moments.

    Raises:
        ValueError: a pair has part of its state only, or state of another shape.
    """
    found: States = {}
    for pair in ownership.owned:
        entries = _entries(pair, config)
        names = [f"{_key(pair, entry)}.{entry.name}" for entry in entries]
        values = [read(name) for name in names]
        if all(value is None for value in values):  # never stepped
            continue
        for entry, name, value in zip(entries, names, values, strict=True):
            if value is None or tuple(value.shape) != entry.shape:
                what = "missing" if value is None else f"of shape {tuple(value.shape)} instead of {entry.shape}"
                raise ValueError(
                    f"the checkpoint does not fit: {name} is {what}. Resume with the model, rank and mode it was "
                    "written with, or from an earlier checkpoint."
                )
            found.setdefault(entry.parameter, {})[entry.name] = value.to(pair.A.device, entry.dtype, copy=True)
    return found


def _key(pair: LoRAPair, entry: _Entry) -> str:
    return f"{unwrapped_name(pair.name)}.{pair.adapter_name}.{'A' if entry.parameter is pair.A else 'B'}"


def whole(tensor: Any) -> Tensor:
    """A state tensor of a checkpoint, gathered if it is a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _rows_of(access: ShardedAccess, entry: _Entry, own: Tensor | None, owner: int | None) -> Tensor:
    """This rank's part of a tensor that its owner holds, or every rank if there is no owner."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    group, device = access.group, entry.parameter.device
    source = None if owner is None else dist.get_global_rank(group, owner)
    if not entry.shape:
        step = torch.empty((), dtype=entry.dtype, device=device) if own is None else own.clone()
        if source is not None:
            dist.broadcast(step, src=source, group=group)
        return step
    ranks, rank = group.size(), group.rank()
    height = -(-entry.shape[0] // ranks)
    rows = max(0, min(height, entry.shape[0] - rank * height))
    if source is None or not height:
        part = torch.empty(0, *entry.shape[1:], dtype=entry.dtype, device=device) if own is None else own
        part = part[rank * height : rank * height + rows].clone()
    else:
        cut = None if own is None else list(_padded(own, height * ranks).split(height))
        part = torch.empty(height, *entry.shape[1:], dtype=entry.dtype, device=device)
        dist.scatter(part, cut, src=source, group=group)
        part = part[:rows].contiguous()
    placements = [Replicate() for _ in range(access.mesh.ndim)]
    placements[access.mesh_dim or 0] = Shard(0)  # type: ignore[call-overload]
    stride = torch.empty(entry.shape, device="meta").stride()
    return DTensor.from_local(
        part, access.mesh, placements, run_check=False, shape=torch.Size(entry.shape), stride=stride
    )


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _entries(pair: LoRAPair, config: LoRAProConfig) -> list[_Entry]:
    entries = []
    for parameter, shapes in zip((pair.A, pair.B), state_shapes(pair, config.mode, config.master_factors), strict=True):
        entries.append(_Entry(parameter, "step", (), torch.float32))
        entries += [
            _Entry(parameter, name, tuple(shape), state_dtype(pair, config, name)) for name, shape in shapes.items()
        ]
    return entries


def _steps(ownership: PairOwnership, state: Mapping[Tensor, dict[str, Any]]) -> list[float | None]:
    """How often each pair has been stepped, as its owner knows; `None` for a pair without any state."""
    own = {id(pair) for pair in ownership.owned}
    known = [state.get(pair.A, {}) if id(pair) in own else {} for pair in ownership.pairs]
    flags = [[float("exp_avg" in each) for each in known], [float(each.get("step", 0)) for each in known]]
    together = ownership.total(torch.tensor(flags, dtype=torch.float32, device=ownership.pairs[0].A.device)).tolist()
    return [steps if has_begun else None for has_begun, steps in zip(*together, strict=True)]
