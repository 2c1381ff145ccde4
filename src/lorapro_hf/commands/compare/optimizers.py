"""How is the optimizer of a method built for a model?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lorapro_hf.commands.compare.methods import Method
from lorapro_hf.factors.pairs import find_lora_pairs
from lorapro_hf.optim.factory import create_lorapro_optimizer

Builder = Callable[..., Any]


def _adamw(model: nn.Module, lr: float, **settings: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def _loraplus(model: nn.Module, lr: float, **settings: Any) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, **settings)


def _lorafa(model: nn.Module, lr: float, **settings: Any) -> Any:
    from peft.optimizers import create_lorafa_optimizer

    model_of: Any = model
    config = model_of.peft_config["default"]
    return create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=lr, **settings)


def _riemannian(model: nn.Module, lr: float, **settings: Any) -> Any:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, **settings)


def _lorarite(model: nn.Module, lr: float, **settings: Any) -> Any:
    from pytorch_optimizer import LoRARite

    # in the order A, B, A, B, as it wants them
    return LoRARite([factor for pair in find_lora_pairs(model) for factor in (pair.A, pair.B)], lr=lr, **settings)


def _lorapro(model: nn.Module, lr: float, **settings: Any) -> Any:
    return create_lorapro_optimizer(model, lr=lr, config=settings)


# What AdamW is for everyone here; LoRA-FA and LoRA-RITE bring steps of their own, without decay by default too.
_ADAMW: Mapping[str, Any] = {"weight_decay": 0.0, "fused": True}
BUILDERS: Mapping[str, tuple[Builder, Mapping[str, Any]]] = {
    "adamw": (_adamw, _ADAMW),
    "loraplus": (_loraplus, {"fused": True}),
    "lorafa": (_lorafa, {}),
    "riemannian": (_riemannian, _ADAMW),
    "lorarite": (_lorarite, {}),
    "lorapro": (_lorapro, {}),
}


def build_optimizer(method: Method, model: nn.Module, learning_rate: float) -> Optimizer:
    """The optimizer of `method` for the trainable parameters of `model`, without weight decay unless it asks for some.

    Betas are (0.9, 0.999) for all; epsilon is each library's own.
    """
    build, defaults = BUILDERS[method.optimizer]
    optimizer: Optimizer = build(model, learning_rate, **{**defaults, **method.settings})
    return optimizer
