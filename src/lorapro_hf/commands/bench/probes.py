"""What does one step allocate and launch? Looked at in steps that are not timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Step = Callable[[], object]
_LAST = "last step"


@dataclass(frozen=True)
class MemoryUse:
    """What a step allocates beyond what was there before it.

    Args:
        peak: Most bytes at a time.
        largest: Bytes of the largest single allocation, code inside compiled graphs included.
        shape: Shape of the largest new tensor that an operator returned, `None` if there was none.
        shapes: Shapes of all of them.
    """

    peak: int
    largest: int
    shape: tuple[int, ...] | None
    shapes: frozenset[tuple[int, ...]]


class _NewTensors(TorchDispatchMode):
    """Notes the shape of each tensor that an operator returns in memory that none of its arguments has."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.largest: tuple[int, tuple[int, ...]] | None = None

    # Both let compiled functions run compiled: under any other mode they would run, from then on, uncompiled.
    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        inputs = {_address(item) for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)}
        result = func(*args, **(kwargs or {}))
        for item in tree_flatten(result)[0]:
            if isinstance(item, Tensor) and _address(item) not in inputs:
                size, shape = item.untyped_storage().nbytes(), tuple(item.shape)
                self.shapes.add(shape)
                if self.largest is None or size > self.largest[0]:
                    self.largest = (size, shape)
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def memory_of(step: Step, device: torch.device, twice: bool = True) -> MemoryUse:
    """Measure what one step allocates; runs it two or three times.

    On the CPU the allocator's own events are read, so that memory inside operators and compiled code counts; libraries
    that allocate by themselves (workspaces of MKL or oneDNN) are not seen. On CUDA it is the allocator's peak.

    Args:
        step: What to look at.
        device: Where it runs.
        twice: Look at the second of two steps on the CPU: the allocator reports the release of a block only if it saw
            its allocation, so that what a step replaces must be that of a step before it. With False it counts in full.
    """
    peak, largest = _cuda_memory(step, device) if device.type == "cuda" else _cpu_memory(step, twice)
    with _NewTensors() as seen:
        step()
    size, shape = seen.largest or (0, None)
    return MemoryUse(peak, max(largest, size), shape, frozenset(seen.shapes))


def _cpu_memory(step: Step, twice: bool) -> tuple[int, int]:
    """Peak and largest allocation in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if twice:
            step()
        with record_function(_LAST):
            step()
    results: Any = profiler.profiler.kineto_results
    every = [event for event in results.events() if event.device_type() == DeviceType.CPU]
    start = next(event.start_ns() for event in every if event.name() == _LAST)
    events = [event for event in every if event.name() == "[memory]" and event.start_ns() >= start]
    now = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak, largest = max(peak, now), max(largest, event.nbytes())
    return peak, largest


def _cuda_memory(step: Step, device: torch.device) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before), 0


@dataclass(frozen=True)
class KernelCount:
    """How much work a step launches.

    Args:
        kernels: On CUDA its kernels; on the CPU the innermost operators that compute (no views, no allocations), each
            compiled graph counted once at least, and an operator on lists of tensors, one loop here, as the one kernel
            that it is on CUDA.
        calls: Operators and compiled graphs that Python called.
    """

    kernels: int
    calls: int


@dataclass
class _Event:
    """An operator or a marked region, and what ran inside it."""

    name: str
    end: int = 0
    children: list[_Event] = field(default_factory=list)


def _tree(events: Sequence[Any]) -> list[_Event]:
    """The outermost of the profiler's events, with the others inside; the profiler's own tree takes far longer."""
    on_cpu = [event for event in events if event.device_type() == DeviceType.CPU and event.name() != "[memory]"]
    threads: dict[int, list[_Event]] = {}
    for event in sorted(on_cpu, key=lambda e: (e.start_ns(), -e.duration_ns())):
        thread = event.start_thread_id()
        stack = threads.setdefault(thread, [_Event("")])
        while len(stack) > 1 and event.start_ns() >= stack[-1].end:
            stack.pop()
        node = _Event(event.name(), event.start_ns() + event.duration_ns())
        stack[-1].children.append(node)
        stack.append(node)
    return [root for stack in threads.values() for root in stack[0].children]


def kernels_of(step: Step, device: torch.device) -> KernelCount:
    """Count what one step launches; runs it once."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    results: Any = profiler.profiler.kineto_results
    events = list(results.events())
    roots = _tree(events)
    calls = sum(_called(event) for event in roots)
    if cuda:
        copies = ("Memcpy", "Memset")
        on_device = [
            event for event in events if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
        ]
        return KernelCount(sum(not event.name().startswith(copies) for event in on_device), calls)
    return KernelCount(sum(_computing(event) for event in roots), calls)


def _is_graph(event: _Event) -> bool:
    return event.name.startswith(("Torch-Compiled Region", "## Call CompiledFxGraph"))


def _called(event: _Event) -> int:
    """Operators that Python called, at or below an event."""
    if event.name.startswith("aten::") or _is_graph(event):
        return 1
    return sum(_called(child) for child in event.children)


def _computing(event: _Event) -> int:
    """Innermost operators that compute, at or below an event."""
    if event.name.startswith("aten::"):
        kind = _kind(event.name)
        if kind == "free":
            return 0
        if event.name.startswith("aten::_foreach_"):
            return 1
        # `aten::to` inside an operator makes a tensor of a Python number
        inner = sum(_computing(child) for child in event.children if kind == "several" or child.name != "aten::to")
        return inner if kind == "several" else max(1, inner)
    inner = sum(_computing(child) for child in event.children)
    return max(1, inner) if _is_graph(event) else inner


_ALLOCATIONS = ("empty", "new_empty", "resize", "set_", "item", "_local_scalar_dense", "is_nonzero", "detach", "lift")


@functools.cache
def _kind(name: str) -> str:
    """`free`: computes nothing; `several`: only calls others; `kernel`: computes."""
    short = name.removeprefix("aten::")
    if short.startswith(_ALLOCATIONS):
        return "free"
    packet = getattr(torch.ops.aten, short, None)
    if packet is None:
        return "kernel"
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    if short == "_to_copy" or any(_is_composite(overload.name()) for overload in overloads):
        return "several"
    returned = [value.alias_info for overload in overloads for value in overload._schema.returns]
    return "free" if returned and all(alias is not None and not alias.is_write for alias in returned) else "kernel"


def _is_composite(name: str) -> bool:
    """Whether an operator is nothing but calls of others."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    except RuntimeError:  # an overload for TorchScript only
        return False


def waits_for_device(step: Step) -> str | None:
    """`None` if a step runs without the host waiting for the CUDA device, else what says that it does."""
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    return None


def capture(step: Step, repeats: int = 20) -> float | str:
    """Milliseconds of a step replayed from a CUDA graph, or why it could not be captured."""
    try:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats
    except RuntimeError as error:
        return str(error).splitlines()[0]
