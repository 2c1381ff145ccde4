"""Which engines of DeepSpeed are refused?"""

from __future__ import annotations

from typing import Any

from lorapro_hf.distributed.engines import BEFORE, PARALLEL, require_configuration, stated_clipping
from lorapro_hf.distributed.zero import ZERO_OPTIMIZERS
from lorapro_hf.factors.wrappers import plugin_in_use
from lorapro_hf.optim.lora_pro import LoRAProAdamW
from lorapro_hf.utils.private_names import private


def require_supported(engine: Any, optimizer: Any) -> None:
    """Raise the `TypeError` or `RuntimeError` of `attach_deepspeed` if LoRA-Pro does not support an engine."""
    if not isinstance(engine, private("deepspeed.runtime.engine", "DeepSpeedEngine")):
        raise TypeError(
            f"attach_deepspeed needs the DeepSpeed engine, got a {type(engine).__name__}: pass what "
            "deepspeed.initialize(...) or accelerator.prepare(...) returned in the model's place."
        )
    config = getattr(optimizer, "config", None)
    require_configuration(_settings(engine), master_factors=getattr(config, "master_factors", False))
    reason = (  # each relies on the checks before it
        _other_optimizer(engine, optimizer)
        or _layout(engine)
        or _clipping(engine, optimizer)
        or _groups(optimizer)
        or _factors(engine, optimizer)
    )
    if reason:
        raise RuntimeError(BEFORE + reason)


def _settings(engine: Any) -> dict[str, Any]:
    """The configuration of an engine, with DeepSpeed's defaults filled in."""
    config = private(engine, "_config")
    return {
        **private(config, "_param_dict"),
        "zero_optimization": private(config, "zero_config"),
        "fp16": private(config, "float16_config"),
        "bf16": private(config, "bfloat16_config"),
        "compile": private(config, "compile_config"),
        "tensor_parallel": private(config, "tensor_parallel_config"),
    }


def _other_optimizer(engine: Any, optimizer: Any) -> str | None:
    basic = private(engine, "basic_optimizer")
    if isinstance(optimizer, LoRAProAdamW) and basic is optimizer:
        return None
    stepped = type(basic or engine.optimizer).__name__
    given = "another one" if stepped == type(optimizer).__name__ else f"a {type(optimizer).__name__}"
    return (
        f"the engine steps a {stepped}, and attach_deepspeed was given {given}. Pass one and the same LoRAProAdamW to "
        "deepspeed.initialize (or accelerator.prepare) and to attach_deepspeed, and remove 'optimizer' and "
        "'offload_optimizer' from the configuration."
    )


def _layout(engine: Any) -> str | None:
    known = tuple(private(module, name) for name, (module, _, _) in ZERO_OPTIMIZERS.items())
    if type(engine.optimizer) not in known:
        return (
            f"its ZeRO optimizer is a {type(engine.optimizer).__name__} (ZenFlow, MiCS, SuperOffload or the like). "
            "Leave such sections out of 'zero_optimization'."
        )
    has_experts, pipeline, mpu = (private(engine, name) for name in ("has_moe_layers", "pipeline_parallelism", "mpu"))
    return PARALLEL if has_experts or pipeline or mpu is not None else None


def _clipping(engine: Any, optimizer: LoRAProAdamW) -> str | None:
    plugin, used = plugin_in_use("deepspeed_plugin"), private(engine.optimizer, "clip_grad") or 0.0
    if used and not optimizer.rule.takes_clipped_gradients:
        return (
            f"gradient_clipping={used:g} clips the raw gradients of the factors, after which a step of mode "
            f'{optimizer.rule.name!r} depends on how B A is split. Set "gradient_clipping": 0 in the configuration: '
            "the mode has limits of its own."
        )
    stated = None if plugin is None else stated_clipping(plugin)
    if stated is None or stated == used:
        return None
    return (
        f"gradient_clipping={stated:g} was handed to accelerate, which has left it out, so that DeepSpeed clips at "
        f'{used:g}. Write "gradient_clipping": {stated:g} into a DeepSpeed configuration file and hand that to '
        "accelerate (deepspeed_config_file)."
    )


def _groups(optimizer: LoRAProAdamW) -> str | None:
    held: dict[int, int] = {}
    for pair in optimizer.pairs:
        for position in optimizer.group_positions(pair):
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


def _factors(engine: Any, optimizer: LoRAProAdamW) -> str | None:
    _, groups, _ = ZERO_OPTIMIZERS[type(engine.optimizer).__name__]
    trained = {id(parameter) for group in private(engine.optimizer, groups) for parameter in group}
    for pair in optimizer.pairs:
        if pair.tied_parameters:
            return (
                f"{pair.name} shares its factors in memory with another layer, which ZeRO parts. Train with DDP, or "
                "leave one of the layers out of target_modules."
            )
        if any(id(factor) not in trained or not factor.requires_grad for factor in (pair.A, pair.B)):
            return (
                f"the factors of {pair.name} are not among the parameters that the engine trains. Build the optimizer "
                "and the engine again after changing requires_grad or the active adapter."
            )
    return None
