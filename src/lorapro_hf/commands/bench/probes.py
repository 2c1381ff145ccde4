"""How much does one step allocate, and how many kernels does it launch? Measured in steps that are not timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], object]
_LAST = "last step"
_NO_KERNEL = ("empty", "new_empty", "resize", "set_", "_local_scalar_dense", "detach", "lift")


@dataclass(frozen=True)
class Allocations:
    """Memory and kernels of a step.

    On the CPU the operators that compute count as kernels (no views, no empty tensors). An operator on a list of
    tensors counts once, as on CUDA; one of linear algebra may run several kernels.
    """

    peak: int  # most bytes that the step holds beyond those before it
    shapes: frozenset[tuple[int, ...]]  # of the new tensors that operators returned
    largest: tuple[int, ...] | None  # the shape among these that takes most bytes
    kernels: int


class _Operators(TorchDispatchMode):
    """Counts the operators that compute, and notes the shapes of the tensors that they return in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[tuple[int, ...], int] = {}
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        inputs = {_address(item) for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)}
        result = func(*args, **(kwargs or {}))
        new = [item for item in tree_leaves(result) if isinstance(item, Tensor) and _address(item) not in inputs]
        self.sizes |= {tuple(item.shape): item.untyped_storage().nbytes() for item in new}
        self.kernels += _computes(func)
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _computes(func: Any) -> bool:
    """Whether an operator does more than view, allocate or read a number."""
    if func.namespace == "profiler":  # the marks of record_function
        return False
    returned = [value.alias_info for value in func._schema.returns]
    is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return not is_view and not func.overloadpacket.__name__.startswith(_NO_KERNEL)


def memory_of(step: Step, device: torch.device) -> Allocations:
    """Measure the allocations and kernels of one step; runs it three times.

    On the CPU the allocator's events are read, so that memory inside operators counts; libraries that allocate by
    themselves (workspaces of MKL or oneDNN) are not seen. On CUDA it is the allocator's peak.
    """
    on_cuda = device.type == "cuda"
    peak = _cuda_peak(step, device) if on_cuda else _cpu_peak(step)
    operators = _operators_of(step)
    kernels, sizes = cuda_kernels(step) if on_cuda else operators.kernels, operators.sizes
    return Allocations(peak, frozenset(sizes), max(sizes, key=sizes.__getitem__, default=None), kernels)


def kernels_of(step: Step, device: torch.device) -> int:
    """The number of kernels of one step; runs it once."""
    return cuda_kernels(step) if device.type == "cuda" else _operators_of(step).kernels


def _operators_of(step: Step) -> _Operators:
    with _Operators() as operators:
        step()
    return operators


def _cpu_peak(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()  # the allocator reports the release of a block only if the profiler saw its allocation
        with record_function(_LAST):
            step()
    results: Any = profiler.profiler.kineto_results
    events = sorted(results.events(), key=lambda event: event.start_ns())
    start = next(place for place, event in enumerate(events) if event.name() == _LAST)
    now = peak = 0
    for event in events[start:]:
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def _cuda_peak(step: Step, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


def cuda_kernels(step: Step) -> int:
    """The number of kernels that a step launches on CUDA, without copies."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    results: Any = profiler.profiler.kineto_results
    launched = [
        event for event in results.events() if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    ]
    return sum(not event.name().startswith(("Memcpy", "Memset")) for event in launched)


def waits_for_device(step: Step) -> str | None:
    """The reason why the host waits for the CUDA device in a step; `None` if it does not wait."""
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    return None
