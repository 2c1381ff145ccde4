"""Which adapters lie in a folder, and what is there to say of them on the base model that they name?"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel
from transformers.utils import cached_file

from lorapro_hf.checkpoints.adapters import ADAPTER_FILES
from lorapro_hf.checkpoints.resume import is_checkpoint
from lorapro_hf.commands.common.base_model import base_on_meta
from lorapro_hf.commands.common.saved_adapters import ADAPTER, differences, read_config, tensor_shapes, with_adapters
from lorapro_hf.commands.common.tasks import TASKS
from lorapro_hf.commands.inspect.checkpoints import compared
from lorapro_hf.commands.inspect.model import inspect_model
from lorapro_hf.commands.inspect.report import Checkpoint, Report, Request, Unsupported
from lorapro_hf.hub.settings import SETTINGS_FILE, load_lora_pro_config
from lorapro_hf.options import UsageError

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
    configs = {adapter: read_config(folder) for adapter, folder in folders.items()}
    base = _base_of(request, next(iter(configs.values())))
    model = with_adapters(base, configs)
    notes: list[str] = []
    refused: list[Unsupported] = []
    for adapter, folder in folders.items():
        file = cached_file(folder, WEIGHTS, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            notes += differences(model, adapter, tensor_shapes(Path(file)))
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


def _settings(name: str) -> dict[str, Any] | None:
    if not Path(name, SETTINGS_FILE).is_file():
        return None
    try:
        config = load_lora_pro_config(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    of_mode = (setting for setting in fields(config) if setting.metadata.get("mode", config.mode) == config.mode)
    return {setting.name: getattr(config, setting.name) for setting in of_mode}
