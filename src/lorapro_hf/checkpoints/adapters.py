"""Which files hold the adapters of a model, and is every trained pair in them?"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lorapro_hf.factors.pairs import LoRAPair, survey_lora_pairs
from lorapro_hf.factors.wrappers import find_wrapper, plain_name, require_plain_modules
from lorapro_hf.utils.private_names import private
from lorapro_hf.utils.unpickling import read_metadata

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHTS = (*ADAPTER_FILES, "model.safetensors", "pytorch_model.bin")
PREFIX = "base_model.model."  # of PEFT; transformers puts it before the names in its own files
# accelerate's names for the first model of a training under FSDP
FULL_MODEL, SHARDED_MODEL = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"


def is_peft_model(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether PEFT has wrapped a model; transformers' `model.add_adapter` does not."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters of a `PeftModel` or of `model.add_adapter`; none of any other model."""
    is_adapted = isinstance(model, PreTrainedModel) and private(model, "_hf_peft_config_loaded")
    if not (is_peft_model(model) or is_adapted):
        return []
    active: Any = model.active_adapters  # a method where transformers has added the adapters
    return list(active() if callable(active) else active)


def adapter_files(folder: Path, model: nn.Module) -> dict[str, Path]:
    """The adapter files in a checkpoint by the adapters' names; absent files are left out.

    PEFT saves the adapter named default at the top and each other adapter in a folder of its name. transformers saves
    the active adapter of `model.add_adapter` at the top, whatever its name.
    """
    if is_peft_model(model):
        places = {name: folder if name == "default" else folder / name for name in model.peft_config}
    else:
        places = dict.fromkeys(active_adapters(model)[:1], folder)
    files: dict[str, Path] = {}
    for adapter, place in places.items():
        for name in ADAPTER_FILES:
            if (place / name).is_file():
                files.setdefault(adapter, place / name)
    return files


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weights of a model or adapter, apart from an engine's and from checkpoints inside it."""
    patterns = [pattern for name in WEIGHTS for pattern in (f"**/{name}", f"{name}.index.json")]
    found = (file.relative_to(folder) for pattern in patterns for file in folder.glob(pattern))
    return any(not any(part.startswith(PREFIX_CHECKPOINT_DIR) for part in file.parts) for file in found)


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in an adapter file, by name.

    Raises:
        SafetensorError: a safetensors file is cut off or damaged.
    """
    if file.suffix == ".bin":
        return {name: list(tensor.shape) for name, tensor in read_adapter(file).items()}
    with safe_open(file, framework="pt") as tensors:  # reads the header and compares it with the length
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def read_adapter(file: Path) -> dict[str, Tensor]:
    """The tensors in an adapter file, by name."""
    if file.suffix == ".bin":
        return dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
    return load_file(file)


def require_savable(model: nn.Module) -> None:
    """Raise a `ValueError` if a wrapper is around a part of the model, or transformers cannot save its adapters."""
    require_plain_modules(model)
    active = active_adapters(model)
    if not is_peft_model(model) and len(active) > 1:
        raise ValueError(
            f"the adapters {active} of model.add_adapter are active at once, which transformers cannot save. Wrap the "
            "model by peft.get_peft_model instead, add the others to that, and activate them by "
            f"model.base_model.set_adapter({active})."
        )


def require_pairs_saved(folder: Path, model: nn.Module) -> None:
    """Raise a `ValueError` if a save lacks A or B of a trained pair of a model, out of any wrapper of DDP."""
    lack = find_unsaved(folder, model)
    if lack is not None:
        wrapper = find_wrapper(model)
        where = f": {wrapper[0] or 'the model'} is wrapped by {wrapper[1]}" if wrapper else ""
        remedy = (
            f"Something has renamed or replaced modules since PEFT made the adapter{where}. Take wrappers off before "
            "the training, and for activation checkpointing use gradient_checkpointing=True."
        )
    elif _adapted_part(model)[1] is not None and not _holds_model(folder):
        lack = f"{folder} has no file of an adapter or a model"
        remedy = "Look at the trainer's _save and the model's save_pretrained, which wrote no file."
    else:
        return
    raise ValueError(
        f"{lack}. The trained adapter cannot be restored from these files; the model itself still has the adapter. "
        f"{remedy}"
    )


def saving_error(folder: Path, model: nn.Module) -> ValueError | None:
    """The error of `require_pairs_saved` or of reading the files; `None` if the adapter is in the folder."""
    try:
        require_pairs_saved(folder, model)
    except ValueError as error:
        return error
    except Exception as error:  # of any kind: the other ranks must hear of it
        return ValueError(f"{folder} was saved, but cannot be read ({error}). Look at the disk, and save again.")
    return None


def require_pairs_in_checkpoint(folder: Path, model: nn.Module) -> None:
    """Raise a `ValueError` if a checkpoint lacks A or B of a trained pair."""
    lack = find_unsaved(folder, model)
    if lack is not None:
        raise ValueError(
            f"cannot resume from {lack}. The adapter was not saved, or it is the checkpoint of another model. Resume "
            "from a checkpoint that has it, or start the training again without resume_from_checkpoint."
        )


def find_unsaved(folder: Path, model: nn.Module) -> str | None:
    """The first trained factor that a file of adapters or of FSDP's model lacks, with the file; `None` if none does.

    Only names and shapes are read. A folder without such files lacks nothing, nor does one for a model without adapter.
    """
    place, part = _adapted_part(model._modules.get("_orig_mod") or model)
    files = [] if part is None else list(_files(folder, part, place and f"{place}."))
    for pair in survey_lora_pairs(part)[0] if part is not None and files else ():
        holders = [file for file in files if pair.adapter_name in file.adapters]
        if not holders:
            return f"{folder} has no file of the adapter {pair.adapter_name!r}"
        for file in holders:
            for rank, (letter, shape) in enumerate((("A", pair.shape_A), ("B", pair.shape_B))):
                names = _names(pair, letter, pair.adapter_name in file.unnamed)
                found = next((file.shapes[name] for name in names if name in file.shapes), None)
                if found is not None and "boosters" in pair.layer._modules:  # which are saved with it, in a higher rank
                    found = [*found[:rank], shape[rank], *found[rank + 1 :]]
                if found != list(shape):
                    return f"{file.path}: {names[-1]} {told(found)} there, but {told(list(shape))} in the model"
    return None


def told(shape: list[int] | None) -> str:
    """A shape as messages describe it."""
    return "is missing" if shape is None else f"has shape {shape}"


def _adapted_part(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The name and the module of the part with the adapters; a `SentenceTransformer` has them in its first module."""
    return next(((name, part) for name, part in model.named_modules() if active_adapters(part)), ("", None))


class _File(NamedTuple):
    path: Path
    shapes: dict[str, list[int]]
    adapters: Collection[str]  # which the file must hold
    unnamed: Collection[str]  # whose names are left out of the tensors' names


def _holds_model(folder: Path) -> bool:
    return holds_weights(folder) or any((folder / name).exists() for name in (FULL_MODEL, SHARDED_MODEL))


def _files(folder: Path, model: nn.Module, place: str) -> Iterator[_File]:
    """The files of a model; FSDP puts `place` before the names of a part of another model."""
    prefix = "" if is_peft_model(model) else PREFIX
    for adapter, file in adapter_files(folder, model).items():
        shapes = {name.removeprefix(prefix): shape for name, shape in tensor_shapes(file).items()}
        yield _File(file, shapes, {adapter}, {adapter})
    active, whole, shards = active_adapters(model), folder / FULL_MODEL, folder / SHARDED_MODEL
    if whole.is_file():
        shapes = {name.removeprefix(place): shape for name, shape in tensor_shapes(whole).items()}
        yield _File(whole, shapes, active, ())
    if shards.is_dir():
        try:
            entries = read_metadata(shards / ".metadata").state_dict_metadata.items()
        except ValueError as error:
            raise ValueError(
                f"{shards / '.metadata'} cannot be read ({error}). Look at the disk, and save again."
            ) from error
        sizes = {name.removeprefix("model."): list(entry.size) for name, entry in entries if hasattr(entry, "size")}
        shapes = {name.removeprefix(place): size for name, size in sizes.items()}
        yield _File(shards, shapes, active, {str(model.active_adapter)} if is_peft_model(model) else ())


def _names(pair: LoRAPair, letter: str, is_unnamed: bool) -> list[str]:
    """The names that a factor may have in a file, the likeliest last."""
    is_embedding = pair.adapter_name in pair.layer.lora_embedding_A
    stem = f"{plain_name(pair.name)}.lora_{'embedding_' if is_embedding else ''}{letter}"
    end = "" if is_embedding else ".weight"
    return [f"{stem}.{pair.adapter_name}{end}", *([f"{stem}{end}"] if is_unnamed else [])]
