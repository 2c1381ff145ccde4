"""Which state do the files of a `Trainer`'s checkpoint hold, and are the files whole?"""

from __future__ import annotations

import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorapro_hf.checkpoints.adapters import tensor_shapes
from lorapro_hf.utils.unpickling import read_tensors

STATE, OPTIMIZER, SCHEDULER, SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
RNG, METHODS = "rng_state*.pth", "lora_method_*.pt"
NAME = r"checkpoint-(\d+)"
BY_ENGINE = ("pytorch_model_fsdp*", "optimizer.bin", "optimizer_*", "global_step*", "latest", "zero_to_fp32.py")
_WRITTEN_BY_TORCH = (OPTIMIZER, SCHEDULER, SCALER, RNG, METHODS, "**/adapter_model.bin")
_WRITTEN_BY_SAFETENSORS = "**/adapter_model.safetensors"


def find_damage(folder: Path) -> str | None:
    """The first file of a checkpoint that cannot be read, and why; `None` if there is none."""
    for file, damage in _damages(folder):
        return f"{file.relative_to(folder)} is cut off or damaged ({damage})"
    return None


def _damages(folder: Path) -> Iterator[tuple[Path, str]]:
    try:
        read_global_step(folder)
    except ValueError as error:
        yield folder / STATE, str(error)
    for pattern in _WRITTEN_BY_TORCH:
        for file in sorted(folder.glob(pattern)):
            try:
                with zipfile.ZipFile(file):  # a cut takes away its directory, which stands at the end
                    pass
                if pattern in _READERS:
                    _READERS[pattern](file)
            except (zipfile.BadZipFile, ValueError) as error:
                yield file, str(error)
    for file in sorted(folder.glob(_WRITTEN_BY_SAFETENSORS)):
        try:
            tensor_shapes(file)
        except SafetensorError as error:
            yield file, str(error)


def read_global_step(folder: Path) -> int:
    """The number of steps that a checkpoint's `trainer_state.json` counts.

    Raises:
        ValueError: the file is cut off, or holds no such number.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("it is cut off, or was never JSON") from error
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(step, int):
        raise ValueError("it has no global_step")
    return step


def read_optimizer_state(file: Path) -> dict[str, Any]:
    """The state of an `optimizer.pt`; its tensors stay on the disk.

    Raises:
        ValueError: the file is cut off, or not of an optimizer.
    """
    state = read_tensors(file)
    content, groups = (state.get(key) if isinstance(state, dict) else None for key in ("state", "param_groups"))
    is_mapped = isinstance(content, dict) and all(isinstance(each, dict) for each in content.values())
    if not is_mapped or not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("it holds no state of an optimizer")
    return dict(state)


def read_scheduler_state(file: Path) -> dict[str, Any]:
    """The state of a `scheduler.pt`, whose content is up to the schedule.

    Raises:
        ValueError: the file is cut off, or of an optimizer, a gradient scaler or random number generators.
    """
    state = read_tensors(file)
    if not isinstance(state, dict) or {"param_groups", "scale", "cpu"} & state.keys():
        raise ValueError("it holds no state of a schedule")
    return state


def read_method_file(file: Path) -> dict[str, Any]:
    """The content of a method's file: its state, and the factors where the adapter is saved in another form.

    Raises:
        ValueError: the file is cut off, or not of a method.
    """
    return _read_state(file, {"state", "factors"}, "a method")


def _read_scaler_state(file: Path) -> Any:
    state = read_tensors(file)
    return state if state == {} else _read_state(file, {"scale"}, "a gradient scaler")  # empty while it is off


def _read_random_state(file: Path) -> Any:
    return _read_state(file, {"python", "numpy", "cpu"}, "random number generators")


def _read_state(file: Path, keys: set[str], kind: str) -> dict[str, Any]:
    state = read_tensors(file)
    if not isinstance(state, dict) or not keys <= state.keys():
        raise ValueError(f"it holds no state of {kind}")
    return state


_READERS: dict[str, Callable[[Path], Any]] = {
    OPTIMIZER: read_optimizer_state,
    SCHEDULER: read_scheduler_state,
    SCALER: _read_scaler_state,
    RNG: _read_random_state,
    METHODS: read_method_file,
}


def find_missing_rng(folder: Path, known_ranks: int = 1) -> str | None:
    """The first random state that is missing in a checkpoint, `None` if each rank's is there.

    One process writes `rng_state.pth`, several write `rng_state_0.pth` and so on. A node that saves on its own disk
    writes those of its own ranks.

    Args:
        folder: the checkpoint.
        known_ranks: the least number of ranks that wrote the checkpoint; 1 if its files do not tell.
    """
    ranks = {int(match[1]) for file in folder.glob(RNG) if (match := re.fullmatch(r"rng_state_(\d+)\.pth", file.name))}
    first = min(ranks, default=0) if known_ranks == 1 else 0
    absent = next(rank for rank in itertools.count(first) if rank not in ranks)
    is_whole = absent >= max(known_ranks, max(ranks, default=0) + 1)
    if is_whole or (known_ranks == 1 and (folder / "rng_state.pth").is_file()):
        return None
    return f"rng_state_{absent}.pth" if ranks or known_ranks > 1 else "rng_state.pth"
