"""Which engine runs, which engine wrote a checkpoint, and are all its files there?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorapro_hf.checkpoints.adapters import FULL_MODEL, SHARDED_MODEL, WEIGHTS, holds_weights
from lorapro_hf.checkpoints.files import OPTIMIZER, RNG, SCHEDULER, find_missing_rng, read_optimizer_state
from lorapro_hf.checkpoints.sharded import ranks_of_shards, read_sharded_state, shards_flaws
from lorapro_hf.checkpoints.zero import LATEST, own_schedule_and_ranks, stage_of, zero_flaws
from lorapro_hf.utils.unpickling import read_tensors

ONE_PROCESS, DDP = "one process", "DDP"
SHARDED, FULL = "FSDP2 with SHARDED_STATE_DICT", "FSDP2 with FULL_STATE_DICT"
DEEPSPEED = "DeepSpeed ZeRO "
ANEW = "start a new training from the saved adapter: PeftModel.from_pretrained(base, checkpoint, is_trainable=True)"
# accelerate's names for the first optimizer of a training under FSDP
_FULL_OPTIMIZER, _SHARDED_OPTIMIZER = "optimizer.bin", "optimizer_0"
_INTERCHANGEABLE = ({ONE_PROCESS, DDP}, {f"{DEEPSPEED}1", f"{DEEPSPEED}2"})


def describe_engine(accelerator: Any) -> str:
    """The engine of an `Accelerator` as messages name it, with the kind of its files."""
    name = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if name == "FSDP":
        kind = accelerator.state.fsdp_plugin.state_dict_type
        return f"FSDP2 with {getattr(kind, 'name', kind)}"
    if name == "DEEPSPEED":
        configuration = accelerator.state.deepspeed_plugin.deepspeed_config
        return f"{DEEPSPEED}{configuration.get('zero_optimization', {}).get('stage', 0)}"
    return ONE_PROCESS if name == "NO" else DDP


def written_by(folder: Path) -> list[str]:
    """The engines whose files a checkpoint holds: none for weights alone, several if saves were mixed."""
    found = []
    if (folder / OPTIMIZER).exists():
        found.append(DDP if any(folder.glob("rng_state_*.pth")) else ONE_PROCESS)
    if any((folder / name).exists() for name in (SHARDED_MODEL, _SHARDED_OPTIMIZER)):
        found.append(SHARDED)
    if any((folder / name).exists() for name in (FULL_MODEL, _FULL_OPTIMIZER)):
        found.append(FULL)
    if (folder / LATEST).exists() or any(folder.glob("global_step*")):
        found.append(f"{DEEPSPEED}{stage_of(folder)}")
    return found


def require_same_engine(folder: Path, running: str) -> None:
    """Raise a `ValueError` if an engine, as `describe_engine` names it, cannot load a complete checkpoint."""
    written = written_by(folder)
    if not written and running.startswith(DEEPSPEED):
        raise ValueError(
            f"cannot resume from {folder}: it holds no optimizer state (save_only_model=True), and {running} resumes "
            f"from its own files alone. To go on from these weights, {ANEW}."
        )
    if f"{DEEPSPEED}?" in written and running.startswith(DEEPSPEED):
        return  # DeepSpeed itself compares the stages
    both = {*written, running}
    if written and written != [running] and not any(both <= alike for alike in _INTERCHANGEABLE):
        raise ValueError(
            f"cannot resume from {folder}: it was written by {written[0]}, and the training runs with {running}, which "
            f"does not read these files. Resume with {written[0]}, or {ANEW}."
        )


def engine_flaw(folder: Path) -> str | None:
    """The first file that a checkpoint lacks or that is damaged, under any engine; no code in a file is run."""
    written = written_by(folder)
    if len(written) > 1:
        return f"it mixes the files of two saves, by {written[0]} and by {written[1]}"
    return next(_flaws(folder, written[0] if written else None), None)


def saved_state(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The optimizer's state in a checkpoint, with its file; `None` if there is none, or DeepSpeed wrote it.

    The tensors of a sharded state have only shapes and dtypes.

    Raises:
        ValueError: the file is cut off, or not of an optimizer.
    """
    for name in (OPTIMIZER, _FULL_OPTIMIZER):
        if (folder / name).is_file():
            return folder / name, read_optimizer_state(folder / name)
    sharded = folder / _SHARDED_OPTIMIZER
    return (sharded, read_sharded_state(sharded)) if sharded.is_dir() else None


def _flaws(folder: Path, engine: str | None) -> Iterator[str]:
    ranks, has_schedule = 1, True
    if engine == SHARDED:
        for name in (SHARDED_MODEL, _SHARDED_OPTIMIZER):
            yield from shards_flaws(folder / name)
        ranks = ranks_of_shards(folder / _SHARDED_OPTIMIZER)
    elif engine == FULL:
        yield from _full_flaws(folder)
    elif engine in (None, ONE_PROCESS, DDP):
        if not holds_weights(folder):
            yield f"{WEIGHTS[0]} is missing"
        elif engine is None and not (folder / SCHEDULER).is_file() and not any(folder.glob(RNG)):
            return  # save_only_model leaves out all of them
        elif engine is None:
            yield f"{OPTIMIZER} is missing, and so are the files of FSDP2 and DeepSpeed"
    else:
        yield from zero_flaws(folder)
        is_own, ranks = own_schedule_and_ranks(folder)
        has_schedule = not is_own
    if has_schedule and not (folder / SCHEDULER).is_file():
        yield f"{SCHEDULER} is missing"
    missing = find_missing_rng(folder, ranks)
    if missing is not None:
        yield f"{missing} is missing"


def _full_flaws(folder: Path) -> Iterator[str]:
    for name, read in ((FULL_MODEL, _read_weights), (_FULL_OPTIMIZER, read_optimizer_state)):
        if not (folder / name).is_file():
            yield f"{name} is missing"
            continue
        try:
            read(folder / name)
        except ValueError as error:
            yield f"{name} is cut off or damaged ({error})"


def _read_weights(file: Path) -> Any:
    content = read_tensors(file)
    if not isinstance(content, dict):
        raise ValueError("it holds no weights of a model")
    return content
