"""Which adapters lie in a folder, and what is there to say of them on the base model that they name?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from lorapro_hf.checkpoints.adapters import ADAPTER_FILES
from lorapro_hf.checkpoints.resume import is_checkpoint
from lorapro_hf.commands.inspect.base_model import base_on_meta
from lorapro_hf.commands.inspect.checkpoints import compared
from lorapro_hf.commands.inspect.model import inspect_model
from lorapro_hf.commands.inspect.report import Checkpoint, Report, Request, Unsupported
from lorapro_hf.commands.inspect.tasks import TASKS
from lorapro_hf.hub.settings import SETTINGS_FILE, load_lora_pro_config
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import shortened

ADAPTER = "adapter_config.json"
WEIGHTS = ADAPTER_FILES[0]
_ARGUMENTS = "training_args.bin"


def adapters_in(name: str) -> dict[str, str]:
    """The folders of the adapters that PEFT has saved together, by name: `default` at the top, others inside.

    Checkpoints and output folders of other trainings inside are left out.
    """
    folder = Path(name)
    if not folder.is_dir():
        return {"default": name}
    found = {"default": name} if (folder / ADAPTER).is_file() else {}
    inside = sorted(file.parent for file in folder.glob(f"*/{ADAPTER}"))
    return found | {
        path.name: str(path) for path in inside if not is_checkpoint(path) and not (path / _ARGUMENTS).is_file()
    }


def report_on_adapters(request: Request, checkpoint: Checkpoint | None = None) -> Report:
    """The report on saved adapters, maybe of a checkpoint, on the base model that the first of them names.

    Raises:
        UsageError: an adapter or its base model cannot be read, or it is of another kind than LoRA.
    """
    if request.lora:
        given = ", ".join(f"--{name}" for name in request.lora)
        raise UsageError(f"{request.name} is an adapter with settings of its own: leave out {given}, or name its base.")
    folders = adapters_in(request.name)
    configs = {adapter: _read_config(folder) for adapter, folder in folders.items()}
    base = _base_of(request, next(iter(configs.values())))
    model = with_adapters(base, configs)
    notes: list[str] = []
    refused: list[Unsupported] = []
    for adapter, folder in folders.items():
        file = cached_file(folder, WEIGHTS, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            notes += _differences(model, adapter, _tensor_shapes(Path(file)))
            continue
        notes.append(f"There is no {WEIGHTS} in {folder}: only its settings are known.")
        is_empty = Path(folder).is_dir() and not any(Path(folder, each).is_file() for each in ADAPTER_FILES)
        if is_empty and checkpoint is None:
            reason = f"PEFT cannot load {folder}, which has no weights: save it again."
            refused.append(Unsupported(reason, "adapter", []))
    report = inspect_model(model, ranks=request.ranks, source=request.name)
    if checkpoint is not None:
        checkpoint = compared(checkpoint, model)
        named = any(each in (checkpoint.flaw or "") for each in ADAPTER_FILES)
        checkpoint = replace(checkpoint, usable_weights=checkpoint.flaw is not None and not (notes or named))
    return replace(
        report,
        checkpoint=checkpoint,
        settings=_settings(request.name),
        unsupported=[*report.unsupported, *refused],
        notes=[*notes, *report.notes],
    )


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


def _base_of(request: Request, config: PeftConfig) -> PreTrainedModel:
    """The base model that an adapter names, on the meta device."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(config, LoraConfig) or config.is_prompt_learning:
        raise UsageError(
            f"{request.name} is an adapter of the kind {kind}, which has no LoRA factors; LoRA-Pro needs an adapter "
            "made from LoraConfig."
        )
    base = config.base_model_name_or_path
    remedy = f"Write the folder or the name of its base model into {ADAPTER}, as base_model_name_or_path."
    if not base:
        raise UsageError(f"{request.name} does not name its base model. {remedy}")
    named = getattr(config.task_type, "value", config.task_type)
    told = next((task for task, (_, peft_name) in TASKS.items() if named is not None and peft_name == named), None)
    allowed = request.trust_remote_code
    try:
        model, _ = base_on_meta(base, request.task or told, trust_remote_code=allowed, revision=config.revision)
    except UsageError as error:
        raise UsageError(f"{request.name} needs its base model: {error} {remedy}") from error
    return model


def _read_config(folder: str) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"cannot read {ADAPTER} of {folder}: {shortened(str(error), 500)}") from error


def _tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; only its header is read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"cannot read {file}: {error}. It is cut off or damaged; copy or save it again.") from error


def _differences(model: PeftModel, adapter: str, found: Mapping[str, tuple[int, ...]]) -> list[str]:
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


def _settings(name: str) -> dict[str, Any] | None:
    if not Path(name, SETTINGS_FILE).is_file():
        return None
    try:
        config = load_lora_pro_config(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    of_mode = (setting for setting in fields(config) if setting.metadata.get("mode", config.mode) == config.mode)
    return {setting.name: getattr(config, setting.name) for setting in of_mode}
