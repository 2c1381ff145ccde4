"""Can a training resume from this checkpoint of a `Trainer`? Asked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lorapro_hf.checkpoints.adapters import holds_weights
from lorapro_hf.checkpoints.engines import ANEW, DDP, ONE_PROCESS, engine_flaw, saved_state, written_by
from lorapro_hf.checkpoints.files import (
    METHODS,
    NAME,
    OPTIMIZER,
    RNG,
    SCALER,
    SCHEDULER,
    STATE,
    find_damage,
    find_disagreement,
    read_global_step,
)
from lorapro_hf.checkpoints.loading import require_adapters
from lorapro_hf.checkpoints.manifest import MANIFEST, find_change, read_manifest
from lorapro_hf.checkpoints.zero import mode_of
from lorapro_hf.optim.checkpoint import check_state_dict
from lorapro_hf.optim.lora_pro import LoRAProAdamW

_STATE_FILES = (OPTIMIZER, SCHEDULER, SCALER, RNG, METHODS)


def require_complete(folder: Path, checksums: bool = True) -> None:
    """Raise a `ValueError` if `find_flaw` finds one; the message names a complete checkpoint beside this one."""
    flaw = find_flaw(folder, checksums)
    if flaw is None:
        return
    remedy = "There is no complete checkpoint beside it: start the training again without resume_from_checkpoint."
    if re.fullmatch(NAME, folder.name):
        others = (other for other in checkpoints_in(folder.parent) if other != folder and find_flaw(other) is None)
        if newest := next(others, None):
            remedy = f"Set resume_from_checkpoint to {newest}, the newest complete checkpoint."
    raise ValueError(f"cannot resume from {folder}: {flaw}. {remedy}")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in the output folder of a training, the newest first."""
    found = {path: re.fullmatch(NAME, path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(steps, key=lambda path: -steps[path])


def newest_complete(
    output: Path, folders: Sequence[Path], find: Callable[[Path], str | None]
) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint that `resume_from_checkpoint=True` means, and the flaws of the checkpoints that it passes over.

    The checkpoint is `None`, and the training starts anew, where no save was finished. Otherwise a job that restarts
    itself would be refused for ever once it had died in its first save. If none is complete, or there is none, that is
    a `ValueError`.

    Args:
        output: the output folder of the training.
        folders: its checkpoints, the newest first.
        find: returns the flaw of a checkpoint, as `find_flaw` does.
    """
    flaws: dict[Path, str] = {}
    for folder in folders:
        flaw = find(folder)
        if flaw is None:
            return folder, flaws
        flaws[folder] = flaw
    anew = "Start the training again without resume_from_checkpoint"
    if not flaws:
        raise ValueError(f"cannot resume from {output}: it holds no checkpoint. {anew}, or name the folder of one.")
    if not any(_is_finished(folder) for folder in flaws):
        return None, flaws
    raise ValueError(
        f"cannot resume from {output}: none of its checkpoints is complete. In {folders[0].name}, the newest, "
        f"{flaws[folders[0]]}. {anew}, with another output_dir or after deleting them."
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not: its name or one of its files says so."""
    files = (STATE, OPTIMIZER, SCHEDULER, RNG)
    return re.fullmatch(NAME, folder.resolve().name) is not None or any(any(folder.glob(name)) for name in files)


def find_flaw(folder: Path, checksums: bool = True) -> str | None:
    """Why a checkpoint is not complete or not of one save; `None` if it is both.

    With `checksums` all files are read and compared with the manifest, else only their sizes.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / STATE).is_file():
        return f"{STATE} is missing, which is written last, so that the checkpoint was not finished"
    try:
        flaw = find_damage(folder) or engine_flaw(folder) or _find_mixture(folder, checksums)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    return _with_remedy(folder, flaw)


def _with_remedy(folder: Path, flaw: str | None) -> str | None:
    """The flaw; where only the state is incomplete, with the way to go on from the weights."""
    name, found, _ = (flaw or "").partition(" is missing")
    is_state = any(fnmatchcase(name, pattern) for pattern in _STATE_FILES)
    if not (found and is_state and holds_weights(folder) and {*written_by(folder)} <= {ONE_PROCESS, DDP}):
        return flaw
    left = sorted(file.name for pattern in (*_STATE_FILES, MANIFEST) for file in folder.glob(pattern))
    return f"{name} is missing: copy it anew, or delete {', '.join(left)} to go on from the weights alone"


def _is_finished(folder: Path) -> bool:
    """Whether a save came to its end: the state is written last but for the manifest, and a kill may cut it off."""
    try:
        read_global_step(folder)
    except FileNotFoundError:
        return False
    except ValueError:
        return (folder / MANIFEST).is_file()
    return True


def _find_mixture(folder: Path, checksums: bool) -> str | None:
    """The first file of a checkpoint that another save wrote, or that is lost."""
    name = MANIFEST
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            return find_change(folder, manifest, checksums) or _find_new_name(folder, manifest.global_step)
        name = OPTIMIZER
        return find_disagreement(folder)
    except ValueError as error:
        return f"{name} is damaged ({error})"


def _find_new_name(folder: Path, step: int) -> str | None:
    """Whether a checkpoint was renamed; the name decides which is the newest, and which `Trainer` deletes."""
    named = re.fullmatch(NAME, folder.name)
    if named is None or int(named[1]) == step:
        return None
    return f"it is of step {step}, although the folder is named {folder.name}: rename it to checkpoint-{step}"


def require_same_training(folder: Path, optimizer: LoRAProAdamW | None, model: Any, factors: bool = True) -> bool:
    """Whether a complete checkpoint of this training has the state of an optimizer.

    Args:
        folder: the checkpoint.
        optimizer: the optimizer that would load the state; `None` if it is not known.
        model: the model that would load the adapter.
        factors: whether the checkpoint holds A and B as they are trained.

    Raises:
        ValueError: it is of another training: of another mode, rank or model, or of another optimizer.
    """
    try:
        require_adapters(folder, model, factors)
    except ValueError as error:
        raise ValueError(f"cannot resume from {error}") from error
    saved = saved_state(folder)
    if saved is not None and optimizer is not None:
        try:
            check_state_dict(saved[1], optimizer.param_groups, optimizer.pairs, optimizer.config)
        except ValueError as error:
            raise ValueError(f"cannot resume from {saved[0]}: {error}") from error
    return saved is not None


def require_without_lora_pro(folder: Path) -> None:
    """Raise a `ValueError` if a checkpoint is LoRA-Pro's, for a training without LoRA-Pro.

    torch's own message would speak of parameter groups, after the weights have been loaded.
    """
    try:
        saved = saved_state(folder)
        modes = [group.get("lora_pro_mode") for group in saved[1]["param_groups"]] if saved is not None else []
        file, mode = (saved[0], next(filter(None, modes), None)) if saved is not None else mode_of(folder)
    except (OSError, ValueError):  # of another kind; the parent says what is wrong with it
        return
    if mode is not None:
        raise ValueError(
            f"cannot resume from {file}: it was written with LoRA-Pro in mode {mode!r}, but LoRA-Pro is off "
            f"(lora_pro=False or --no_lora_pro). Turn it on again, or {ANEW}."
        )
