"""Can a training go on from this checkpoint folder of a `Trainer`? Asked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorapro_hf.checkpoints.engines import engine_flaw, saved_mode, saved_state
from lorapro_hf.checkpoints.files import NAME, OPTIMIZER, RNG, SCHEDULER, STATE, find_damage
from lorapro_hf.checkpoints.loading import require_adapters
from lorapro_hf.checkpoints.manifest import MANIFEST, find_change, read_manifest
from lorapro_hf.checkpoints.step_counts import find_disagreement, steps_behind
from lorapro_hf.optim.checkpoint import check_state_dict
from lorapro_hf.optim.lora_pro import LoRAProAdamW


def require_complete(folder: Path, checksums: bool = True) -> None:
    """Raise if a checkpoint is not whole or not of one save; the message names a complete one beside it.

    Args:
        folder: the checkpoint.
        checksums: read all files, as `find_flaw` does.

    Raises:
        ValueError: a file is missing, cut off, damaged or of another save.
    """
    flaw = find_flaw(folder, checksums)
    if flaw is not None:
        raise ValueError(f"cannot resume from {folder}: {flaw}. {_way_out(folder)}")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in the output folder of a training, the newest first."""
    found = {path: re.fullmatch(NAME, path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(steps, key=lambda path: -steps[path])


def newest_complete(
    output: Path, folders: Sequence[Path], find: Callable[[Path], str | None]
) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint that `resume_from_checkpoint=True` means, and the flaws of the checkpoints that it passes over.

    It is `None`, and the training starts anew, where not one save was finished: a job that is started again whenever it
    dies would be refused for ever after it had died in its first save.

    Args:
        output: the output folder of the training.
        folders: the checkpoints in it, the newest first.
        find: gives the flaw of one, as `find_flaw` does.

    Raises:
        ValueError: none is complete, or there is none.
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


def unverified(folder: Path) -> str | None:
    """What a complete checkpoint leaves unsaid of itself for want of a manifest; `None` if it has one."""
    if (folder / MANIFEST).is_file():
        return None
    behind = steps_behind(folder)
    return (
        f"{folder} has no {MANIFEST}, which ends a save and lists its files: a plain Trainer or an earlier version "
        "has written it, or the save was cut short just before. Only the kinds of the files "
        f"and counts of steps were compared{'' if behind is None else f', and {behind}'}."
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not: its name or one of its files says so."""
    files = (STATE, OPTIMIZER, SCHEDULER, RNG)
    return re.fullmatch(NAME, folder.resolve().name) is not None or any(any(folder.glob(name)) for name in files)


def find_flaw(folder: Path, checksums: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint, `None` for a complete one of one save.

    Args:
        folder: the checkpoint.
        checksums: compare the content of each file with the manifest, for which all of them are read.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not _is_finished(folder):
        return f"{STATE} is missing, which is written last, so that the checkpoint was not finished"
    try:
        return find_damage(folder) or engine_flaw(folder) or _find_mixture(folder, checksums)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"


def _is_finished(folder: Path) -> bool:
    return (folder / STATE).is_file()


def _find_mixture(folder: Path, checksums: bool) -> str | None:
    """The file of a checkpoint that another save has written, or that has been lost since."""
    name = MANIFEST
    try:
        manifest = read_manifest(folder)
        if manifest is not None:
            return find_change(folder, manifest, checksums)
        name = OPTIMIZER
        return find_disagreement(folder)
    except ValueError as error:
        return f"{name} is damaged ({error})"


def require_same_training(folder: Path, optimizer: LoRAProAdamW | None, model: Any, factors: bool = True) -> bool:
    """Raise if a complete checkpoint is of another training than this one.

    Args:
        folder: the checkpoint.
        optimizer: what would be given the state; `None` if that is not known.
        model: what would be given the adapter.
        factors: whether the checkpoint holds A and B as they are trained.

    Returns:
        Whether the checkpoint has the state of an optimizer.

    Raises:
        ValueError: it is of another mode, rank or model, or of another optimizer.
    """
    try:
        require_adapters(folder, model, factors)
    except ValueError as error:
        raise ValueError(f"cannot resume from {error}") from error
    saved = saved_state(folder)
    if saved is None:
        return False
    if optimizer is not None:
        try:
            check_state_dict(saved[1], optimizer.param_groups, optimizer.pairs, optimizer.config)
        except ValueError as error:
            raise ValueError(f"cannot resume from {saved[0]}: {error}") from error
    return True


def require_without_lora_pro(folder: Path) -> None:
    """Raise if the optimizer's state in a checkpoint is LoRA-Pro's, for a training without LoRA-Pro.

    Raises:
        ValueError: it is; torch's own message would speak of parameter groups, after the weights have been loaded.
    """
    try:
        saved = saved_mode(folder)
    except (OSError, ValueError):  # of another kind; the parent says what is wrong with it
        return
    if saved is not None:
        raise ValueError(
            f"cannot resume from {saved[0]}: it was written with LoRA-Pro in mode {saved[1]!r}, but "
            "LoRA-Pro is off (lora_pro=False or --no_lora_pro). Turn it on again, or start a new training from the "
            "saved adapter: PeftModel.from_pretrained(base, checkpoint, is_trainable=True)."
        )


def _way_out(folder: Path) -> str:
    """What to do instead: the newest complete checkpoint beside this one, or a new start."""
    if re.fullmatch(NAME, folder.name):
        for other in checkpoints_in(folder.parent):
            if other != folder and find_flaw(other) is None:
                return f"The newest complete checkpoint is {other}: resume with resume_from_checkpoint={str(other)!r}."
    return "There is no complete checkpoint beside it: start the training again without resume_from_checkpoint."
