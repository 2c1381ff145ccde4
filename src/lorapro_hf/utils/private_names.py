"""Which names and methods that other libraries do not promise does LoRA-Pro use, and which releases were tested?

A private name may change with any release. Each is read through `private`, which raises an error that names the release
and the name where it is gone. No default takes its place: it could stand for an older gradient or another scale.

A release newer than the newest tested one is a warning for DeepSpeed alone, whose names hold the gradients and masters
of each step. For torch and transformers it would warn every user at each release.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, NamedTuple

# The oldest and the newest release that the tests have run with; a test compares them with requirements/.
TESTED = {
    "deepspeed": ("0.19.8", "0.19.8"),
    "torch": ("2.6", "2.13.0"),
    "transformers": ("4.57.1", "5.23.0"),
}
_TITLES = {"deepspeed": "DeepSpeed", "torch": "PyTorch"}

logger = logging.getLogger(__name__)
_warned: set[str] = set()


class PrivateName(NamedTuple):
    """A name, the package that has it, and its use as a clause that begins with "which"."""

    package: str
    name: str
    use: str


class ReplacedMethod(NamedTuple):
    """A method of another package that LoRA-Pro wraps or overrides without a promise that the package calls it."""

    package: str
    owner: str
    name: str
    reason: str


REPLACED = (
    ReplacedMethod("deepspeed", "ZeRO optimizer", "step", "copies the raw gradients before ZeRO frees or scales them"),
    ReplacedMethod("deepspeed", "DeepSpeedEngine", "save_checkpoint", "writes the moments before `latest` is updated"),
    ReplacedMethod("deepspeed", "DeepSpeedEngine", "load_checkpoint", "checks the moments first and loads them last"),
    ReplacedMethod("transformers", "Trainer", "_save", "writes settings and card, and checks the saved adapter"),
    ReplacedMethod("transformers", "Trainer", "_save_checkpoint", "writes the manifest when all files are complete"),
    ReplacedMethod("transformers", "Trainer", "_save_rng_state", "waits for the files of all ranks"),
    ReplacedMethod("transformers", "Trainer", "_save_optimizer_and_scheduler", "collects the state that ranks share"),
    ReplacedMethod("transformers", "Trainer", "_load_optimizer_and_scheduler", "loads no state of other ranks"),
    ReplacedMethod("transformers", "Trainer", "_load_from_checkpoint", "loads all adapters into their parameters"),
    ReplacedMethod("transformers", "Trainer", "_load_best_model", "loads all adapters into their parameters"),
    ReplacedMethod("transformers", "Trainer", "_maybe_log_save_evaluate", "checks skipped steps on all ranks"),
    ReplacedMethod("transformers", "Trainer", "_push_from_checkpoint", "pushes settings, card and manifest"),
    ReplacedMethod("transformers", "Trainer", "_finish_current_push", "reports pushes that failed in the background"),
)
"""The table of `docs/support.md`; each method calls the one that it replaces."""

METHODS_OF_TRAINER = (*(method.name for method in REPLACED if method.owner == "Trainer"), "_get_output_dir")


def _named(library: str, use: str, *names: str) -> Iterable[tuple[str, PrivateName]]:
    return ((name, PrivateName(library, name, use)) for name in names)


_CLASSES = ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
_ENGINE = ("basic_optimizer", "has_moe_layers", "mpu", "param_names", "pipeline_parallelism")
_SECTIONS = ("zero_config", "float16_config", "bfloat16_config", "compile_config", "tensor_parallel_config")
_MASTERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
_FRAGMENT = ("_hp_mapping", "lp_fragment_address", "hp_fragment_address", "param_group_index")
_PARTITION = ("ds_shape", "ds_numel", "partition_numel", "grad_position", "get_param_id")
_GRADIENTS = ("get_lp_grad_fragment", "_index_in_param_group", "grad_partitions_flat_buffer")
_SCALES = ("loss_scale", "clip_grad", "_global_grad_norm")

PRIVATE = dict(
    (
        *_named("deepspeed", "by which LoRA-Pro tells engines and optimizers apart", *_CLASSES),
        *_named("deepspeed", "by which LoRA-Pro checks the engine", *_ENGINE),
        *_named("deepspeed", "from which LoRA-Pro reads the settings", "_config", "_param_dict", *_SECTIONS),
        *_named("deepspeed", "in which LoRA-Pro finds the parameters", "bit16_groups", "bf16_groups", "fp16_groups"),
        *_named("deepspeed", "in which LoRA-Pro steps the float32 masters", *_MASTERS),
        *_named("deepspeed", "by which LoRA-Pro finds a rank's part of a parameter", *_FRAGMENT, *_PARTITION),
        *_named("deepspeed", "by which LoRA-Pro reads the gradients", *_GRADIENTS),
        *_named("deepspeed", "by which LoRA-Pro scales and clips the gradients", *_SCALES),
        *_named("deepspeed", "over which LoRA-Pro gathers the gradients", "dp_process_group"),
        *_named("torch", "by which LoRA-Pro knows whether gradients are scaled", "_per_optimizer_states"),
        *_named("torch", "by which LoRA-Pro knows whether ranks train within join()", "_join_config"),
        *_named("torch", "through which LoRA-Pro waits for other ranks", "_get_default_store"),
        *_named("transformers", "by which LoRA-Pro saves, loads, pushes and logs its part", *METHODS_OF_TRAINER),
        *_named("transformers", "by which LoRA-Pro sees the adapters of add_adapter", "_hf_peft_config_loaded"),
        *_named("transformers", "by which LoRA-Pro tells the task of a model", "_model_mapping"),
    )
)


def private(holder: object, name: str) -> Any:
    """An attribute that a library does not promise.

    Args:
        holder: the object that has it, or the full name of the module that has it.
        name: one of `PRIVATE`.

    Raises:
        RuntimeError: the installed release has no such name. The message names the tested releases.
    """
    row = PRIVATE[name]
    try:
        return getattr(import_module(holder) if isinstance(holder, str) else holder, name)
    except (AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == row.package:
            raise  # the library is not installed at all
        raise RuntimeError(
            f"{_installed(row.package)} has no {_name_of(holder)}.{name}, {row.use}. It was tested with "
            f"{tested(row.package)}: install such a release, or report it."
        ) from error


def tested(library: str) -> str:
    """The title of a library and its tested releases."""
    oldest, newest = TESTED[library]
    releases = oldest if oldest == newest else f"{oldest} to {newest}"
    return f"{_TITLES.get(library, library)} {releases}"


def warn_if_newer(library: str) -> None:
    """Warn, once in a process, if the installed release of a library is newer than the newest tested one."""
    if library in _warned or _numbers(metadata.version(library)) <= _numbers(TESTED[library][1]):
        return
    _warned.add(library)
    logger.warning(
        "LoRA-Pro relies on private names of %s, and was tested with %s.", _installed(library), tested(library)
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _installed(library: str) -> str:
    return f"{_TITLES.get(library, library)} {metadata.version(library)}"


def _name_of(holder: object) -> str:
    if isinstance(holder, str):
        return holder
    return str(holder.__name__) if isinstance(holder, type | ModuleType) else type(holder).__name__
