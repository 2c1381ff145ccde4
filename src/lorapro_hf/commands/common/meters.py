"""How much memory does an optimizer keep?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def state_bytes(optimizer: Any) -> int:
    """Bytes of the state that the optimizer keeps for its parameters, shared memory counted once."""
    # lora-pro-adamw keeps its moments beside `state`
    beside = [value for name, value in vars(optimizer).items() if name.startswith("_state_")]
    return _bytes(_tensors([getattr(optimizer, "state", {}), beside], set()))


def kept_bytes(optimizer: Any, model: nn.Module) -> int:
    """Bytes that the optimizer keeps beyond parameters and gradients: its state and its buffers."""
    trained = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    known = {_address(tensor) for tensor in trained}
    return _bytes(tensor for tensor in _tensors(vars(optimizer), set()) if _address(tensor) not in known)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in containers and attributes below `value`, but for parameters and modules."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
        return
    if id(value) in seen or value is None or isinstance(value, str | int | float | type | nn.Module | torch.dtype):
        return
    seen.add(id(value))
    items: list[Any] = []
    if isinstance(value, Mapping):
        items += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        items += value
    elif not callable(value) and hasattr(value, "__dict__"):
        items += vars(value).values()
    items += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ()) if name != "__weakref__"]
    for item in items:
        yield from _tensors(item, seen)
