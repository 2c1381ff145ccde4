"""How does a `Trainer` load the adapters of a checkpoint into the very parameters that its model has?

PEFT says which tensors of an adapter it would save, and under which names. These tensors share their memory with the
model's parameters, and the values of the file are copied into them. PEFT's own `load_adapter` would replace parameters
in bfloat16 and float16 by new ones in float32, while the optimizer keeps the old ones.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import Trainer

from lorapro_hf.checkpoints.adapters import (
    ADAPTER_FILES,
    PREFIX,
    active_adapters,
    adapter_files,
    holds_weights,
    read_adapter,
    tensor_shapes,
    told,
)
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.factors.pairs import survey_lora_pairs
from lorapro_hf.utils.text_files import shortened

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)


class LoadingMixin(_Base):
    """The part of `LoRAProTrainerMixin` that loads a model's weights; while LoRA-Pro is off it is the parent."""

    lora_pro_config: LoRAProConfig | None = None
    loaded_best_checkpoint: str | None

    @property
    def _exports(self) -> bool:
        """Whether checkpoints hold another form of the adapter than the one that is trained."""
        return False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Like the parent, but load all adapters into the existing parameters."""
        parent = super()._load_from_checkpoint
        if not self._loads_adapters(resume_from_checkpoint):
            parent(resume_from_checkpoint, *args, **kwargs)
            return
        if _is_overridden(parent):
            with left_alone(self.model):
                parent(resume_from_checkpoint, *args, **kwargs)
        load_adapters(Path(resume_from_checkpoint), self.model, factors=not self._exports)

    def _load_best_model(self) -> None:
        """Like the parent, but load all adapters into the existing parameters; a failure is a warning."""
        folder, parent = self.state.best_model_checkpoint, super()._load_best_model
        if not self._loads_adapters(folder):
            parent()
            self.loaded_best_checkpoint = folder if self._is_by_engine or holds_weights(Path(folder)) else None
            return
        try:
            if _is_overridden(parent):
                with left_alone(self.model):
                    parent()
            load_adapters(Path(folder), self.model, factors=not self._exports)
        except Exception as error:  # no error may fail a training that has come to its end
            logger.warning(
                "The best checkpoint could not be loaded: %s\nThe model keeps the weights of its last step, and the "
                "model card describes these.",
                error,
            )
            return
        self.model.eval()  # as the parent leaves it
        self.loaded_best_checkpoint = folder

    @property
    def _is_by_engine(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _loads_adapters(self, folder: str) -> bool:
        is_ours = (self.lora_pro_config is not None or self._exports) and not self._is_by_engine
        return is_ours and holds_adapters(Path(folder), self.model)


def holds_adapters(folder: Path, model: nn.Module) -> bool:
    """Whether a model has adapters, and a checkpoint holds some."""
    return bool(active_adapters(model)) and bool(_places(folder))


def require_adapters(folder: Path, model: nn.Module, factors: bool = True) -> dict[str, Path]:
    """Raise if a checkpoint of adapters lacks a trained adapter, or holds an adapter that does not fit.

    Args:
        folder: the checkpoint.
        model: the model, unwrapped.
        factors: compare A and B as well, instead of the other tensors alone.

    Returns:
        The files, as from `adapter_files`; none if the checkpoint or the model has no adapters.

    Raises:
        ValueError: the message begins with the folder or the file.
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
    """Load every adapter that a checkpoint holds; the model's active and trainable adapters stay the same.

    Args:
        folder: the checkpoint.
        model: the model, unwrapped.
        factors: load A and B as well, instead of the other tensors alone.

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


@contextlib.contextmanager
def left_alone(model: Any) -> Iterator[None]:
    """Keep a trainer's own loading from the adapters, while it loads everything else."""
    model.load_adapter = model.set_adapter = lambda *_, **__: None
    try:
        yield
    finally:
        del model.load_adapter, model.set_adapter


def _is_overridden(method: Any) -> bool:
    """Whether a bound method of a trainer is not transformers' own."""
    return getattr(method, "__func__", None) is not getattr(Trainer, method.__name__)


def _tensors(model: nn.Module, adapter: str, names: Collection[str]) -> dict[str, Tensor]:
    """The model's tensors for an adapter's file, by their names in the file.

    Args:
        model: the model, unwrapped.
        adapter: the adapter's name.
        names: the names in the file. They include embeddings when the vocabulary has grown.
    """
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
        held = sorted(
            "default" if place == folder else place.relative_to(folder).as_posix() for place in _places(folder)
        )
        raise ValueError(
            f"{folder}: the model trains the adapter {missing[0]!r}, but the checkpoint holds {held}. Give the adapter "
            f"its former name: get_peft_model(model, config, adapter_name={held[0]!r})."
        )


def _places(folder: Path) -> set[Path]:
    """The folders of the adapters that a checkpoint holds."""
    return {file.parent for name in ADAPTER_FILES for file in folder.rglob(name)}  # names may hold slashes


def _is_factor(name: str) -> bool:
    return "lora_" in name


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
