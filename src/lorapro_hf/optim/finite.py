"""Do factors, their state or learning rates hold NaN or Inf? The error names the tensor, on all ranks alike.

Gradients that are not finite are no error: the step is skipped and training goes on. Reading values waits for the
device, so it is done before the first step, at saves and after skipped steps only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.distributed.access import Access, local
from lorapro_hf.factors.pairs import LoRAPair, unwrapped_name

Named = tuple[str, Tensor]  # the name of a tensor in messages, and the tensor


def require_finite(named: Iterable[Named], group: dist.ProcessGroup | None = None) -> None:
    """Raise if a tensor holds NaN or Inf, on all ranks of a group if on any.

    Args:
        named: the tensors.
        group: the ranks that call this together.

    Raises:
        ValueError: the message names the first tensor.
    """
    broken = find_broken(named)
    if group is not None and group.size() > 1:
        of_ranks: list[str] = [""] * group.size()
        dist.all_gather_object(of_ranks, broken, group=group)
        broken = next(filter(None, of_ranks), "")
    if broken:
        raise ValueError(
            f"NaN or Inf in {broken}. No step can mend that: go back to an earlier checkpoint, and lower the learning "
            "rate if the training itself has led there."
        )


def find_broken(named: Iterable[Named]) -> str:
    """The name of the first tensor with NaN or Inf and the number of further ones, empty without any."""
    alike: dict[tuple[torch.device, torch.dtype], list[Named]] = {}
    for name, tensor in named:
        # shards on the meta device are checked once they are loaded
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            alike.setdefault((tensor.device, tensor.dtype), []).append((name, tensor.detach()))
    broken = []
    for some in alike.values():
        # unlike isfinite, aminmax allocates no memory of the size of the tensor
        extremes = torch.stack([extreme for _, tensor in some for extreme in torch.aminmax(tensor)])
        finite = extremes.isfinite().view(-1, 2).all(-1).tolist()
        broken += [name for (name, _), is_finite in zip(some, finite, strict=True) if not is_finite]
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return broken[0] + more if broken else ""


def of_factors(pairs: Iterable[LoRAPair], access: Access) -> Iterator[Named]:
    """This rank's parts of all factors."""
    for pair in pairs:
        for factor, parameter in zip("AB", (pair.A, pair.B), strict=True):
            yield _name(pair, factor), access.held(parameter)


def of_states(pairs: Iterable[LoRAPair], state: Mapping[Tensor, Mapping[str, Tensor]]) -> Iterator[Named]:
    """The state of pairs."""
    for pair in pairs:
        for factor, parameter in zip("AB", (pair.A, pair.B), strict=True):
            for name, tensor in state.get(parameter, {}).items():
                yield f"the state {name!r} of {_name(pair, factor)}", tensor


def of_groups(groups: Sequence[dict[str, Any]]) -> Iterator[Named]:
    """Learning rates that are tensors."""
    for index, group in enumerate(groups):
        if isinstance(group["lr"], Tensor):
            yield f"the learning rate of param group {index}", group["lr"]


def of_others(
    groups: Iterable[tuple[dict[str, Any], list[Tensor]]], state: Mapping[Tensor, Mapping[str, Any]] | None
) -> Iterator[Named]:
    """This rank's parts of the parameters that belong to no pair, and of their state if that is given."""
    for index, (group, parameters) in enumerate(groups):
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        for parameter in parameters:
            name = names.get(id(parameter), f"a parameter of param group {index}")
            yield name, local(parameter)
            for moment, tensor in ({} if state is None else state.get(parameter, {})).items():
                yield f"the state {moment!r} of {name}", local(tensor)


def require_finite_rates(groups: Iterable[dict[str, Any]]) -> None:
    """Raise if a learning rate is NaN or Inf, without a wait for the device: rates on a device are not read.

    Raises:
        ValueError: the message names the param group.
    """
    for index, group in enumerate(groups):
        rate = group["lr"]
        if (not isinstance(rate, Tensor) or can_be_read(rate)) and not math.isfinite(rate):
            raise ValueError(
                f"the learning rate of param group {index} is {float(rate)}, which would make its parameters NaN. Look "
                f"at the scheduler, or set optimizer.param_groups[{index}]['lr']."
            )


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host can read a value without waiting for a device."""
    return tensor.device.type == "cpu"


def _name(pair: LoRAPair, factor: str) -> str:
    return f"lora_{factor} of {unwrapped_name(pair.name)} (adapter {pair.adapter_name!r})"
