"""How is each optimizer built for a task, what is missing for it, and how much memory does it keep?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from lorapro_hf.commands.bench.settings import BASELINE, METHODS, Method
from lorapro_hf.commands.bench.workloads import ALPHA, Task
from lorapro_hf.optim.factory import create_lorapro_optimizer

RATE = 1e-5


class Adapted(Protocol):
    """What an optimizer is built for: a model with LoRA, its factors in the order A, B, A, B, and their rank."""

    model: PeftModel
    factors: list[nn.Parameter]

    @property
    def rank(self) -> int:
        """Rank of all factors."""


def missing(method: Method) -> str | None:
    """What to do for a method whose package is not installed, else `None`."""
    if method.package is None or importlib.util.find_spec(method.package) is not None:
        return None
    return f"not installed: pip install '{method.install}'"


def _adamw(task: Adapted) -> Any:
    return torch.optim.AdamW(task.factors, lr=RATE, weight_decay=0.0, fused=True)


def _adamw_package(mode: str) -> Callable[[Adapted], Any]:
    def build(task: Adapted) -> Any:
        from lora_pro import LoRAProAdamW

        # `eig`, because the default solver of that package solves another equation
        settings = {"lr": RATE, "weight_decay": 0.0, "lorapro_mode": mode, "efficient_solver": "eig"}
        return LoRAProAdamW(task.model, **settings)

    return build


def _riemannian(task: Adapted) -> Any:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(task.model, torch.optim.AdamW, lr=RATE, weight_decay=0.0)


def _lorafa(task: Adapted) -> Any:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(task.model, r=task.rank, lora_alpha=ALPHA, lr=RATE)


def _lorarite(task: Adapted) -> Any:
    from pytorch_optimizer import LoRARite

    return LoRARite(task.factors, lr=RATE)  # in the order A, B, A, B, as it wants them


_BUILDERS: Mapping[str, Callable[[Adapted], Any]] = {
    BASELINE: _adamw,
    "adamw_efficient": _adamw_package("efficient"),
    "adamw_full": _adamw_package("full"),
    "riemannian": _riemannian,
    "lorafa": _lorafa,
    "lorarite": _lorarite,
}


def build_optimizer(name: str, task: Adapted) -> Any:
    """The optimizer of that name for the factors of `task`; whatever it is, it has `step()`."""
    mode = METHODS[name].mode
    if mode is not None:
        return create_lorapro_optimizer(task.model, lr=RATE, config={"mode": mode})
    return _BUILDERS[name](task)


def state_bytes(optimizer: Any) -> int:
    """Bytes of the state that the optimizer keeps for its parameters, shared memory counted once."""
    # lora-pro-adamw keeps its moments beside `state`
    own = [value for name, value in vars(optimizer).items() if name.startswith("_state_")]
    return _bytes(_tensors([getattr(optimizer, "state", {}), own], set()))


def kept_bytes(optimizer: Any, task: Task) -> int:
    """Bytes that the optimizer keeps in all, beyond parameters and gradients: its state, and buffers beside it."""
    tensors = list(_tensors(vars(optimizer), set()))
    known = {_address(p) for p in task.model.parameters()}
    known |= {_address(p.grad) for p in task.factors if p.grad is not None}
    return _bytes(tensor for tensor in tensors if _address(tensor) not in known)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum({_address(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors reachable from `value` through containers and plain objects, not through models."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
        return
    if id(value) in seen or value is None or isinstance(value, str | int | float | type | nn.Module | torch.dtype):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        items: list[Any] = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        items = list(value)
    elif not callable(value) and hasattr(value, "__dict__"):
        items = list(vars(value).values())
    else:
        items = []
    # objects of __slots__ keep theirs elsewhere
    items += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ()) if name != "__weakref__"]
    for item in items:
        yield from _tensors(item, seen)
