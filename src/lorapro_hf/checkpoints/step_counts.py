"""Do the files of a checkpoint without a manifest count the same steps?"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from lorapro_hf.checkpoints.files import (
    NAME,
    OPTIMIZER,
    SCALER,
    SCHEDULER,
    STATE,
    read_global_step,
    read_optimizer_state,
    read_scheduler_state,
)


class _Counted(NamedTuple):
    """The fewest and the most steps that LoRA-Pro's optimizer can have taken or skipped, and whether it has moments."""

    least: float
    most: float
    has_moments: bool


def find_disagreement(folder: Path) -> str | None:
    """Why the files of a checkpoint cannot be of one save; `None` if their counts of steps allow it.

    LoRA-Pro's optimizer has taken or skipped each step that the schedule counts. Neither can be ahead of the training,
    but they may be behind it, see `steps_behind`.

    Raises:
        ValueError: a count is no number.
    """
    step, scheduled, counted = read_global_step(folder), _scheduled(folder), _optimized(folder)
    named = re.fullmatch(NAME, folder.name)
    if named is not None and int(named[1]) != step:
        return f"{STATE} is of step {step}, although the folder is named {folder.name}"
    expected = scheduled if scheduled is not None else 0 if _is_scaled(folder) else step
    if not counted.has_moments and counted.least < expected:
        return f"{OPTIMIZER} holds no moments, although {expected} steps were taken"
    if scheduled is not None and not counted.least <= scheduled <= counted.most:
        return f"{OPTIMIZER} counts {counted.least:g} steps and {SCHEDULER} {scheduled}, so that they are of two saves"
    for name, steps in ((OPTIMIZER, counted.least), (SCHEDULER, scheduled or 0)):
        if steps > step:
            return f"{name} counts {steps:g} steps and {STATE} {step}, so that they are of two saves"
    return None


def steps_behind(folder: Path) -> str | None:
    """How far the optimizer or the schedule of a checkpoint is behind the training, `None` if it is not.

    They are behind after a start from weights alone. They also do not see the steps that a `GradScaler` skips.
    """
    step, scheduled = read_global_step(folder), _scheduled(folder)
    counted = min(_optimized(folder).most, math.inf if scheduled is None else scheduled)
    if counted >= step or _is_scaled(folder):
        return None
    return f"its optimizer and schedule count {counted:g} of {step} steps, as after a start from weights alone"


def _is_scaled(folder: Path) -> bool:
    return (folder / SCALER).is_file()


def _scheduled(folder: Path) -> int | None:
    """The steps of one of torch's schedules; `None` for a schedule that may count something else, such as losses."""
    state = read_scheduler_state(folder / SCHEDULER) if (folder / SCHEDULER).is_file() else {}
    last, calls = state.get("last_epoch"), state.get("_step_count")
    return last if isinstance(last, int) and isinstance(calls, int) and calls == last + 1 else None


def _optimized(folder: Path) -> _Counted:
    file = folder / OPTIMIZER
    saved: dict[str, Any] = read_optimizer_state(file) if file.is_file() else {"state": {}, "param_groups": []}
    groups = saved["param_groups"]
    if not any("lora_pro_mode" in group for group in groups):
        return _Counted(0, math.inf, True)
    counts = [groups[0].get("skipped_steps", 0), *(each["step"] for each in saved["state"].values() if "step" in each)]
    try:
        skipped, *steps = map(float, counts)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError("it counts steps by what is no number") from error
    if not all(math.isfinite(count) and count >= 0 for count in (skipped, *steps)):
        raise ValueError("it counts steps by what is no number")
    # A pair counts the steps in which it had a gradient. Where all count the same, the adapters may have taken turns.
    taken = [count for count in steps if count]
    longest = max(taken, default=0.0)
    most = longest * max(1, len(_adapters(groups))) if len(set(taken)) < 2 else sum(taken)
    return _Counted(longest + skipped, most + skipped, bool(saved["state"]))


def _adapters(groups: list[dict[str, Any]]) -> set[str]:
    try:
        names = [name for group in groups for name in group.get("param_names") or ()]
        return {match[1] for name in names if (match := re.search(r"lora_A\.(.+)\.weight$", name))}
    except TypeError as error:
        raise ValueError("it names parameters by what is no name") from error
