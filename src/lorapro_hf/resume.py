"""Can a training go on from this checkpoint folder of a `Trainer`? Asked before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from lorapro_hf.checkpoint import check_state_dict
from lorapro_hf.optimizer import LoRAProAdamW

STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"
_NAME = r"checkpoint-(\d+)"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
_WRITTEN_BY_TORCH = (OPTIMIZER, SCHEDULER, "scaler.pt", "rng_state*.pth", "adapter_model.bin", "*/adapter_model.bin")
_WRITTEN_BY_SAFETENSORS = ("adapter_model.safetensors", "*/adapter_model.safetensors")


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
    if not any(any(folder.glob(pattern)) for name in _WEIGHTS for pattern in (name, f"{name}.index.json", f"*/{name}")):
        return f"{_WEIGHTS[0]} is missing"
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
    if isinstance(model, PeftModel):
        _check_adapters(folder, model)
    file = folder / OPTIMIZER
    if not file.is_file():
        return False
    if optimizer is not None:
        try:
            check_state_dict(read_optimizer_state(file), optimizer.param_groups, optimizer.pairs, optimizer.config)
        except ValueError as error:
            raise ValueError(f"cannot resume from {file}: {error}") from error
    return True


@contextlib.contextmanager
def kept_dtypes(model: nn.Module) -> Iterator[None]:
    """Let what is trained keep its dtype: PEFT makes float32 of adapters in bfloat16 or float16 that it loads."""
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])  # without loss: it has been saved in that dtype


def load_passed_over(folder: Path, model: nn.Module) -> None:
    """Load the adapter named default, which transformers 4 passes over where it has loaded others beside it.

    Args:
        folder: the checkpoint, of which PEFT keeps that adapter at the top and each other one in a folder of its name.
        model: the model that the others have been loaded into.
    """
    if not isinstance(model, PeftModel) or "default" not in model.peft_config or len(model.peft_config) == 1:
        return
    if any((folder / name).is_file() for name in _WEIGHTS[:2]):
        active = model.active_adapters
        model.load_adapter(str(folder), "default", is_trainable="default" in active)
        model.set_adapter(active[0])


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
    for pattern in _WRITTEN_BY_SAFETENSORS:
        for file in sorted(folder.glob(pattern)):
            try:
                _shapes(file)
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


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as tensors:  # reads the header and compares it with the length
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _check_adapters(folder: Path, model: PeftModel) -> None:
    """Raise if the file of an adapter has other tensors than the model; PEFT would load what fits, with a warning."""
    for adapter in model.peft_config:
        file = folder / ("" if adapter == "default" else adapter) / "adapter_model.safetensors"
        if not file.is_file():
            continue
        found = _shapes(file)
        # Embeddings are saved when the vocabulary has grown, and asking about that may need the network.
        own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        for name, tensor in own.items():
            if found.get(name) != list(tensor.shape):
                there = f"has shape {found[name]}" if name in found else "is missing"
                raise ValueError(
                    f"cannot resume from {file}: {name} {there} in the checkpoint, but has shape {list(tensor.shape)} "
                    "in the model. It is a checkpoint of another model or rank; resume with the model it was written "
                    "for."
                )


def checkpoints_in(output: Path) -> list[Path]:
    """The checkpoints of a training, the newest first, complete or not."""
    steps = {path: re.fullmatch(_NAME, path.name) for path in output.glob("checkpoint-*")}
    numbered = {path: int(match[1]) for path, match in steps.items() if match is not None}
    return sorted(numbered, key=lambda path: -numbered[path])


def _way_out(folder: Path, by_engine: bool) -> str:
    """What to do instead: the newest complete checkpoint beside this one, or a new start."""
    if re.fullmatch(_NAME, folder.name):
        for other in checkpoints_in(folder.parent):
            if other != folder and find_flaw(other, by_engine) is None:
                return (
                    f"The newest complete checkpoint is {other}: resume with resume_from_checkpoint={str(other)!r}, or "
                    f"delete {folder.name}, so that resume_from_checkpoint=True finds {other.name}."
                )
    return "There is no complete checkpoint beside it: start the training again without resume_from_checkpoint."
