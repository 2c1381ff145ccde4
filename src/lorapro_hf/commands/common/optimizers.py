"""How are the optimizers built that commands compare?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from peft import optimizers as peft_optimizers
from torch import nn
from torch.optim import AdamW

from lorapro_hf.factors.pairs import find_lora_pairs
from lorapro_hf.optim.factory import create_lorapro_optimizer
from lorapro_hf.options import UsageError


def _adamw(model: nn.Module, lr: float, **settings: Any) -> Any:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def _loraplus(model: Any, lr: float, **settings: Any) -> Any:
    return peft_optimizers.create_loraplus_optimizer(model, AdamW, lr=lr, **settings)


def _lorafa(model: Any, lr: float, **settings: Any) -> Any:
    config = model.peft_config["default"]
    return peft_optimizers.create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=lr, **settings)


def _riemannian(model: Any, lr: float, **settings: Any) -> Any:
    if not hasattr(peft_optimizers, "create_riemannian_optimizer"):
        raise UsageError("the optimizer riemannian needs a newer peft: pip install -U peft.")
    return peft_optimizers.create_riemannian_optimizer(model, AdamW, lr=lr, **settings)


def _lorarite(model: nn.Module, lr: float, **settings: Any) -> Any:
    from pytorch_optimizer import LoRARite

    unknown = sorted(set(settings) - set(inspect.signature(LoRARite.__init__).parameters))
    if unknown:  # it would ignore them
        raise UsageError(f"LoRARite does not know the settings {unknown}: leave them out.")
    # it takes the factors in the order A, B, A, B
    return LoRARite([factor for pair in find_lora_pairs(model) for factor in (pair.A, pair.B)], lr=lr, **settings)


def _lorapro(model: nn.Module, lr: float, **settings: Any) -> Any:
    return create_lorapro_optimizer(model, lr=lr, config=settings)


def _lora_pro_adamw(model: nn.Module, lr: float, **settings: Any) -> Any:
    from lora_pro import LoRAProAdamW

    # the default solver of that package solves another equation than the paper's
    return LoRAProAdamW(model, lr=lr, weight_decay=0.0, efficient_solver="eig", **settings)


_ADAMW: Mapping[str, Any] = {"weight_decay": 0.0, "fused": True}
# The function that builds each optimizer, and its defaults. None decays weights by default.
BUILDERS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "adamw": (_adamw, _ADAMW),
    "loraplus": (_loraplus, {"fused": True}),
    "lorafa": (_lorafa, {}),
    "riemannian": (_riemannian, _ADAMW),
    "lorarite": (_lorarite, {}),
    "lorapro": (_lorapro, {}),
    "lora_pro_adamw": (_lora_pro_adamw, {}),
}


def build(name: str, model: nn.Module, learning_rate: float, settings: Mapping[str, Any]) -> Any:
    """The optimizer of that name for the trainable parameters of `model`.

    Betas are (0.9, 0.999) for all; epsilon is each library's own.
    """
    builder, defaults = BUILDERS[name]
    return builder(model, learning_rate, **{**defaults, **settings})
