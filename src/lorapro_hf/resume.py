"""Can a training go on from this checkpoint folder of a `Trainer`? Asked before anything is loaded."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lorapro_hf.adapter_files import tensor_shapes
from lorapro_hf.checkpoint import check_state_dict
from lorapro_hf.loading import WEIGHTS, holds_weights, require_adapters
from lorapro_hf.optimizer import LoRAProAdamW

STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"
_NAME = r"checkpoint-(\d+)"
_WRITTEN_BY_TORCH = (OPTIMIZER, SCHEDULER, "scaler.pt", "rng_state*.pth", "**/adapter_model.bin")
_WRITTEN_BY_SAFETENSORS = "**/adapter_model.safetensors"


def require_complete(folder: Path, by_engine: bool = False) -> None:
    """Raise if a checkpoint has been written or copied in part only; the message names a complete one beside it.

    Args:
        folder: the checkpoint.
        by_engine: FSDP or DeepSpeed has written weights and optimizer state, in files of its own that are not examined.

    Raises:
        ValueError: a file is missing, cut off or damaged.
    """
    flaw = find_flaw(folder, by_engine)
    if flaw is not None:
        raise ValueError(f"cannot resume from {folder}: {flaw}. {_way_out(folder, by_engine)}")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in the output folder of a training, the newest first."""
    found = {path: re.fullmatch(_NAME, path.name) for path in folder.glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(steps, key=lambda path: -steps[path])


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not: its name or one of its files says so."""
    files = (STATE, OPTIMIZER, SCHEDULER, "rng_state*.pth")
    return re.fullmatch(_NAME, folder.resolve().name) is not None or any(any(folder.glob(name)) for name in files)


def find_flaw(folder: Path, by_engine: bool = False) -> str | None:
    """What is wrong with the files of a checkpoint, `None` for a complete one; arguments as in `require_complete`."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / STATE).is_file():
        return f"{STATE} is missing, which is written last, so that the checkpoint was not finished"
    for file, damage in _damages(folder):
        return f"{file.relative_to(folder)} is cut off or damaged ({damage})"
    if by_engine:
        return None
    if not holds_weights(folder):
        return f"{WEIGHTS[0]} is missing"
    needed = (OPTIMIZER, SCHEDULER, "rng_state*.pth")
    absent = [name for name in needed if not any(folder.glob(name))]
    if absent and len(absent) < len(needed):  # save_only_model leaves out all of them
        return f"{absent[0].replace('*', '')} is missing"
    return None


def require_same_training(folder: Path, optimizer: LoRAProAdamW | None, model: Any) -> bool:
    """Raise if a complete checkpoint is of another training than this one.

    Args:
        folder: the checkpoint.
        optimizer: what would be given the state; `None` if that is not known.
        model: what would be given the adapter.

    Returns:
        Whether the checkpoint has the state of an optimizer.

    Raises:
        ValueError: it is of another mode, rank or model, or of another optimizer.
    """
    try:
        require_adapters(folder, model)
    except ValueError as error:
        raise ValueError(f"cannot resume from {error}") from error
    file = folder / OPTIMIZER
    if not file.is_file():
        return False
    if optimizer is not None:
        try:
            check_state_dict(read_optimizer_state(file), optimizer.param_groups, optimizer.pairs, optimizer.config)
        except ValueError as error:
            raise ValueError(f"cannot resume from {file}: {error}") from error
    return True


def require_without_lora_pro(folder: Path) -> None:
    """Raise if the optimizer's state in a checkpoint is LoRA-Pro's, for a training without LoRA-Pro.

    Raises:
        ValueError: it is; torch's own message would speak of parameter groups, after the weights have been loaded.
    """
    try:
        groups = read_optimizer_state(folder / OPTIMIZER)["param_groups"]
    except (OSError, ValueError):  # of another kind; the parent says what is wrong with it
        return
    modes = {group["lora_pro_mode"] for group in groups if "lora_pro_mode" in group}
    if modes:
        raise ValueError(
            f"cannot resume from {folder / OPTIMIZER}: it was written with LoRA-Pro in mode {modes.pop()!r}, but "
            "LoRA-Pro is off (lora_pro=False or --no_lora_pro). Turn it on again, or start a new training from the "
            "saved adapter: PeftModel.from_pretrained(base, checkpoint, is_trainable=True)."
        )


def _damages(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files that cannot be read, and why."""
    try:
        if "global_step" not in json.loads((folder / STATE).read_text(encoding="utf-8")):
            yield folder / STATE, "it has no global_step"
    except (ValueError, TypeError) as error:
        yield folder / STATE, str(error)
    for pattern in _WRITTEN_BY_TORCH:
        for file in sorted(folder.glob(pattern)):
            try:
                with zipfile.ZipFile(file):  # its directory stands at the end, which is what a cut takes away
                    pass
                if file.name == OPTIMIZER:
                    read_optimizer_state(file)
            except (zipfile.BadZipFile, ValueError) as error:
                yield file, str(error)
    for file in sorted(folder.glob(_WRITTEN_BY_SAFETENSORS)):
        try:
            tensor_shapes(file)
        except SafetensorError as error:
            yield file, str(error)


def read_optimizer_state(file: Path) -> dict[str, Any]:
    """What an `optimizer.pt` holds, its tensors left on the disk.

    Raises:
        ValueError: the file is cut off, or not of an optimizer.
    """
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise ValueError("it holds no state of an optimizer")
    return state


def _way_out(folder: Path, by_engine: bool) -> str:
    """What to do instead: the newest complete checkpoint beside this one, or a new start."""
    if re.fullmatch(_NAME, folder.name):
        for other in checkpoints_in(folder.parent):
            if other != folder and find_flaw(other, by_engine) is None:
                newest = f"The newest complete checkpoint is {other}: resume with resume_from_checkpoint={str(other)!r}"
                if not folder.is_dir():
                    return f"{newest}."
                return f"{newest}, or delete {folder.name}, so that resume_from_checkpoint=True finds {other.name}."
    return "There is no complete checkpoint beside it: start the training again without resume_from_checkpoint."
