"""What does a checkpoint of a training hold, and can a training go on from it or from its weights?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorapro_hf.checkpoints.engines import DDP, ONE_PROCESS, written_by
from lorapro_hf.checkpoints.files import OPTIMIZER, STATE, read_optimizer_state
from lorapro_hf.checkpoints.manifest import MANIFEST
from lorapro_hf.checkpoints.resume import checkpoints_in, find_flaw, require_same_training
from lorapro_hf.commands.inspect.report import ENGINE, Checkpoint
from lorapro_hf.config import LoRAProConfig


def read_checkpoints(folders: Sequence[Path]) -> list[Checkpoint]:
    """Read checkpoints, the newest first; like resuming, compare whole files up to the first complete one."""
    found: list[Checkpoint] = []
    for folder in folders:
        found.append(read_checkpoint(folder, checksums=all(each.flaw is not None for each in found)))
    return found


def read_checkpoint(folder: Path, checksums: bool = True) -> Checkpoint:
    """Read the content of a `Trainer`'s checkpoint, and its flaw if it is incomplete or mixes two saves."""
    content: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError, KeyError):
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        content |= {"step": state["global_step"], "max_steps": state.get("max_steps"), "epoch": state.get("epoch")}
    if not {ONE_PROCESS, DDP}.issuperset(written_by(folder)):
        content["optimizer"] = ENGINE
    with suppress(OSError, ValueError):  # there is none, or the flaw names it
        content |= _optimizer(folder / OPTIMIZER)
    return Checkpoint(
        folder=str(folder),
        flaw=find_flaw(folder, checksums),
        processes=len(list(folder.glob("rng_state*.pth"))) or None,
        has_manifest=(folder / MANIFEST).is_file(),
        **content,
    )


def compared(checkpoint: Checkpoint, model: Any) -> Checkpoint:
    """The checkpoint, with a flaw if resuming would refuse its adapters for this model."""
    if checkpoint.flaw is None and checkpoint.optimizer != ENGINE:
        try:
            require_same_training(Path(checkpoint.folder), None, model)
        except ValueError as error:
            return replace(checkpoint, flaw=str(error).removeprefix("cannot resume from "))
    return checkpoint


def ways_on(checkpoint: Checkpoint) -> list[str]:
    """The ways on from a checkpoint that cannot be resumed; none for a complete one."""
    if checkpoint.flaw is None:
        return []
    folder = Path(checkpoint.folder).resolve()
    beside = checkpoints_in(folder.parent)
    others = (each for each in beside if each != folder and find_flaw(each) is None)
    if folder not in beside or (newest := next(others, None)) is None:
        return ["There is no complete checkpoint beside it to resume from."]
    return [f"The newest complete checkpoint beside it is {newest}: resume from that one."]


def _optimizer(file: Path) -> dict[str, Any]:
    state = read_optimizer_state(file)
    group = state["param_groups"][0]
    settings = {"learning_rate": float(group["lr"])}
    kind = "another optimizer"
    if "lora_pro_mode" in group:
        kind = "LoRA-Pro"
        settings |= {
            "mode": group["lora_pro_mode"],
            "moments_dtype": group.get("moments_dtype", "float32"),
            "master_factors": bool(group.get("master_factors")),
            **{setting.name: group[setting.name] for setting in fields(LoRAProConfig) if setting.name in group},
        }
    return {"optimizer": kind, "settings": settings, "stepped_tensors": len(state["state"])}
