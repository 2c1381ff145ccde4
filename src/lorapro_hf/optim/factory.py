"""How is LoRA-Pro's optimizer built for a model, in a loop or by a `Trainer`?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import access_to, local
from lorapro_hf.distributed.engines import require_configuration
from lorapro_hf.distributed.ownership import everyone, share_pairs
from lorapro_hf.factors.pairs import find_lora_pairs
from lorapro_hf.factors.wrappers import plugin_in_use, require_plain_modules
from lorapro_hf.optim.lora_pro import LoRAProAdamW
from lorapro_hf.optim.memory import require_state_fits


def create_lorapro_optimizer(
    model: nn.Module,
    lr: float,
    *,
    config: LoRAProConfig | Mapping[str, Any] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_parameters: Collection[str] | None = None,
    check_memory: bool = True,
    saved_collectively: bool = False,
    **settings: Any,
) -> LoRAProAdamW:
    """Build LoRA-Pro's optimizer for a PEFT model, with groups that decay and groups (biases, norms) that do not.

    Factors are in groups of their own. Example: `create_lorapro_optimizer(model, lr=2e-4)`.

    Args:
        model: a model with trainable LoRA adapters, already on its device.
        lr: the rate: of LoRA, but in modes `"full"`, `"full_8bit"` and `"factored"` of full fine-tuning.
        config: `LoRAProConfig`, a dictionary of its settings, or `None` for the default.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay of the first group.
        decay_parameters: names of the parameters that decay; by default all but biases and parameters of norms.
        check_memory: refuse a mode whose state cannot fit into the memory that its devices have left.
        saved_collectively: whether all ranks call `consolidate_state_dict()` or `state_dict()` when the state is saved,
            so that ranks may share it unless the config says otherwise.
        **settings: single settings in the place of `config`, as above.

    Raises:
        ValueError: the model has no trainable LoRA pair, or a setting is unknown, out of range or given twice.
        StateTooLargeError: the state cannot fit; a `ValueError` too. It names the modes that would.
        RuntimeError: accelerate runs DeepSpeed in a configuration that LoRA-Pro does not support.
    """
    config = LoRAProConfig.of(config, **settings)
    plugin = plugin_in_use("deepspeed_plugin")
    if plugin is not None:
        require_configuration(plugin.deepspeed_config, config.master_factors)
    pairs = find_lora_pairs(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if decay_parameters is None:
        decay_parameters = _decaying_names(model)
    of_pairs = {id(p) for pair in pairs for p in (pair.A, pair.B, *pair.tied_parameters)}
    groups = []
    for are_factors in (True, False):
        for decay in (True, False):
            named = [
                (name, p)
                for name, p in trainable
                if (id(p) in of_pairs) == are_factors and (name in decay_parameters) == decay
            ]
            group = {"params": named, "weight_decay": weight_decay if decay else 0.0, "lora_pro_factors": are_factors}
            groups += [group] if named else []
    if check_memory:
        own = share_pairs(pairs, access_to(pairs, everyone()), config.shard_states, saved_collectively).owned
        require_state_fits(own, config, [local(p) for _, p in trainable if id(p) not in of_pairs])
    optimizer = LoRAProAdamW(groups, pairs, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, config=config)
    optimizer.saved_collectively = saved_collectively
    return optimizer


class LoRAProOptimizerFactory:
    """`create_lorapro_optimizer` as a factory: `Trainer(optimizer_cls_and_kwargs=(LoRAProOptimizerFactory, {...}))`.

    The dictionary must hold the learning rate: `Trainer` passes none of its arguments to a factory.

    Raises:
        TypeError: it is called as if it were an optimizer, as `Trainer` does before transformers 5.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            raise TypeError(
                "LoRAProOptimizerFactory makes an optimizer from a model and takes no parameters itself. A plain "
                "Trainer knows such factories from transformers 5 on; with an older one use LoRAProTrainer, or pass "
                "optimizers=(create_lorapro_optimizer(model, lr=...), None)."
            )

    def __call__(self, model: nn.Module, **kwargs: Any) -> LoRAProAdamW:
        """Build the optimizer; `kwargs` as in `create_lorapro_optimizer`.

        Raises:
            ValueError: `lr` is missing, ranks would share a state that no checkpoint collects, a part of the model is
                wrapped, or as in `create_lorapro_optimizer`.
        """
        if "lr" not in kwargs:
            raise ValueError(
                "LoRAProOptimizerFactory needs the learning rate: Trainer passes none on to an optimizer factory. Use "
                'optimizer_cls_and_kwargs=(LoRAProOptimizerFactory, {"lr": args.learning_rate}).'
            )
        require_plain_modules(model)
        config, others = take_settings(kwargs)
        collected = others.get("saved_collectively", False)
        if config is not None and config.shard_states and not collected and everyone() is not None:
            raise ValueError(
                "shard_states=True needs a trainer that collects the state of all ranks when it saves, which a plain "
                "Trainer does not: it asks rank 0 alone. Use LoRAProTrainer (or LoRAProTrainerMixin), or leave "
                "shard_states out."
            )
        return create_lorapro_optimizer(model, config=config, **others)


def take_settings(kwargs: Mapping[str, Any]) -> tuple[LoRAProConfig | None, dict[str, Any]]:
    """Split keywords of `create_lorapro_optimizer` into settings of LoRA-Pro (`None` without any) and the others.

    Raises:
        ValueError: a setting is out of range or given twice.
    """
    settings = {name: value for name, value in kwargs.items() if name in LoRAProConfig.__dataclass_fields__}
    others = {name: value for name, value in kwargs.items() if name not in settings and name != "config"}
    given = kwargs.get("config")
    return (None if given is None and not settings else LoRAProConfig.of(given, **settings)), others


def _decaying_names(model: nn.Module) -> set[str]:
    """The names of all parameters except biases and parameters of normalisation layers."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if not name.endswith("bias") and "norm" not in type(module).__name__.lower()
    }
