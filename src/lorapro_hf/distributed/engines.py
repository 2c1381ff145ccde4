"""Which engines of accelerate and which configurations of DeepSpeed are refused?

DeepSpeed's settings are checked twice: in the configuration, before DeepSpeed builds an engine or compiles anything,
and in the engine, which has filled in DeepSpeed's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from lorapro_hf.factors.wrappers import require_no_checkpoint_wrapper

BEFORE = "DeepSpeed would train without LoRA-Pro or wrongly: "
PARALLEL = (
    "it combines ZeRO with pipeline, tensor, sequence or expert parallelism (mpu), which is not supported. Use ZeRO "
    "alone, with all processes data-parallel."
)


class _Refusal(NamedTuple):
    """Settings, the values that are refused, and the reason with the remedy."""

    settings: tuple[str, ...]
    is_wrong: Callable[[Any], bool]
    reason: str


def _more_than_one(value: Any) -> bool:
    return int(value) > 1


_OFFLOADED = (
    "the optimizer or the parameters are offloaded, for which DeepSpeed or accelerate replace the optimizer. Remove "
    "'offload_optimizer' and 'offload_param' from 'zero_optimization'; mode 'spectral' or 'efficient' needs little "
    "memory."
)
_REFUSALS = (
    _Refusal(
        ("optimizer.type",),
        bool,
        "the configuration's section 'optimizer' names {value!r}. Remove that section and pass the LoRAProAdamW to "
        "deepspeed.initialize or accelerator.prepare.",
    ),
    _Refusal(
        ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"),
        lambda value: value != "none",
        _OFFLOADED,
    ),
    _Refusal(("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param"), bool, _OFFLOADED),
    _Refusal(
        ("zero_optimization.stage",),
        lambda value: value not in (1, 2, 3),
        "its ZeRO stage is {value}. Set 'stage' in 'zero_optimization' to 1, 2 or 3, or train with DDP without "
        "DeepSpeed, which needs no attach_deepspeed.",
    ),
    _Refusal(("tensor_parallel.autotp_size", "sequence_parallel_size"), _more_than_one, PARALLEL),
    _Refusal(
        (
            # It reorders parameters, which DeepSpeed's mapping from parameters to partitions ignores.
            "zero_optimization.round_robin_gradients",
            "zero_optimization.elastic_checkpoint",
            "zero_optimization.zenflow",
            "zero_optimization.zero_quantized_weights",
            "zero_optimization.zero_quantized_gradients",
            "compile.deepcompile",
        ),
        bool,
        "the configuration has a setting that LoRA-Pro cannot follow. Remove {name!r} from {section!r}.",
    ),
    _Refusal(
        ("checkpoint.load_universal",),
        bool,
        "the configuration has a setting that LoRA-Pro cannot follow. Remove 'load_universal' from 'checkpoint': the "
        "moments of the pairs are not in universal checkpoints, and ordinary ones load on any number of processes.",
    ),
    _Refusal(
        ("zero_optimization.zero_hpz_partition_size",),
        _more_than_one,
        "its parameters are partitioned twice. Remove 'zero_hpz_partition_size' from 'zero_optimization'.",
    ),
    _Refusal(
        ("zero_optimization.compute_grad_norm",),
        lambda value: not value,
        "no norm of the gradients is taken. Remove 'compute_grad_norm' from 'zero_optimization'.",
    ),
    _Refusal(
        ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"),
        bool,
        "its master weights are not float32. Remove 'fp16_master_weights_and_grads' and "
        "'bf16_master_weights_and_grads'.",
    ),
)


def require_supported_engine(state: Any, remedy: str) -> None:
    """Raise a `RuntimeError` if accelerate runs Megatron-LM or FSDP1, or wraps layers for activation checkpointing.

    Args:
        state: an `Accelerator` or an `AcceleratorState`.
        remedy: an alternative, which follows "or" in the message.
    """
    name = getattr(state.distributed_type, "value", state.distributed_type)
    if name == "MEGATRON_LM":
        raise RuntimeError(
            f"LoRA-Pro does not support accelerate's distributed type {name}, which replaces the optimizer. Use DDP, "
            f"FSDP2 or DeepSpeed, or {remedy}."
        )
    plugin = getattr(state, "fsdp_plugin", None) or getattr(getattr(state, "state", None), "fsdp_plugin", None)
    if name == "FSDP" and getattr(plugin, "fsdp_version", 1) != 2:
        raise RuntimeError(
            "LoRA-Pro does not support FSDP1, which flattens the factors and cuts them at any place. Set "
            f"fsdp_version: 2 in accelerate's configuration (FSDP2), or {remedy}."
        )
    require_no_checkpoint_wrapper(plugin)


def require_configuration(config: Any, master_factors: bool) -> None:
    """Raise a `RuntimeError` if LoRA-Pro does not support a configuration of DeepSpeed.

    Args:
        config: a dictionary, whose sections may be objects with the settings as attributes.
        master_factors: the setting of LoRA-Pro.
    """
    for refusal in _REFUSALS:
        for setting in refusal.settings:
            value = _setting(config, setting)
            if value is not None and refusal.is_wrong(value):
                section, _, name = setting.rpartition(".")
                raise RuntimeError(BEFORE + refusal.reason.format(value=value, section=section, name=name))
    if reason := _precision(config, master_factors):
        raise RuntimeError(BEFORE + reason)


def _precision(config: Any, master_factors: bool) -> str | None:
    is_bfloat16, is_float16 = (_setting(config, f"{section}.enabled") for section in ("bf16", "fp16"))
    if master_factors and (is_bfloat16 or is_float16):
        return (
            "it keeps float32 masters of all parameters itself, so that master_factors=True would keep them twice. "
            "Leave master_factors out."
        )
    if is_bfloat16 and _setting(config, "bf16.check_grad_overflow") is False:
        return (
            "gradients that are not finite would be stepped. Remove 'check_grad_overflow' from the section 'bf16', "
            "which is true by default."
        )
    dtype = str(_setting(config, "torch_autocast.dtype")).removeprefix("torch.")
    if _setting(config, "torch_autocast.enabled") and dtype in ("fp16", "float16", "half"):
        return (
            "'torch_autocast' in float16 scales the loss inside the optimizer's step. Use bfloat16 there, or the "
            "section 'fp16'."
        )
    return None


def settle_clipping(plugin: Any, max_grad_norm: float | None) -> None:
    """Make DeepSpeed clip at `max_grad_norm`; call it before an engine is built from the configuration of the plugin.

    Raises:
        ValueError: the configuration states another value.
    """
    clipping = max_grad_norm or 0.0
    stated, settled = stated_clipping(plugin), getattr(plugin, "_lora_pro_clipping", None)
    if stated is None or stated == settled:  # an earlier training set it, not the user
        plugin._lora_pro_clipping = clipping
    elif stated != clipping:
        raise ValueError(
            f"DeepSpeed's configuration has gradient_clipping={stated:g}, and max_grad_norm is {clipping:g}. Write "
            f'"gradient_clipping": "auto" there, so that max_grad_norm counts, or give both the same value.'
        )
    plugin.deepspeed_config["gradient_clipping"] = clipping


def stated_clipping(plugin: Any) -> float | None:
    """The `gradient_clipping` of the user, `None` if there is none.

    accelerate does not write its own value into the configuration if it is 0, or if a file has no such entry.
    """
    for stated in (plugin.deepspeed_config.get("gradient_clipping"), plugin.gradient_clipping):
        if stated is not None and stated != "auto":
            return float(stated)
    return None


def _setting(config: Any, path: str) -> Any:
    """A setting by its path; `None` if it is missing or "auto"."""
    value = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    value = value.value if isinstance(value, Enum) else value
    return None if value == "auto" else value
