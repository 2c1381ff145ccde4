"""Which names that other libraries do not promise does LoRA-Pro use, and which releases were tested?

A private name may change with any release. Each is read through `private`, which raises an error that names the release
and the name where it is gone. No default takes its place: it could stand for an older gradient or another scale.

Only a release of DeepSpeed that is newer than the tested ones is warned of: its names hold the gradients and masters of
each step. For torch and transformers every user would be warned at each release.
"""

from __future__ import annotations

import logging
import re
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

# The oldest and the newest release that the tests have run with; a test compares them with requirements/.
TESTED = {
    "deepspeed": ("0.19.8", "0.19.8"),
    "peft": ("0.17.1", "0.21.2"),
    "torch": ("2.6", "2.13.0"),
    "transformers": ("4.57.1", "5.23.0"),
}
_TITLES = {"deepspeed": "DeepSpeed", "peft": "PEFT", "torch": "PyTorch"}

logger = logging.getLogger(__name__)
_warned: set[str] = set()


_OF_TRAINER = (
    "_save _save_checkpoint _save_rng_state _save_optimizer_and_scheduler _load_optimizer_and_scheduler "
    "_load_from_checkpoint _load_best_model _maybe_log_save_evaluate _push_from_checkpoint _finish_current_push "
    "_get_output_dir"
)
METHODS_OF_TRAINER = _OF_TRAINER.split()
_NAMES = {
    "deepspeed": " ".join(
        (
            # classes
            "DeepSpeedEngine DeepSpeedZeroOptimizer DeepSpeedZeroOptimizer_Stage3 BF16_Optimizer",
            # the engine and its settings
            "basic_optimizer has_moe_layers mpu param_names pipeline_parallelism _config _param_dict",
            "zero_config float16_config bfloat16_config compile_config tensor_parallel_config",
            # parameters, their float32 masters and the part of each rank
            "bit16_groups bf16_groups fp16_groups single_partition_of_fp32_groups fp32_groups_flat_partition",
            "fp32_partitioned_groups_flat _hp_mapping lp_fragment_address hp_fragment_address param_group_index",
            "ds_shape ds_numel ds_tensor ds_process_group partition_numel grad_position get_param_id",
            # gradients
            "get_lp_grad_fragment _index_in_param_group grad_partitions_flat_buffer dp_process_group",
            "loss_scale clip_grad _global_grad_norm",
        )
    ),
    "peft": "_activate_lora _get_embed_scale",
    "torch": (
        "_per_optimizer_states _join_config _get_default_store _reversed_padding_repeated_twice _compiled_call_impl "
        "_conv_forward"
    ),
    "transformers": f"{_OF_TRAINER} _prepare_inputs _hf_peft_config_loaded _model_mapping",
}
PRIVATE = {name: library for library, names in _NAMES.items() for name in names.split()}
"""The library of each private name."""


def private(holder: object, name: str) -> Any:
    """An attribute that a library does not promise.

    Args:
        holder: the object that has it, or the full name of the module that has it.
        name: one of `PRIVATE`.

    Raises:
        RuntimeError: the installed release has no such name. The message names the tested releases.
    """
    library = PRIVATE[name]
    try:
        return getattr(import_module(holder) if isinstance(holder, str) else holder, name)
    except (AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            raise  # the library is not installed at all
        owner = holder if isinstance(holder, type | ModuleType) else type(holder)
        raise RuntimeError(
            f"{_installed(library)} has no {holder if isinstance(holder, str) else owner.__name__}.{name}, on which "
            f"LoRA-Pro relies. It was tested with {tested(library)}: install such a release, or report it."
        ) from error


def tested(library: str) -> str:
    """The title of a library and its tested releases."""
    oldest, newest = TESTED[library]
    releases = oldest if oldest == newest else f"{oldest} to {newest}"
    return f"{_TITLES.get(library, library)} {releases}"


def is_before(library: str, release: str) -> bool:
    """Whether the installed release of a library is older than another one."""
    return _numbers(metadata.version(library)) < _numbers(release)


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
