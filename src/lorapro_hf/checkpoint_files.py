"""What do the files of a `Trainer`'s checkpoint hold, and are they whole and of one step?"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorapro_hf.loading import tensor_shapes
from lorapro_hf.unpickling import read_tensors

STATE, OPTIMIZER, SCHEDULER, SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
RNG = "rng_state*.pth"
_WRITTEN_BY_TORCH = (OPTIMIZER, SCHEDULER, SCALER, RNG, "**/adapter_model.bin")
# Keys that tell what is in a file; a GradScaler that is off has an empty state.
_KEYS = {
    OPTIMIZER: ({"state", "param_groups"}, "an optimizer"),
    SCHEDULER: ({"last_epoch"}, "a learning rate schedule"),
    SCALER: ({"scale"}, "a gradient scaler"),
    RNG: ({"python", "numpy", "cpu"}, "random number generators"),
}
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
                with zipfile.ZipFile(file):  # its directory stands at the end, which is what a cut takes away
                    pass
                if pattern in _KEYS:
                    read_state(file, *_KEYS[pattern])
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
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(step, int):
        raise ValueError("it has no global_step")
    return step


def read_optimizer_state(file: Path) -> dict[str, Any]:
    """What an `optimizer.pt` holds, its tensors left on the disk.

    Raises:
        ValueError: the file is cut off, or not of an optimizer.
    """
    return read_state(file, *_KEYS[OPTIMIZER])


def read_state(file: Path, keys: set[str], kind: str) -> dict[str, Any]:
    """The state that a file of torch holds, its tensors left on the disk.

    Args:
        file: the file.
        keys: those that such a state has.
        kind: what has such a state, for the message.

    Raises:
        ValueError: the file is cut off, is of another kind or could run code. Nothing of it has been run.
    """
    state = read_tensors(file)
    if not isinstance(state, dict) or not (keys <= state.keys() or (file.name == SCALER and not state)):
        raise ValueError(f"it holds no state of {kind}")
    return state


def find_missing_rng(folder: Path, known_ranks: int = 1) -> str | None:
    """The random state of a rank that is missing in a checkpoint, `None` if each rank's is there.

    One process writes `rng_state.pth`, several write `rng_state_0.pth` and so on.

    Args:
        folder: the checkpoint.
        known_ranks: as many ranks at least have written it.
    """
    ranks = {int(match[1]) for file in folder.glob(RNG) if (match := re.fullmatch(r"rng_state_(\d+)\.pth", file.name))}
    absent = sorted(set(range(max(known_ranks, max(ranks, default=0) + 1))) - ranks)
    if not absent or (known_ranks == 1 and (folder / "rng_state.pth").is_file()):
        return None
    return f"rng_state_{absent[0]}.pth" if ranks or known_ranks > 1 else "rng_state.pth"
