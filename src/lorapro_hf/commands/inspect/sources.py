"""Does a name stand for a base model, an adapter, a checkpoint or an output folder?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers.utils import find_adapter_config_file

from lorapro_hf.checkpoints.files import STATE
from lorapro_hf.checkpoints.resume import checkpoints_in, is_checkpoint
from lorapro_hf.commands.common.base_model import base_on_meta
from lorapro_hf.commands.common.saved_adapters import ADAPTER, with_adapters
from lorapro_hf.commands.common.tasks import TASKS
from lorapro_hf.commands.inspect.adapters import adapters_in, report_on_adapters
from lorapro_hf.commands.inspect.checkpoints import read_checkpoint, read_checkpoints, ways_on
from lorapro_hf.commands.inspect.model import inspect_model
from lorapro_hf.commands.inspect.report import ENGINE, Checkpoint, Report, Request
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.model import AdapterArguments
from lorapro_hf.recipes.targets import require_known_names

_CONFIG = "config.json"


def inspect_source(request: Request) -> Report:
    """The report on a folder or a name on the Hub; a `UsageError` if there is nothing that can be inspected."""
    folder = Path(request.name)
    if folder.is_file():
        raise UsageError(f"{request.name} is a file: name the folder it is in, {folder.parent}.")
    if not folder.exists():
        if request.name.startswith((".", "/", "~")) or "\\" in request.name or request.name.count("/") > 1:
            raise UsageError(f"there is no folder {request.name}.")
        return report_on_adapters(request) if _is_adapter_on_hub(request.name) else _of_base(request)
    if checkpoints := read_checkpoints(checkpoints_in(folder)):
        return replace(_of_output(request, checkpoints), checkpoints=checkpoints)
    if is_checkpoint(folder):
        return _of_checkpoint(request, read_checkpoint(folder))
    if not any((folder / name).is_file() for name in (ADAPTER, _CONFIG)):
        raise UsageError(_nothing_there(folder))
    return _of_files(request)


def _of_files(request: Request, checkpoint: Checkpoint | None = None) -> Report:
    """The report on a folder with adapters or with the configuration of a base model."""
    adapters = adapters_in(request.name)
    if adapters and ("default" in adapters or checkpoint is not None or not Path(request.name, _CONFIG).is_file()):
        return report_on_adapters(request, checkpoint)
    return replace(_of_base(request), checkpoint=checkpoint)


def _of_checkpoint(request: Request, checkpoint: Checkpoint) -> Report:
    """The report on a checkpoint; an engine may keep the adapter in files of its own."""
    if not _has_model(request.name):
        note = f"There is neither {ADAPTER} nor {_CONFIG} in this checkpoint."
        if checkpoint.optimizer == ENGINE:
            note += " The files of FSDP or DeepSpeed hold the adapter; the training that wrote them can load them."
        return Report(request.name, checkpoint=checkpoint, notes=[note, *ways_on(checkpoint)])
    try:
        report = _of_files(request, checkpoint)
    except UsageError as error:
        report = replace(_without_model(request, error), checkpoint=checkpoint)
    notes = ways_on(checkpoint)
    if report.checkpoint is not None and report.checkpoint.usable_weights:
        loading = f"PeftModel.from_pretrained(base_model, {request.name!r}, is_trainable=True)"
        notes.append(f"Its weights are whole, and a new training can start from them: {loading}.")
    return replace(report, notes=[*notes, *report.notes])


def _of_output(request: Request, checkpoints: Sequence[Checkpoint]) -> Report:
    """The report on an output folder: its final adapter, or else that of the newest complete checkpoint."""
    if _has_model(request.name):
        try:
            return _of_files(request)
        except UsageError as error:
            return _without_model(request, error)
    newest = next((each for each in checkpoints if each.flaw is None), None)
    if newest is None:
        return Report(request.name, notes=["No checkpoint in it is complete: the training has to start again."])
    report = _of_checkpoint(replace(request, name=newest.folder), newest)
    note = f"The folder holds no adapter outside its checkpoints: this is {Path(newest.folder).name}."
    return replace(report, source=request.name, checkpoint=None, notes=[note, *report.notes])


def _of_base(request: Request) -> Report:
    """The report on a base model with a new adapter."""
    model, task = base_on_meta(request.name, request.task, trust_remote_code=request.trust_remote_code)
    config = AdapterArguments(**request.lora).peft_config(TASKS[task].peft_name)
    require_known_names(model, config)
    if task == "image-classification" and hasattr(model, "classifier"):  # PEFT has no such task, and no head for it
        config.modules_to_save = [*(config.modules_to_save or []), "classifier"]
    report = inspect_model(with_adapters(model, {"default": config}), ranks=request.ranks, source=request.name)
    return replace(report, notes=[*report.notes, f"The adapter is a new one, for the task {task}."])


def _without_model(request: Request, error: UsageError) -> Report:
    """A report with an error as its note: the base model may not be here, but the checkpoints are."""
    if request.lora:
        raise error
    return Report(request.name, notes=[" ".join(str(error).split())])


def _has_model(name: str) -> bool:
    return bool(adapters_in(name)) or Path(name, _CONFIG).is_file()


def _is_adapter_on_hub(name: str) -> bool:
    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):  # reading the model's configuration will tell
        return False


def _nothing_there(folder: Path) -> str:
    text = f"{folder} holds neither {_CONFIG} (a model) nor {ADAPTER} (an adapter) nor {STATE} (a checkpoint)."
    named = {file.parent for name in (ADAPTER, _CONFIG, STATE) for file in folder.glob(f"*/{name}")}
    inside = sorted(map(str, named | {path.parent for path in folder.glob("*/checkpoint-*")}))
    return f"{text} Did you mean {', '.join(inside)}?" if inside else text
