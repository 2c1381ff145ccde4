"""Which files did DeepSpeed write into a checkpoint of a `Trainer`, and is the checkpoint complete?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorapro_hf.utils.unpickling import read_tensors

LATEST = "latest"
_TAG = r"global_step\d+"
_MODEL, _MODEL_OF_STAGE_3 = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"  # bf16_ may stand before it
_MOMENTS = "lora_pro_rank{}.safetensors"


def stage_of(folder: Path) -> int | str:
    """The stage of ZeRO that wrote a checkpoint, `?` if its files do not say."""
    states = _states(folder)
    for file in states.glob("*" + _OPTIMIZER.format(0)) if states is not None else ():
        content = _content(file)
        # In bfloat16 ZeRO 1 has an optimizer of its own, whose state does not name the stage.
        for place in (("optimizer_state_dict", "zero_stage"), ("ds_config", "zero_optimization", "stage")):
            stage: Any = content
            for key in place:
                stage = stage.get(key) if isinstance(stage, dict) else None
            given = next(iter(getattr(stage, "given", (stage,))), None)
            if isinstance(given, int):
                return given
    return "?"


def mode_of(folder: Path) -> tuple[Path, str | None]:
    """The file of LoRA-Pro's moments in a checkpoint of DeepSpeed, and the mode; `None` if LoRA-Pro was off."""
    file = (_states(folder) or folder) / _MOMENTS.format(0)
    about = _about(file)
    return file, None if about is None else about["mode"]


def own_schedule_and_ranks(folder: Path) -> tuple[bool, int]:
    """Whether DeepSpeed itself keeps the learning rate schedule, and how many ranks have saved."""
    states = _states(folder)
    model = _model(states)[1] if states is not None else {}
    ranks = model.get("dp_world_size")
    return model.get("lr_scheduler") is not None, ranks if isinstance(ranks, int) else 1


def zero_flaws(folder: Path) -> Iterator[str]:
    """The flaws of DeepSpeed's files and of LoRA-Pro's files beside them."""
    states = _states(folder)
    if states is None:
        if not (folder / LATEST).is_file():
            yield f"{LATEST} is missing"
        yield "latest names no folder of DeepSpeed inside the checkpoint"
        return
    for file in sorted(states.glob("*.pt")):
        try:
            read_tensors(file)
        except ValueError as error:
            yield f"{file.relative_to(folder)} is cut off or damaged ({error})"
    name, model = _model(states)
    ranks, step = model.get("dp_world_size"), model.get("global_steps")
    if not (states / name).is_file():
        yield f"{states.name}/{name} is missing"
    elif not isinstance(ranks, int) or ranks < 1:
        yield f"{states.name}/{name} is cut off or damaged (it holds no weights of a model)"
    else:
        has_lora_pro = any(states.glob(_MOMENTS.format("*")))
        yield from _missing(states, ranks, stage_of(folder) == 3, has_lora_pro)
        for rank in range(ranks) if has_lora_pro else ():
            file = states / _MOMENTS.format(rank)
            about = _about(file)
            if about is None:
                yield f"{states.name}/{file.name} is cut off, damaged or not from LoRA-Pro"
            elif (about["ranks"], about["global_steps"]) != (ranks, step):
                yield f"{states.name} mixes the files of two saves, {name} and {file.name}"


def _missing(states: Path, ranks: int, is_stage_3: bool, has_lora_pro: bool) -> Iterator[str]:
    names = ["*" + _OPTIMIZER, *([_MOMENTS] if has_lora_pro else []), *([_MODEL_OF_STAGE_3] if is_stage_3 else [])]
    for rank in range(ranks):
        for name in names:
            if not any(states.glob(name.format(rank))):
                yield f"{states.name}/{name.format(rank).lstrip('*')} is missing"


def _states(folder: Path) -> Path | None:
    """The folder that `latest` names, `None` if that is no folder of DeepSpeed inside the checkpoint."""
    file = folder / LATEST
    tag = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    states = folder / tag
    if not re.fullmatch(_TAG, tag) or not states.is_dir() or states.resolve().parent != folder.resolve():
        return None
    return states


def _model(states: Path) -> tuple[str, dict[str, Any]]:
    """The file of the first rank's weights, and its content; an empty dictionary if it cannot be read."""
    of_stage_3 = _MODEL_OF_STAGE_3.format(0)
    name = of_stage_3 if (states / of_stage_3).is_file() else _MODEL
    return name, _content(states / name)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = read_tensors(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _about(file: Path) -> dict[str, Any] | None:
    """The header of a rank's moments, `None` if it is not LoRA-Pro's."""
    try:
        with safe_open(file, framework="pt") as tensors:
            about = json.loads((tensors.metadata() or {})["lora_pro"])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) and {"mode", "pairs", "ranks", "global_steps"} <= about.keys() else None
