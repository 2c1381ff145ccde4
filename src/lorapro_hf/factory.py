"""How is LoRA-Pro's optimizer built for a model, by hand or by a `Trainer`?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.memory import require_state_fits
from lorapro_hf.optimizer import LoRAProAdamW
from lorapro_hf.pairs import find_lora_pairs


def create_lorapro_optimizer(
    model: nn.Module,
    *,
    lr: float,
    config: LoRAProConfig | Mapping[str, Any] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_parameters: Collection[str] | None = None,
    check_memory: bool = True,
) -> LoRAProAdamW:
    """LoRA-Pro's optimizer for a PEFT model, with one group that decays and one (biases and norms) that does not.

    Args:
        model: a model with trainable LoRA adapters, already on its device.
        lr: learning rate; that of LoRA in mode `"efficient"`, that of full fine-tuning in the others.
        config: `LoRAProConfig`, a dictionary of its settings, or `None` for the default.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay of the first group.
        decay_parameters: names of the parameters that decay; by default all but biases and parameters of norms.
        check_memory: refuse a mode whose state cannot fit into the memory that its devices have left.

    Raises:
        ValueError: the model has no trainable LoRA pair, or a setting is out of range.
        StateTooLargeError: the state cannot fit; a `ValueError` too. It names the modes that would.
    """
    config = LoRAProConfig.of(config)
    pairs = find_lora_pairs(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if decay_parameters is None:
        decay_parameters = _decaying_names(model)
    decaying = [(name, parameter) for name, parameter in trainable if name in decay_parameters]
    others = [(name, parameter) for name, parameter in trainable if name not in decay_parameters]
    groups = [
        {"params": named, "weight_decay": decay} for named, decay in ((decaying, weight_decay), (others, 0.0)) if named
    ]
    if check_memory:
        of_pairs = {id(p) for pair in pairs for p in (pair.A, pair.B, *pair.tied_parameters)}
        require_state_fits(pairs, config, [p for _, p in trainable if id(p) not in of_pairs])
    return LoRAProAdamW(groups, pairs, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, config=config)


class LoRAProOptimizerFactory:
    """`create_lorapro_optimizer` as a factory: `Trainer(optimizer_cls_and_kwargs=(LoRAProOptimizerFactory, {...}))`.

    The learning rate goes into the dictionary: `Trainer` passes none of its arguments on to a factory.
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> LoRAProAdamW:
        """Build the optimizer; `kwargs` as in `create_lorapro_optimizer`.

        Raises:
            ValueError: `lr` is missing, or as in `create_lorapro_optimizer`.
        """
        if "lr" not in kwargs:
            raise ValueError(
                "LoRAProOptimizerFactory needs the learning rate: Trainer passes none on to an optimizer factory. Use "
                'optimizer_cls_and_kwargs=(LoRAProOptimizerFactory, {"lr": args.learning_rate}).'
            )
        return create_lorapro_optimizer(model, **kwargs)


def _decaying_names(model: nn.Module) -> set[str]:
    """Names of all parameters but biases and those of normalisation layers."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if not name.endswith("bias") and "norm" not in type(module).__name__.lower()
    }
