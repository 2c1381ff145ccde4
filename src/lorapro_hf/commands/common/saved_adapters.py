"""How is a saved adapter read and compared with a base model?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers.utils import cached_file

from lorapro_hf.checkpoints import adapters
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import shortened

ADAPTER = "adapter_config.json"


def read_config(folder: str) -> PeftConfig:
    """The settings of an adapter in a folder or repository; a `UsageError` if they cannot be read."""
    try:
        return PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"cannot read {ADAPTER} of {folder}: {shortened(str(error), 500)}") from error


def with_adapters(model: Any, configs: Mapping[str, PeftConfig]) -> PeftModel:
    """The model with new adapters of these settings, the first of them active, all on the meta device."""
    (first, config), *others = [(name, copy.deepcopy(config)) for name, config in configs.items()]
    config.inference_mode = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names and patterns
            adapted = get_peft_model(model, config, adapter_name=first, low_cpu_mem_usage=True)
            for name, other in others:
                adapted.add_adapter(name, other, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UsageError(f"PEFT does not make this adapter: {error}") from error
    return adapted


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in an adapter's file; a `UsageError` if it is damaged."""
    try:
        return {name: tuple(shape) for name, shape in adapters.tensor_shapes(file).items()}
    except (SafetensorError, OSError, RuntimeError, UnpicklingError) as error:
        raise UsageError(f"cannot read {file}: {error}. It is cut off or damaged; copy or save it again.") from error


def differences(model: PeftModel, adapter: str, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Differences between the tensors of an adapter's file and those of a model with the adapter."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    own = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = {
        "of the model are missing in the adapter's file": own.keys() - found.keys(),
        # PEFT also saves embeddings whole if they may have grown
        "in the adapter's file belong to nothing in the model": {
            name for name in found.keys() - own.keys() if ".lora_" in name
        },
        "have another shape in the adapter's file than in the model": {
            name for name in own.keys() & found.keys() if own[name] != found[name]
        },
    }
    return [
        f"{len(names)} tensors {fault}, {min(names)} to begin with: it is of another base model."
        for fault, names in differing.items()
        if names
    ]


def has_tokenizer(source: str) -> bool:
    """Whether a tokenizer was saved in a folder or repository."""
    try:
        return cached_file(source, "tokenizer_config.json") is not None
    except OSError:
        return False
