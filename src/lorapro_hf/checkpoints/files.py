"""Which state do the files of a `Trainer`'s checkpoint hold, and are the files whole and of one save?"""

from __future__ import annotations

import itertools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorapro_hf.checkpoints.adapters import tensor_shapes
from lorapro_hf.utils.unpickling import read_tensors

STATE, OPTIMIZER, SCHEDULER, SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
RNG, METHODS = "rng_state*.pth", "lora_method_*.pt"
NAME = r"checkpoint-(\d+)"
BY_ENGINE = ("pytorch_model_fsdp*", "optimizer.bin", "optimizer_*", "global_step*", "latest", "zero_to_fp32.py")


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
    for pattern, read in _READERS.items():
        for file in sorted(folder.glob(pattern)):
            try:
                with zipfile.ZipFile(file):  # a cut takes away its directory, which stands at the end
                    pass
                read(file)
            except (zipfile.BadZipFile, ValueError) as error:
                yield file, str(error)
    for file in sorted(folder.glob("**/adapter_model.safetensors")):
        try:
            tensor_shapes(file)
        except SafetensorError as error:
            yield file, str(error)


def read_global_step(folder: Path) -> int:
    """The number of steps that a checkpoint's `trainer_state.json` counts; a `ValueError` if it is not there."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("it is cut off, or was never JSON") from error
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(step, int):
        raise ValueError("it has no global_step")
    return step


def read_optimizer_state(file: Path) -> dict[str, Any]:
    """The state of an `optimizer.pt`, whose tensors stay on the disk; a `ValueError` for any other file."""
    state = _read_state(file, {"state", "param_groups"}, "an optimizer")
    content, groups = state["state"], state["param_groups"]
    is_mapped = isinstance(content, dict) and all(isinstance(each, dict) for each in content.values())
    if not is_mapped or not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("it holds no state of an optimizer")
    return dict(state)


def _read_scheduler_state(file: Path) -> dict[str, Any]:
    """The state of a `scheduler.pt`, whose content is up to the schedule."""
    state = _read_state(file, set(), "a schedule")
    if {"param_groups", "scale", "cpu"} & state.keys():
        raise ValueError("it holds no state of a schedule")
    return state


def read_method_file(file: Path) -> dict[str, Any]:
    """A method's state, and the factors where the adapter is saved in another form; a `ValueError` for other files."""
    return _read_state(file, {"state", "factors"}, "a method")


def _read_state(file: Path, keys: set[str], kind: str, may_be_empty: bool = False) -> dict[str, Any]:
    state = read_tensors(file)
    if not isinstance(state, dict) or not (keys <= state.keys() or (may_be_empty and not state)):
        raise ValueError(f"it holds no state of {kind}")
    return state


# the readers of the files that torch writes
_READERS: dict[str, Callable[[Path], Any]] = {
    OPTIMIZER: read_optimizer_state,
    SCHEDULER: _read_scheduler_state,
    SCALER: partial(_read_state, keys={"scale"}, kind="a gradient scaler", may_be_empty=True),  # while it is off
    RNG: partial(_read_state, keys={"python", "numpy", "cpu"}, kind="random number generators"),
    METHODS: read_method_file,
    "**/adapter_model.bin": read_tensors,
}


def find_missing_rng(folder: Path, known_ranks: int = 1) -> str | None:
    """The first random state that a checkpoint lacks, `None` if each rank's is there.

    One process writes `rng_state.pth`, several write `rng_state_0.pth` and so on. A node that saves on its own disk
    writes those of its own ranks. At least `known_ranks` ranks wrote the checkpoint.
    """
    ranks = {int(match[1]) for file in folder.glob(RNG) if (match := re.fullmatch(r"rng_state_(\d+)\.pth", file.name))}
    first = min(ranks, default=0) if known_ranks == 1 else 0
    absent = next(rank for rank in itertools.count(first) if rank not in ranks)
    is_whole = absent >= max(known_ranks, max(ranks, default=0) + 1)
    if is_whole or (known_ranks == 1 and (folder / "rng_state.pth").is_file()):
        return None
    return f"rng_state_{absent}.pth" if ranks or known_ranks > 1 else "rng_state.pth"


def find_disagreement(folder: Path) -> str | None:
    """Why the files of a checkpoint cannot be of one save; `None` if their counts of steps allow it.

    LoRA-Pro's optimizer has taken or skipped each step that the schedule counts. Neither can be ahead of the training.
    Both are behind it after a start from weights alone, and do not see the steps that a `GradScaler` skips. A count
    that is no number is a `ValueError`.
    """
    step, scheduled = read_global_step(folder), _scheduled(folder)
    least, most, has_moments = _optimized(folder)
    named = re.fullmatch(NAME, folder.name)
    if named is not None and int(named[1]) != step:
        return f"{STATE} is of step {step}, although the folder is named {folder.name}"
    unscheduled = 0 if (folder / SCALER).is_file() else step
    expected = unscheduled if scheduled is None else scheduled
    if not has_moments and least < expected:
        return f"{OPTIMIZER} holds no moments, although {expected} steps were taken"
    if scheduled is not None and not least <= scheduled <= most:
        return f"{OPTIMIZER} counts {least:g} steps and {SCHEDULER} {scheduled}, so that they are of two saves"
    for name, steps in ((OPTIMIZER, least), (SCHEDULER, scheduled or 0)):
        if steps > step:
            return f"{name} counts {steps:g} steps and {STATE} {step}, so that they are of two saves"
    return None


def steps_behind(folder: Path) -> str | None:
    """How far optimizer or schedule are behind the training; `None` if they are not, or may be, see above."""
    step, scheduled = read_global_step(folder), _scheduled(folder)
    counted = min(_optimized(folder)[1], math.inf if scheduled is None else scheduled)
    if counted >= step or (folder / SCALER).is_file():
        return None
    return f"optimizer and schedule count {counted:g} of {step} steps, as after a start from weights alone"


def _scheduled(folder: Path) -> int | None:
    """The steps of one of torch's schedules; `None` for a schedule that may count something else, such as losses."""
    state = _read_scheduler_state(folder / SCHEDULER) if (folder / SCHEDULER).is_file() else {}
    last, calls = state.get("last_epoch"), state.get("_step_count")
    return last if isinstance(last, int) and isinstance(calls, int) and calls == last + 1 else None


def _optimized(folder: Path) -> tuple[float, float, bool]:
    """The fewest and the most steps that LoRA-Pro's optimizer took or skipped, and whether it has moments."""
    file = folder / OPTIMIZER
    saved: dict[str, Any] = read_optimizer_state(file) if file.is_file() else {"state": {}, "param_groups": []}
    groups = saved["param_groups"]
    if not any("lora_pro_mode" in group for group in groups):
        return 0, math.inf, True
    counts = [groups[0].get("skipped_steps", 0), *(each["step"] for each in saved["state"].values() if "step" in each)]
    try:
        skipped, *steps = map(float, counts)
        names = [name for group in groups for name in group.get("param_names") or ()]
        adapters = {match[1] for name in names if (match := re.search(r"lora_A\.(.+)\.weight$", name))}
        if not all(math.isfinite(count) and count >= 0 for count in (skipped, *steps)):
            raise ValueError("a count is no number of steps")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError("a count of its steps is no number, or a name of its parameters no text") from error
    # A pair counts the steps in which it had a gradient. Where all count the same, the adapters may have taken turns.
    taken = [count for count in steps if count]
    longest = max(taken, default=0.0)
    most = longest * max(1, len(adapters)) if len(set(taken)) < 2 else sum(taken)
    return longest + skipped, most + skipped, bool(saved["state"])
