"""Which settings of a DeepSpeed engine would make LoRA-Pro wrong, or are not known to be right?"""

from __future__ import annotations

from typing import Any

import torch

from lorapro_hf.optimizer import LoRAProAdamW

_BEFORE = "DeepSpeed would train without LoRA-Pro or wrongly: "


def require_supported(engine: Any, optimizer: Any) -> None:
    """Raise unless LoRA-Pro is known to be right under this engine.

    Raises:
        TypeError: `engine` is no DeepSpeed engine.
        RuntimeError: the engine steps another optimizer or has a setting that is not supported; with the remedy.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"attach_deepspeed needs the DeepSpeed engine, got a {type(engine).__name__}: pass what "
            "deepspeed.initialize(...) or accelerator.prepare(...) returned in the model's place."
        )
    for reason in (_other_optimizer(engine, optimizer), _layout(engine), _settings(engine)):
        if reason:
            raise RuntimeError(_BEFORE + reason)
    for reason in (_precision(engine, optimizer), _groups(optimizer), _factors(optimizer)):
        if reason:
            raise RuntimeError(_BEFORE + reason)


def _other_optimizer(engine: Any, optimizer: Any) -> str | None:
    named = engine._config.optimizer_name  # the engine's own answer is the class that it was given
    if named:
        return (
            f"the configuration's section 'optimizer' names {named!r}. Remove that section and pass "
            "the LoRAProAdamW to deepspeed.initialize or accelerator.prepare."
        )
    zero = engine.optimizer
    if any(getattr(zero, name, False) for name in ("cpu_offload", "offload_optimizer", "offload_param")):
        return (
            "the optimizer or the parameters are offloaded, for which DeepSpeed or accelerate replace the optimizer. "
            "Remove 'offload_optimizer' and 'offload_param' from 'zero_optimization'; mode 'factored' or 'efficient' "
            "needs little memory."
        )
    if not isinstance(optimizer, LoRAProAdamW) or engine.basic_optimizer is not optimizer:
        stepped = type(engine.basic_optimizer or engine.optimizer).__name__
        given = "another one" if stepped == type(optimizer).__name__ else f"a {type(optimizer).__name__}"
        return (
            f"the engine steps a {stepped}, and attach_deepspeed was given {given}. Pass one and the same LoRAProAdamW "
            "to deepspeed.initialize (or accelerator.prepare) and to attach_deepspeed, and remove 'optimizer' and "
            "'offload_optimizer' from the configuration."
        )
    return None


def _layout(engine: Any) -> str | None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    stage = int(engine.zero_optimization_stage())
    if stage not in (1, 2, 3):
        return (
            f"its ZeRO stage is {stage}. Set 'stage' in 'zero_optimization' to 1, 2 or 3, or train with DDP without "
            "DeepSpeed, which needs no attach_deepspeed."
        )
    if type(engine.optimizer) not in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer):
        return (
            f"its ZeRO optimizer is a {type(engine.optimizer).__name__} (ZenFlow, MiCS, SuperOffload or the like). "
            "Leave such sections out of 'zero_optimization'."
        )
    parallel = engine.pipeline_parallelism or engine.has_moe_layers or engine.mpu is not None
    if parallel or (_value(engine, "autotp_size") or 0) > 1:
        return (
            "it combines ZeRO with pipeline, tensor, sequence or expert parallelism (mpu), which is not supported. Use "
            "ZeRO alone, with all processes data-parallel."
        )
    return None


def _settings(engine: Any) -> str | None:
    remedies = {
        # DeepSpeed's mapping from parameters to partitions ignores the other order that this gives them.
        "zero_round_robin_gradients": "'round_robin_gradients' from 'zero_optimization'",
        "zero_elastic_checkpoint": "'elastic_checkpoint' from 'zero_optimization'",
        "load_universal_checkpoint": "'load_universal' from 'checkpoint': the moments of the pairs are not in "
        "universal checkpoints, and ordinary ones load on any number of processes",
        "zero_quantized_weights": "'zero_quantized_weights' from 'zero_optimization'",
        "zero_quantized_gradients": "'zero_quantized_gradients' from 'zero_optimization'",
        "is_deepcompile_enabled": "'compile': {'deepcompile': ...}",
    }
    for name, remedy in remedies.items():
        if _value(engine, name):
            return f"the configuration has a setting that LoRA-Pro cannot follow. Remove {remedy}."
    if (_value(engine, "zero_hpz_partition_size") or 1) > 1:
        return "its parameters are partitioned twice. Remove 'zero_hpz_partition_size' from 'zero_optimization'."
    if _value(engine, "zero_compute_grad_norm") is False:
        return "no norm of the gradients is taken. Remove 'compute_grad_norm' from 'zero_optimization'."
    return None


def _precision(engine: Any, optimizer: LoRAProAdamW) -> str | None:
    zero = engine.optimizer
    if optimizer.config.master_factors and (engine.bfloat16_enabled() or engine.fp16_enabled()):
        return (
            "it keeps float32 masters of all parameters itself, so that master_factors=True would keep them twice. "
            "Leave master_factors out."
        )
    if getattr(zero, "master_weights_and_grads_dtype", torch.float32) != torch.float32:
        return (
            "its master weights are not float32. Remove 'fp16_master_weights_and_grads' and "
            "'bf16_master_weights_and_grads'."
        )
    if engine.bfloat16_enabled() and not getattr(engine._config.bfloat16_config, "check_grad_overflow", True):
        return (
            "gradients that are not finite would be stepped. Remove 'check_grad_overflow' from the section 'bf16', "
            "which is true by default."
        )
    if getattr(zero, "torch_autocast_gradscaler", None) is not None:
        return (
            "'torch_autocast' in float16 scales the loss inside the optimizer's step. Use bfloat16 there, or the "
            "section 'fp16'."
        )
    return None


def _groups(optimizer: LoRAProAdamW) -> str | None:
    held: dict[int, int] = {}
    for pair in optimizer.pairs:
        for position in optimizer._positions[id(pair)]:
            held[position] = held.get(position, 0) + 1
    for position, group in enumerate(optimizer.param_groups):
        expected = len(group["param_shapes"]) if group.get("lora_pro_factors") else 0
        if held.get(position, 0) != expected:
            return (
                f"param group {position} of the optimizer mixes factors with other parameters, which ZeRO flattens "
                "into one tensor. Build it with create_lorapro_optimizer or LoRAProOptimizerFactory, or put the "
                "factors into groups of their own that have 'lora_pro_factors': True."
            )
    return None


def _factors(optimizer: LoRAProAdamW) -> str | None:
    for pair in optimizer.pairs:
        if pair.tied_parameters:
            return (
                f"{pair.name} shares its factors in memory with another layer, which ZeRO parts. Train with DDP, or "
                "leave one of the layers out of target_modules."
            )
        for factor in (pair.A, pair.B):
            if not (hasattr(factor, "_hp_mapping") or hasattr(factor, "ds_id")) or not factor.requires_grad:
                return (
                    f"the factors of {pair.name} are not among the parameters that the engine trains. Build the "
                    "optimizer and the engine again after changing requires_grad or the active adapter."
                )
    return None


def _value(engine: Any, name: str) -> Any:
    """What a method of the engine says about its configuration; None where this DeepSpeed knows nothing of the kind."""
    method = getattr(type(engine), name, None)
    return None if method is None else method(engine)
