"""How much memory does LoRA-Pro's optimizer need on each device, is it free, and which modes need less?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.optim.rules import all_settings, rule_of

# Files of a control group: its limit, what is in use, and the entry of memory.stat for caches that the kernel drops
# when memory is short.
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_NO_LIMIT = 2**60  # version 1 says "no limit" with the largest number of pages


class StateTooLargeError(ValueError):
    """The optimizer state of the chosen mode does not fit on a device; the message names the modes that fit."""


def readable_bytes(count: float) -> str:
    """`1536` as `"1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def state_bytes_by_device(
    pairs: Iterable[LoRAPair], config: LoRAProConfig, others: Iterable[Tensor] = ()
) -> dict[torch.device, int]:
    """Bytes of optimizer state on each device once every parameter has been stepped.

    Exact but for the step counters, 4 bytes for each parameter. Only shapes, dtypes and devices are read: the factors
    may be on the meta device.

    Args:
        pairs: from `find_lora_pairs(model)`.
        config: its `mode`, `moments_dtype` and `master_factors` count.
        others: trainable parameters of no pair, and tied to none; AdamW keeps two moments of each in its own dtype.
    """
    total: dict[torch.device, int] = defaultdict(int)
    rule = rule_of(config)
    for pair in pairs:
        total[pair.A.device] += sum(spec.nbytes for spec in rule.specs(pair))
    for parameter in others:
        total[parameter.device] += 2 * parameter.numel() * parameter.element_size()
    return dict(total)


def scratch_bytes(
    pairs: Iterable[LoRAPair], config: LoRAProConfig, place: torch.device | None = None
) -> dict[torch.device, int]:
    """Bytes on each device that a step of pairs may need beyond the state: an allowance, not a count.

    Activations, parameters and their gradients are not included. `place` is the device to assume for factors on the
    meta device.
    """
    on: dict[torch.device, list[LoRAPair]] = defaultdict(list)
    for pair in pairs:
        on[pair.A.device].append(pair)
    rule = rule_of(config)
    return {device: rule.scratch_bytes(some, place or device) for device, some in on.items()}


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or `None` where that is not known.

    CUDA: the driver's free memory and the unused memory of PyTorch's caching allocator. CPU: the system's available
    memory (`psutil`, which accelerate brings) within the limits of the process's control groups; caches that the
    kernel would drop count as available. Other devices, and a CPU without psutil and without limits: `None`.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        known = [count for count in (_system_available(), _cgroup_available()) if count is not None]
        return min(known, default=None)
    return None


def require_state_fits(pairs: Sequence[LoRAPair], config: LoRAProConfig, others: Sequence[Tensor] = ()) -> None:
    """Refuse a mode whose optimizer state cannot fit, before any of it is allocated.

    Activations and gradients are not counted. A device whose free memory is not known is never refused.

    Args:
        pairs: the pairs that this process steps, on the devices they are trained on.
        config: the settings of the optimizer.
        others: trainable parameters of no pair.

    Raises:
        StateTooLargeError: state and working memory exceed the free memory of a device. The message gives both and
            names the modes that fit.
    """
    need = _need(pairs, config, others)
    free = {device: available_bytes(device) for device in need}
    short = _devices_short_of(need, free)
    if not short:
        return
    listed = ", and ".join(
        f"{readable_bytes(need[device])} on {device}, where {readable_bytes(free[device] or 0)} are free"
        for device in short
    )
    raise StateTooLargeError(
        f"The optimizer state of {_setting_name(config, 'mode=')}, with a step's working memory, needs {listed}. "
        f"{_remedies(pairs, config, others, free)}, or turn this check off with check_memory=False (in the arguments "
        "lora_pro_check_memory=False)."
    )


def _remedies(
    pairs: Sequence[LoRAPair], config: LoRAProConfig, others: Sequence[Tensor], free: dict[torch.device, int | None]
) -> str:
    """The sentence that says what to do, with the modes that fit."""
    together = " (all devices together)" if len(free) > 1 else ""
    needs = [(setting, _need(pairs, setting, others)) for setting in all_settings(config.master_factors)]
    fitting = [_described(setting, sum(need.values())) for setting, need in needs if not _devices_short_of(need, free)]
    if fitting:
        return (
            f"Modes that fit{together}: {', '.join(fitting)}. Choose one with LoRAProConfig(mode=...) or "
            "--lora_pro_mode, adapt fewer layers (target_modules)"
        )
    least, smallest = min(((sum(need.values()), setting) for setting, need in needs), key=lambda each: each[0])
    return (
        f"No mode fits; the smallest, {_setting_name(smallest)}, needs {readable_bytes(least)}{together}. Adapt fewer "
        "layers (target_modules), choose a smaller r, free memory on it"
        + (", leave out master_factors" if config.master_factors else "")
    )


def _setting_name(config: LoRAProConfig, prefix: str = "") -> str:
    extras = [f"moments_dtype={config.moments_dtype!r}"] if config.moments_dtype != "float32" else []
    extras += ["master_factors=True"] if config.master_factors else []
    return f"{prefix}{config.mode!r}" + (f" with {' and '.join(extras)}" if extras else "")


def _described(config: LoRAProConfig, count: int) -> str:
    # At the rates of the other modes such a training would hardly move.
    rates = ", with learning rates of LoRA" if rule_of(config).takes_lora_rates else ""
    return f"{_setting_name(config)} ({readable_bytes(count)}{rates})"


def _need(pairs: Sequence[LoRAPair], config: LoRAProConfig, others: Sequence[Tensor]) -> dict[torch.device, int]:
    """State and working memory together."""
    need = defaultdict(int, state_bytes_by_device(pairs, config, others))
    for device, count in scratch_bytes(pairs, config).items():
        need[device] += count
    return need


def _devices_short_of(need: dict[torch.device, int], free: dict[torch.device, int | None]) -> list[torch.device]:
    return [device for device, count in need.items() if (room := free[device]) is not None and count > room]


def _system_available() -> int | None:
    try:
        import psutil  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _cgroup_available(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes until the tightest memory limit of the process's control groups and those above them, if there is one."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return None
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, names = (root / "memory", _CGROUP_V1) if controllers else (root, _CGROUP_V2)
        # A container may be shown its path on the host, which does not exist inside: then only the mount itself does.
        parts = PurePosixPath(path).parts[1:]
        levels = [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)] if ".." not in parts else [mount]
        rooms += [room for level in levels if (room := _cgroup_room(level, *names)) is not None]
    return min(rooms, default=None)


def _cgroup_room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Bytes that one control group may still take, or None if it has no limit."""
    try:
        limit, usage = (group / limit_name).read_text().strip(), int((group / usage_name).read_text())
    except OSError:
        return None
    if limit == "max" or int(limit) >= _NO_LIMIT:
        return None
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        lines = []
    droppable = sum(int(line.split()[1]) for line in lines if line.split()[0] == cache_name)
    return max(0, int(limit) - usage + droppable)
