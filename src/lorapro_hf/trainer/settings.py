"""Which settings of LoRA-Pro does a `Trainer` run with, and which of its other settings would be ignored?"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.engines import require_supported_engine
from lorapro_hf.optim.factory import LoRAProOptimizerFactory, create_lorapro_optimizer, take_settings
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.trainer.arguments import LoRAProTrainingArguments, settle_max_grad_norm
from lorapro_hf.trainer.callback import LoRAProCallback
from lorapro_hf.trainer.parents import groups_beside
from lorapro_hf.utils.private_names import METHODS_OF_TRAINER, private

TURN_OFF = "turn LoRA-Pro off with LoRAProTrainingArguments(lora_pro=False) or --no_lora_pro"
_REMEDY = f"or {TURN_OFF}, or add LoRAProCallback to a plain Trainer, which works with any optimizer"
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def resolve_config(trainer: Any, stated: LoRAProConfig | None) -> LoRAProConfig | None:
    """The settings that a trainer runs with; `None` while LoRA-Pro is off.

    Args:
        trainer: a `Trainer`.
        stated: its `lora_pro_config=`.

    Raises:
        ValueError: settings contradict each other or would be ignored.
        RuntimeError: an engine that LoRA-Pro does not support runs.
    """
    if isinstance(trainer.args, LoRAProTrainingArguments):
        if stated is not None:
            raise ValueError(
                "LoRA-Pro got its settings twice: LoRAProTrainingArguments and lora_pro_config=. Set lora_pro_mode "
                "and the like there and drop lora_pro_config=, or pass plain TrainingArguments."
            )
        if not trainer.args.lora_pro:
            return None
        stated = trainer.args.lora_pro_config
    for name in METHODS_OF_TRAINER:
        private(Trainer, name)  # an override of a name that the parent has dropped is never called
    require_supported_engine(trainer.accelerator, TURN_OFF)
    _refuse_other_optimizers(trainer)
    if any(isinstance(callback, LoRAProCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            "LoRAProCallback and LoRAProTrainer's own optimizer would project the gradients twice. Drop the "
            f"callback, or {TURN_OFF}."
        )
    given, source = None, "optimizers="
    optimizer = unwrap_optimizer(trainer.optimizer)
    if isinstance(optimizer, LoRAProAdamW):
        given = optimizer.config
    elif trainer.optimizer_cls_and_kwargs is not None:
        given, source = take_settings(trainer.optimizer_cls_and_kwargs[1])[0], "optimizer_cls_and_kwargs="
    if given is not None and stated is not None and given != stated:
        raise ValueError(
            f"{source} was built with {given}, but the trainer was told {stated}. State the settings once: drop "
            f"{source} or give both the same."
        )
    config = stated or given or LoRAProConfig()
    settle_max_grad_norm(trainer.args, config)  # also refuses settings that have no meaning in the mode
    return config


def _refuse_other_optimizers(trainer: Any) -> None:
    """Raise if the user's settings name an optimizer that LoRA-Pro would replace."""
    # the last is one of sentence-transformers
    for name in ("optim", "optim_args", "optim_target_modules", "learning_rate_mapping"):
        value = getattr(trainer.args, name, None)
        value = getattr(value, "value", value)
        if value and not (name == "optim" and value in _ADAMW):
            raise ValueError(
                f"{name}={value!r} would be ignored: LoRA-Pro brings its own AdamW. Leave {name} "
                f"{'at its default' if name == 'optim' else 'unset'}, {_REMEDY}."
            )
    given = unwrap_optimizer(trainer.optimizer)
    if given is not None and not isinstance(given, LoRAProAdamW):
        raise ValueError(
            f"optimizers= holds a {type(given).__name__}, which LoRA-Pro would not reach. Drop it, pass a "
            f"LoRAProAdamW, {_REMEDY}."
        )
    if trainer.optimizer_cls_and_kwargs is not None:
        factory = trainer.optimizer_cls_and_kwargs[0]
        if not (isinstance(factory, type) and issubclass(factory, LoRAProOptimizerFactory)):
            raise ValueError(
                f"optimizer_cls_and_kwargs= names {getattr(factory, '__name__', repr(factory))}, which LoRA-Pro would "
                f"not reach. Drop it, pass LoRAProOptimizerFactory, {_REMEDY}."
            )


def build_optimizer(trainer: Any, model: nn.Module, config: LoRAProConfig) -> LoRAProAdamW:
    """The optimizer of a trainer's arguments or factory, with a group for each that lies beside the model."""
    args = trainer.args
    settings = {"check_memory": getattr(args, "lora_pro_check_memory", True), "saved_collectively": True}
    if trainer.optimizer_cls_and_kwargs is not None:  # not the parent's work: transformers 4 knows no factories
        factory, given = trainer.optimizer_cls_and_kwargs
        optimizer: LoRAProAdamW = factory()(model, config=config, **{**settings, **take_settings(given)[1]})
    else:
        optimizer = create_lorapro_optimizer(
            model,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            config=config,
            decay_parameters=trainer.get_decay_parameter_names(model),
            **settings,
        )
    for group in groups_beside(trainer, model):
        optimizer.add_param_group(group)
    return optimizer
