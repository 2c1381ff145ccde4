"""Does a name stand for a base model, an adapter, a checkpoint or an output folder?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers.utils import cached_file, find_adapter_config_file

from lorapro_hf.checkpoints.adapters import ADAPTER_FILES
from lorapro_hf.checkpoints.files import STATE
from lorapro_hf.checkpoints.resume import checkpoints_in, is_checkpoint
from lorapro_hf.commands.inspect.base_model import base_on_meta, head_of
from lorapro_hf.commands.inspect.checkpoints import advice, compared, read_checkpoint, read_checkpoints
from lorapro_hf.commands.inspect.files import WEIGHTS, Shapes, differences, skeleton, tensor_shapes
from lorapro_hf.commands.inspect.model import adapters_of, inspect_model
from lorapro_hf.commands.inspect.report import ENGINE, Base, Checkpoint, Report, Unsupported
from lorapro_hf.commands.inspect.tasks import TASKS
from lorapro_hf.hub.settings import SETTINGS_FILE, load_lora_pro_config
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.model import AdapterArguments
from lorapro_hf.recipes.targets import require_known_names
from lorapro_hf.utils.text_files import shortened

_ADAPTER, _CONFIG, _ARGUMENTS = "adapter_config.json", "config.json", "training_args.bin"


@dataclass(frozen=True)
class Request:
    """What to inspect and how.

    Args:
        name: a folder, or a name on the Hub.
        lora: the given options of a new adapter, by the names of `AdapterArguments`.
        task: a key of `TASKS`; `None` for the one that the model's configuration or the adapter tells.
        ranks: number of processes that would share the pairs out.
        trust_remote_code: run code that comes with the model.
    """

    name: str
    lora: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    ranks: int = 1
    trust_remote_code: bool = False


def inspect_source(request: Request) -> Report:
    """The report on a folder or a name on the Hub.

    Raises:
        UsageError: the name stands for nothing that can be inspected, or an option does not fit.
    """
    folder = Path(request.name)
    if not folder.exists() and _is_path(request.name):
        raise UsageError(f"there is no folder {request.name}.")
    if folder.is_file():
        raise UsageError(f"{request.name} is a file: name the folder it is in, {folder.parent}.")
    if not folder.is_dir():
        return (
            _of_adapter(request, _adapters_in(request.name))
            if _adapter_file(request.name) is not None
            else _of_base(request)
        )
    if checkpoints := read_checkpoints(checkpoints_in(folder)):
        return replace(_of_output(request, checkpoints), checkpoints=checkpoints)
    if is_checkpoint(folder):
        return _of_checkpoint(request, read_checkpoint(folder))
    if not any((folder / name).is_file() for name in (_ADAPTER, _CONFIG)):
        raise UsageError(_nothing_there(folder))
    return _of_files(request)


def _of_files(request: Request, checkpoint: Checkpoint | None = None) -> Report:
    """The report on a folder with adapters or with the configuration of a base model."""
    folder = Path(request.name)
    adapters = _adapters_in(request.name)
    if adapters and ("default" in adapters or checkpoint is not None or not (folder / _CONFIG).is_file()):
        return _of_adapter(request, adapters, checkpoint)
    return replace(_of_base(request), checkpoint=checkpoint)


def _of_checkpoint(request: Request, checkpoint: Checkpoint) -> Report:
    """The report on a checkpoint; an engine may keep the adapter in files of its own."""
    ways_on = advice(checkpoint)
    if not _adapters_in(request.name) and not Path(request.name, _CONFIG).is_file():
        note = f"There is neither {_ADAPTER} nor {_CONFIG} in this checkpoint."
        if checkpoint.optimizer == ENGINE:
            note += " The files of FSDP or DeepSpeed hold the adapter; the training that wrote them can load them."
        return Report(request.name, checkpoint=checkpoint, notes=[note, *ways_on])
    try:
        report = _of_files(request, checkpoint)
    except UsageError as error:
        if checkpoint.flaw is None:
            raise
        return Report(request.name, checkpoint=checkpoint, notes=[_line(error), *ways_on])
    if report.checkpoint is not None and report.checkpoint.usable_weights:
        loading = f"PeftModel.from_pretrained(base_model, {request.name!r}, is_trainable=True)"
        ways_on.append(f"Its weights are whole, and a new training can start from them: {loading}.")
    return replace(report, notes=[*ways_on, *report.notes])


def _of_output(request: Request, checkpoints: Sequence[Checkpoint]) -> Report:
    """The report on an output folder: its final adapter, or else that of the newest complete checkpoint."""
    newest = next((each for each in checkpoints if each.flaw is None), None)
    if _adapters_in(request.name) or Path(request.name, _CONFIG).is_file():
        return _of_files(request)
    if newest is None:
        return Report(request.name, notes=["No checkpoint in it is complete: the training has to start again."])
    report = _of_checkpoint(replace(request, name=newest.folder), newest)
    note = f"The folder holds no adapter outside its checkpoints: this is {Path(newest.folder).name}."
    return replace(report, source=request.name, checkpoint=None, notes=[note, *report.notes])


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _nothing_there(folder: Path) -> str:
    text = f"{folder} holds neither {_CONFIG} (a model) nor {_ADAPTER} (an adapter) nor {STATE} (a checkpoint)."
    named = {file.parent for name in (_ADAPTER, _CONFIG, STATE) for file in folder.glob(f"*/{name}")}
    inside = sorted(map(str, named | {path.parent for path in folder.glob("*/checkpoint-*")}))
    return f"{text} Did you mean {', '.join(inside)}?" if inside else text


def _adapter_file(name: str) -> str | None:
    try:
        found: str | None = find_adapter_config_file(name)
    except (OSError, ValueError):  # reading the model's configuration will tell
        return None
    return found


def _of_base(request: Request) -> Report:
    """The report on a base model with a new adapter."""
    model, task = base_on_meta(request.name, request.task, trust_remote_code=request.trust_remote_code)
    head = head_of(model, task)
    config = AdapterArguments(**request.lora).lora_config(TASKS[task].peft_name)
    require_known_names(model, config)
    config.modules_to_save = [*(config.modules_to_save or []), *head] or None
    report = inspect_model(_adapted(model, {"default": config}), ranks=request.ranks, source=request.name)
    return replace(report, notes=[*report.notes, f"The adapter is a new one, for the task {task}."])


def _of_adapter(request: Request, folders: Mapping[str, str], checkpoint: Checkpoint | None = None) -> Report:
    """The report on saved adapters, on the base model that the first of them names if its configuration is there.

    Args:
        request: what to inspect.
        folders: the folder of each adapter, by its name.
        checkpoint: the checkpoint that the adapters are part of.
    """
    if request.lora:
        given = ", ".join(f"--{name}" for name in request.lora)
        raise UsageError(f"{request.name} is an adapter with settings of its own: leave out {given}, or name its base.")
    configs = {name: _config(folder) for name, folder in folders.items()}
    shapes = {name: tensor_shapes(file) for name, folder in folders.items() if (file := _weights(folder)) is not None}
    bare = [folder for name, folder in folders.items() if name not in shapes]
    notes = [f"There is no {WEIGHTS} in {folder}: only its settings are known." for folder in bare]
    gone = [folder for folder in bare if _is_without_weights(folder)] if checkpoint is None else []
    refused = [
        Unsupported(f"PEFT cannot load {folder}, which has no weights: save it again.", "adapter", [])
        for folder in gone
    ]
    adapter = next(iter(configs))
    first = _require_lora(request.name, configs[adapter])
    differing: list[str] = []
    try:
        model = _base_of(request, first)
    except UsageError as error:
        if adapter not in shapes:
            raise
        notes.append(f"Read from the adapter's file alone: {_line(error)}")
        report = _alone(request, adapter, first, shapes[adapter])
    else:
        adapted = _adapted(model, configs)
        differing = [line for name, each in shapes.items() for line in differences(adapted, name, each)]
        report = inspect_model(adapted, ranks=request.ranks, source=request.name)
        checkpoint = None if checkpoint is None else compared(checkpoint, adapted)
    if checkpoint is not None and checkpoint.flaw is not None:
        named = any(name in checkpoint.flaw for name in ADAPTER_FILES)
        checkpoint = replace(checkpoint, usable_weights=not (bare or differing or named))
    return replace(
        report,
        checkpoint=checkpoint,
        settings=_settings(request.name),
        unsupported=[*report.unsupported, *refused],
        notes=[*notes, *differing, *report.notes],
    )


def _require_lora(name: str, config: PeftConfig) -> LoraConfig:
    if not isinstance(config, LoraConfig) or config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UsageError(
            f"{name} is an adapter of the kind {kind}, which has no LoRA factors; LoRA-Pro needs an adapter made from "
            "LoraConfig."
        )
    return config


def _base_of(request: Request, config: LoraConfig) -> Any:
    """The base model that an adapter names, on the meta device."""
    if not config.base_model_name_or_path:
        raise UsageError("the adapter does not name its base model")
    model, _ = base_on_meta(
        str(config.base_model_name_or_path),
        request.task or _task_named(config),
        trust_remote_code=request.trust_remote_code,
        revision=config.revision,
    )
    return model


def _adapters_in(name: str) -> dict[str, str]:
    """The folders of the adapters that PEFT has saved together, by name: `default` at the top, others inside.

    Checkpoints and output folders of other trainings inside are left out.
    """
    folder = Path(name)
    if not folder.is_dir():
        return {"default": name}
    found = {"default": name} if (folder / _ADAPTER).is_file() else {}
    inside = sorted(file.parent for file in folder.glob(f"*/{_ADAPTER}"))
    return found | {
        path.name: str(path) for path in inside if not is_checkpoint(path) and not (path / _ARGUMENTS).is_file()
    }


def _config(folder: str) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"cannot read {_ADAPTER} of {folder}: {shortened(str(error), 500)}") from error


def _weights(name: str) -> Path | None:
    found = cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _is_without_weights(folder: str) -> bool:
    return Path(folder).is_dir() and not any(Path(folder, name).is_file() for name in ADAPTER_FILES)


def _task_named(config: PeftConfig) -> str | None:
    named = getattr(config.task_type, "value", config.task_type)
    return next((task for task, each in TASKS.items() if named is not None and each.peft_name == named), None)


def _adapted(model: Any, configs: Mapping[str, PeftConfig]) -> PeftModel:
    """The model with these adapters, the first of them active, all on the meta device."""
    (first, config), *others = [(name, copy.deepcopy(config)) for name, config in configs.items()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names and patterns
            config.inference_mode = False
            adapted = get_peft_model(model, config, adapter_name=first, low_cpu_mem_usage=True)
            for name, other in others:
                adapted.add_adapter(name, other, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UsageError(f"PEFT does not make this adapter: {error}") from error
    return adapted


def _alone(request: Request, adapter: str, config: LoraConfig, shapes: Shapes) -> Report:
    bare, settings = skeleton(shapes, config)
    if not settings.target_modules and not getattr(settings, "target_parameters", None):
        raise UsageError(f"{request.name}: its {WEIGHTS} holds no LoRA factors.")
    settings.task_type = None
    base = Base(None, config.base_model_name_or_path, None, None, None, None)
    model = _adapted(bare, {adapter: settings})
    report = inspect_model(model, ranks=request.ranks, source=request.name, base=base)
    model.peft_config[adapter] = config  # which has the adapter's own targets
    whole = [name for name in shapes if ".lora_" not in name and ".base_layer." not in name]
    notes = [f"{len(whole)} of its tensors belong to layers that are trained whole."] if whole else []
    return replace(report, adapters=adapters_of(model), notes=[*notes, *report.notes])


def _settings(name: str) -> dict[str, Any] | None:
    if not Path(name, SETTINGS_FILE).is_file():
        return None
    try:
        return load_lora_pro_config(name).to_dict()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
