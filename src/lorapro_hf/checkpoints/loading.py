"""How are the adapters of a checkpoint loaded into the very parameters that a model has?

PEFT says which tensors of an adapter it would save, and under which names. These tensors share their memory with the
model's parameters, and the values of the file are copied into them. PEFT's own `load_adapter` would replace parameters
in bfloat16 and float16 by new ones in float32, while the optimizer keeps the old ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from lorapro_hf.checkpoints.adapters import (
    ADAPTER_FILES,
    PREFIX,
    active_adapters,
    adapter_files,
    read_adapter,
    tensor_shapes,
    told,
)
from lorapro_hf.factors.pairs import survey_lora_pairs
from lorapro_hf.utils.text_files import shortened


def require_adapters(folder: Path, model: nn.Module, factors: bool = True) -> dict[str, Path]:
    """The files of `adapter_files`, once it is known that all trained adapters are there and fit the model.

    Args:
        folder: the checkpoint.
        model: the model, unwrapped.
        factors: compare A and B as well, instead of the other tensors alone.

    Raises:
        ValueError: an adapter is missing or does not fit; the message begins with the folder or the file.
    """
    files = adapter_files(folder, model)
    if holds_adapters(folder, model):
        _require_trained(folder, model, files)
    for adapter, file in files.items():
        shapes = tensor_shapes(file)
        own = {name: list(tensor.shape) for name, tensor in _tensors(model, adapter, shapes.keys()).items()}
        for name in (*own, *(name for name in shapes if _is_factor(name))):
            if (factors or not _is_factor(name)) and shapes.get(name) != own.get(name):
                raise ValueError(
                    f"{file}: {shortened(name)} {told(shapes.get(name))} in the checkpoint, but "
                    f"{told(own.get(name))} in the model. It is a checkpoint of another model or rank; resume with the "
                    "model it was written for."
                )
    return files


@torch.no_grad()
def load_adapters(folder: Path, model: nn.Module, factors: bool = True) -> None:
    """Load every adapter that a checkpoint holds; the arguments are those of `require_adapters`.

    Raises:
        ValueError: the adapters do not fit. Nothing has been changed then.
    """
    contents = {adapter: read_adapter(file) for adapter, file in require_adapters(folder, model, factors).items()}
    owned = {_address(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
    copies: list[tuple[Tensor, Tensor]] = []
    for adapter, content in contents.items():
        for name, tensor in _tensors(model, adapter, content.keys()).items():
            if _is_factor(name) and not factors:
                continue
            if _address(tensor) not in owned:
                raise ValueError(f"{folder}: PEFT saves {name} as a copy, so that it cannot be loaded in place.")
            copies.append((tensor, content[name]))
    for tensor, value in copies:
        tensor.copy_(value)


def _tensors(model: nn.Module, adapter: str, names: Collection[str]) -> dict[str, Tensor]:
    """The model's tensors by their `names` in an adapter's file, which include embeddings of a grown vocabulary."""
    prefix = "" if isinstance(model, PeftModel) else PREFIX

    def saved(embeddings: bool) -> dict[str, Tensor]:  # never "auto", which may ask the hub
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=embeddings)
        return {prefix + name: tensor for name, tensor in state.items()}

    found = saved(embeddings=False)
    if not set(names) <= found.keys():
        found |= {name: tensor for name, tensor in saved(embeddings=True).items() if name in names}
    return found


def _require_trained(folder: Path, model: nn.Module, files: Collection[str]) -> None:
    """Raise if a checkpoint lacks a trained adapter."""
    missing = sorted({pair.adapter_name for pair in survey_lora_pairs(model)[0]} - set(files))
    if missing:
        places = ("default" if place == folder else place.relative_to(folder).as_posix() for place in _places(folder))
        held = sorted(places)
        raise ValueError(
            f"{folder}: the model trains the adapter {missing[0]!r}, but the checkpoint holds {held}. Give the adapter "
            f"its former name: get_peft_model(model, config, adapter_name={held[0]!r})."
        )


def holds_adapters(folder: Path, model: nn.Module) -> bool:
    """Whether a model has adapters, and a checkpoint holds some."""
    return bool(active_adapters(model)) and bool(_places(folder))


def _places(folder: Path) -> set[Path]:
    """The folders of the adapters that a checkpoint holds."""
    return {file.parent for name in ADAPTER_FILES for file in folder.rglob(name)}  # names may hold slashes


def _is_factor(name: str) -> bool:
    return "lora_" in name


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
