"""Which engine runs, which has written a checkpoint, and are all files of it there?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lorapro_hf.sharded_files import shards_flaw
from lorapro_hf.unpickling import read_tensors

ONE_PROCESS, DDP = "one process", "DDP"
SHARDED, FULL = "FSDP2 with SHARDED_STATE_DICT", "FSDP2 with FULL_STATE_DICT"
DEEPSPEED = "DeepSpeed ZeRO "
# Both are accelerate's names, for the first model and optimizer of a training.
SHARDED_FOLDERS, FULL_FILES = ("pytorch_model_fsdp_0", "optimizer_0"), ("pytorch_model_fsdp.bin", "optimizer.bin")

_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_LATEST, _TAG = "latest", r"global_step\d+"
_STAGE_3_MODEL, _MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"
_OPTIMIZER_STATES, _MOMENTS = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt", "lora_pro_rank{}.safetensors"


def describe_engine(accelerator: Any) -> str:
    """What messages call the engine of an `Accelerator`: one process, DDP, FSDP2 or DeepSpeed, and its kind of file."""
    name = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if name == "FSDP":
        kind = accelerator.state.fsdp_plugin.state_dict_type
        return f"FSDP2 with {getattr(kind, 'name', kind)}"
    if name == "DEEPSPEED":
        configuration = accelerator.state.deepspeed_plugin.deepspeed_config
        return f"{DEEPSPEED}{configuration.get('zero_optimization', {}).get('stage', 0)}"
    return ONE_PROCESS if name == "NO" else DDP


def written_by(folder: Path) -> list[str]:
    """The engines of which a checkpoint holds files; none for one of weights alone, several if saves were mixed."""
    found = []
    if (folder / _OPTIMIZER).exists():
        found.append(DDP if any(folder.glob("rng_state_*.pth")) else ONE_PROCESS)
    if any((folder / name).exists() for name in SHARDED_FOLDERS):
        found.append(SHARDED)
    if any((folder / name).exists() for name in FULL_FILES):
        found.append(FULL)
    if (folder / _LATEST).exists() or any(folder.glob("global_step*")):
        found.append(f"{DEEPSPEED}{_stage(folder)}")
    return found


def require_same_engine(folder: Path, running: str) -> None:
    """Raise if another engine has written a checkpoint than the one that is to load it.

    Args:
        folder: the checkpoint, complete.
        running: the engine that runs, from `describe_engine`.

    Raises:
        ValueError: another engine has, or the checkpoint has weights alone and DeepSpeed runs.
    """
    anew = "start a new training from the saved adapter: PeftModel.from_pretrained(base, checkpoint, is_trainable=True)"
    written = written_by(folder)
    if not written and running.startswith(DEEPSPEED):
        raise ValueError(
            f"cannot resume from {folder}: it holds no optimizer state (save_only_model=True), and {running} resumes "
            f"from its own files alone. To go on from these weights, {anew}."
        )
    if written and not {*written, running} <= {ONE_PROCESS, DDP} and written != [running]:
        raise ValueError(
            f"cannot resume from {folder}: it was written by {written[0]}, and the training runs with {running}, which "
            f"does not read these files. Resume with {written[0]}, or {anew}."
        )


def engine_flaw(folder: Path) -> str | None:
    """The first file that an engine's checkpoint lacks, or that is not of its kind; `None` if there is none.

    Nothing of the files is run. One of weights alone, and one of one process or DDP, have no files of an engine.
    """
    written = written_by(folder)
    if len(written) > 1:
        return f"it mixes the files of two saves, by {written[0]} and by {written[1]}"
    flaws: Iterator[str] = iter(())
    if written == [SHARDED]:
        flaws = (flaw for name in SHARDED_FOLDERS for flaw in shards_flaw(folder / name))
    elif written == [FULL]:
        flaws = _full_flaws(folder)
    elif written and written[0].startswith(DEEPSPEED):
        flaws = _deepspeed_flaws(folder)
    return next(flaws, None)


def _full_flaws(folder: Path) -> Iterator[str]:
    for name in FULL_FILES:
        if not (folder / name).is_file():
            yield f"{name} is missing"
        else:
            content, damage = _tried(folder / name)
            if damage is not None:
                yield f"{name} is cut off or damaged ({damage})"
            elif not isinstance(content, dict) or (
                name == FULL_FILES[1] and not {"state", "param_groups"} <= set(content)
            ):
                yield f"{name} holds no state of {'an optimizer' if name == FULL_FILES[1] else 'a model'}"


def _deepspeed_flaws(folder: Path) -> Iterator[str]:
    """What is wrong with the files of DeepSpeed, and with those that lie beside them."""
    states = _tag_folder(folder)
    if states is None:
        yield f"{_LATEST} is missing or names no folder of DeepSpeed in the checkpoint"
        return
    yield from _cut_off(folder, states)
    first = next((name for name in (_STAGE_3_MODEL.format(0), _MODEL) if (states / name).is_file()), None)
    if first is None:
        yield f"{states.name}/{_MODEL} is missing"
        return
    model = read_tensors(states / first)
    ranks = model.get("dp_world_size") if isinstance(model, dict) else None
    if not isinstance(ranks, int) or ranks < 1:
        yield f"{states.name}/{first} holds no state of a model"
        return
    names = [_OPTIMIZER_STATES, _MOMENTS, *([_STAGE_3_MODEL] if first != _MODEL else [])]
    for rank in range(ranks):
        absent = [name.format(rank) for name in names if not any(states.glob(name.format(rank)))]
        absent += [] if (folder / f"rng_state_{rank}.pth").is_file() or ranks == 1 else [f"rng_state_{rank}.pth"]
        if absent:
            yield f"{absent[0].lstrip('*')} is missing"
    for rank in range(ranks):
        file = states / _MOMENTS.format(rank)
        about = _about(file)
        if about is None:
            yield f"{states.name}/{file.name} is cut off, damaged or not from LoRA-Pro"
        elif about["ranks"] != ranks or about["global_steps"] != model.get("global_steps"):
            yield f"{states.name} mixes the files of two saves: {first} and {file.name}"
    if model.get("lr_scheduler") is None and not (folder / _SCHEDULER).is_file():
        yield f"{_SCHEDULER} is missing"


def _cut_off(folder: Path, states: Path) -> Iterator[str]:
    for file in sorted(states.glob("*.pt")):
        damage = _tried(file)[1]
        if damage is not None:
            yield f"{file.relative_to(folder)} is cut off or damaged ({damage})"


def _tried(file: Path) -> tuple[Any, str | None]:
    try:
        return read_tensors(file), None
    except ValueError as error:
        return None, str(error)


def _tag_folder(folder: Path) -> Path | None:
    """The folder in a checkpoint that DeepSpeed's file `latest` names; `None` if it names none in there."""
    file = folder / _LATEST
    tag = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    states = folder / tag
    is_inside = re.fullmatch(_TAG, tag) and states.is_dir() and states.resolve().parent == folder.resolve()
    return states if is_inside else None


def _stage(folder: Path) -> int | str:
    """The stage of ZeRO that has written a checkpoint, `?` if its files do not tell."""
    states = _tag_folder(folder)
    if states is None:
        return "?"
    for file in sorted(states.glob(_OPTIMIZER_STATES.format(0))):
        content = _tried(file)[0]
        state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
        stage = state.get("zero_stage") if isinstance(state, dict) else None
        return getattr(stage, "given", (stage,))[0]
    return 3 if (states / _STAGE_3_MODEL.format(0)).is_file() else "?"


def _about(file: Path) -> dict[str, Any] | None:
    """What the header of a rank's moments tells; `None` if it is not LoRA-Pro's."""
    try:
        with safe_open(file, framework="pt") as tensors:
            about = json.loads((tensors.metadata() or {})["lora_pro"])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) and {"rank", "ranks", "global_steps", "mode"} <= about.keys() else None
