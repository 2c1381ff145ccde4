"""What do the files of a checkpoint hold of the methods that took part in a training?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorapro_hf.checkpoints.engines import ANEW
from lorapro_hf.checkpoints.files import METHODS, read_method_file
from lorapro_hf.checkpoints.manifest import MANIFEST
from lorapro_hf.factors.pairs import survey_lora_pairs

_PLAIN = (Tensor, nn.Parameter, bool, int, float, str, type(None))


def write_method_state(
    folder: Path, name: str, state: Mapping[str, Any], factors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a method's `state_dict` into a checkpoint, with the factors where the adapter is saved in another form.

    A state of anything but tensors and plain values, which could not be read again, is a `ValueError`.
    """
    foreign = _find_foreign(state)
    if foreign is not None:
        raise ValueError(
            f"the state of the method {name!r} holds a {foreign}, which no checkpoint can give back. Have its "
            "state_dict return tensors, numbers, text and None, in lists, tuples and dictionaries."
        )
    torch.save({"state": dict(state), "factors": factors and dict(factors)}, _file(folder, name))


def load_method_file(folder: Path, name: str, model: nn.Module) -> dict[str, Any]:
    """The state of a method in a checkpoint; factors beside it are copied into the model, or refused if one misfits."""
    content = read_method_file(_file(folder, name))
    saved, own = content["factors"] or {}, factors_of(model)
    for each in saved:
        if each not in own or own[each].shape != saved[each].shape:
            raise ValueError(
                f"{_file(folder, name)}: {each} does not fit into the model. It is a checkpoint of another model or "
                "rank; resume with the model it was written for."
            )
    with torch.no_grad():
        for each, value in saved.items():
            own[each].copy_(value)
    return dict(content["state"])


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    """The factors of all trainable pairs of a model, by name; none of a model without pairs."""
    return {
        f"{pair.name}.lora_{letter}.{pair.adapter_name}": factor.detach()
        for pair in survey_lora_pairs(model)[0]
        for letter, factor in (("A", pair.A), ("B", pair.B))
    }


def saved_methods(folder: Path) -> set[str]:
    """The names of the methods that have a file in a checkpoint."""
    before, after = METHODS.split("*")
    return {file.name.removeprefix(before).removesuffix(after) for file in folder.glob(METHODS)}


def require_same_methods(folder: Path, names: Collection[str], is_whole: bool) -> None:
    """Raise a `ValueError` if a training has other methods with a state than a checkpoint.

    A checkpoint of weights alone, which is not whole, need not have the methods of the training.
    """
    saved = saved_methods(folder)
    if unknown := sorted(saved - set(names)):
        file = _file(folder, unknown[0])
        remedy = f"delete {file.name} and {MANIFEST} there to go on without it"
        if read_method_file(file)["factors"]:  # the adapter is saved in another form than the trained factors
            remedy = f"start a new training from its adapter: PeftModel.from_pretrained(base, {str(folder)!r}, "
            remedy += "is_trainable=True)"
        raise ValueError(
            f"cannot resume from {folder}: it holds the state of the method {unknown[0]!r}, which this training does "
            f"not have. Add the method, or {remedy}."
        )
    if is_whole and (missing := sorted(set(names) - saved)):
        raise ValueError(
            f"cannot resume from {folder}: it holds no state of the method {missing[0]!r}, which this training has. "
            f"Leave out the method, or {ANEW}."
        )


def _file(folder: Path, name: str) -> Path:
    return folder / METHODS.replace("*", name)


def _find_foreign(value: Any) -> str | None:
    """The name of the first type that is not read back; `None` if there is none."""
    if type(value) in (dict, OrderedDict):
        return next(filter(None, map(_find_foreign, (*value.keys(), *value.values()))), None)
    if type(value) in (list, tuple):
        return next(filter(None, map(_find_foreign, value)), None)
    return None if type(value) in _PLAIN else type(value).__name__
