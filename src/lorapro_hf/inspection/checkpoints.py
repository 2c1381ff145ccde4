"""What does a checkpoint of a training hold, and can a training go on from it?"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorapro_hf.inspection.report import ENGINE, Checkpoint
from lorapro_hf.resume import OPTIMIZER, STATE, find_flaw, read_optimizer_state, require_same_training

_BY_ENGINE = ("pytorch_model_fsdp*", "optimizer_*", "global_step*", "zero_to_fp32.py")


def read_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint folder of a `Trainer` holds, and whether all of it is there."""
    by_engine = any(any(folder.glob(pattern)) for pattern in _BY_ENGINE)
    known: dict[str, Any] = {"folder": str(folder), "flaw": find_flaw(folder, by_engine)}
    with suppress(OSError, ValueError, TypeError, KeyError):
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        known |= {"step": state["global_step"], "max_steps": state.get("max_steps"), "epoch": state.get("epoch")}
    states = len(list(folder.glob("rng_state*.pth")))
    known["processes"] = states or None
    if by_engine:
        known["optimizer"] = ENGINE
    with suppress(OSError, ValueError):  # there is none, or the flaw says what is wrong with it
        known |= _optimizer(folder / OPTIMIZER)
    return Checkpoint(**known)


def compared(checkpoint: Checkpoint, model: Any) -> Checkpoint:
    """The checkpoint, with a flaw if resuming would refuse its adapters for this model."""
    if checkpoint.flaw is not None or checkpoint.optimizer == ENGINE:
        return checkpoint
    try:
        require_same_training(Path(checkpoint.folder), None, model)
    except ValueError as error:
        return replace(checkpoint, flaw=str(error).removeprefix("cannot resume from "))
    return checkpoint


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
        }
    return {
        "optimizer": kind,
        "settings": settings,
        "stepped_tensors": len(state["state"]),
    }
