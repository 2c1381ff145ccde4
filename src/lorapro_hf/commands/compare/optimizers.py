"""How is the optimizer of a method built for a model?"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW, Optimizer

from lorapro_hf.commands.compare.methods import ComparedMethod
from lorapro_hf.factors.pairs import find_lora_pairs
from lorapro_hf.optim.factory import create_lorapro_optimizer
from lorapro_hf.options import UsageError

Builder = Callable[..., Any]


def _adamw(model: nn.Module, lr: float, **settings: Any) -> Any:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def _loraplus(model: nn.Module, lr: float, **settings: Any) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, AdamW, lr=lr, **settings)


def _lorafa(model: nn.Module, lr: float, **settings: Any) -> Any:
    from peft.optimizers import create_lorafa_optimizer

    model_of: Any = model
    config = model_of.peft_config["default"]
    return create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=lr, **settings)


def _riemannian(model: nn.Module, lr: float, **settings: Any) -> Any:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, AdamW, lr=lr, **settings)


def _lorarite(model: nn.Module, lr: float, **settings: Any) -> Any:
    from pytorch_optimizer import LoRARite

    unknown = sorted(set(settings) - set(inspect.signature(LoRARite.__init__).parameters))
    if unknown:  # it would ignore them
        raise UsageError(f"LoRARite does not know {unknown}")
    # in the order A, B, A, B, as it wants them
    return LoRARite([factor for pair in find_lora_pairs(model) for factor in (pair.A, pair.B)], lr=lr, **settings)


def _lorapro(model: nn.Module, lr: float, **settings: Any) -> Any:
    return create_lorapro_optimizer(model, lr=lr, config=settings)


# AdamW's settings for all methods; LoRA-FA and LoRA-RITE bring steps of their own, without decay by default too.
_ADAMW: Mapping[str, Any] = {"weight_decay": 0.0, "fused": True}
BUILDERS: Mapping[str, tuple[Builder, Mapping[str, Any]]] = {
    "adamw": (_adamw, _ADAMW),
    "loraplus": (_loraplus, {"fused": True}),
    "lorafa": (_lorafa, {}),
    "riemannian": (_riemannian, _ADAMW),
    "lorarite": (_lorarite, {}),
    "lorapro": (_lorapro, {}),
}


def build_optimizer(method: ComparedMethod, model: nn.Module, learning_rate: float) -> Optimizer:
    """The optimizer of `method` for the trainable parameters of `model`, without weight decay unless it asks for some.

    Betas are (0.9, 0.999) for all; epsilon is each library's own.
    """
    build, defaults = BUILDERS[method.optimizer]
    optimizer: Optimizer = build(model, learning_rate, **{**defaults, **method.settings})
    return optimizer


def require_usable(method: ComparedMethod, device: torch.device) -> None:
    """Try the optimizer of a method on one tiny layer, before hours are spent on others.

    Raises:
        UsageError: a package is missing, or the optimizer refuses its settings or the device.
    """
    if method.package is not None and importlib.util.find_spec(method.package) is None:
        raise UsageError(
            f"Method {method.name} needs a package that is not installed: pip install '{method.install}', or leave the "
            "method out."
        )
    layer = nn.Sequential(nn.Linear(2, 2, bias=False, device=device))
    try:
        build_optimizer(method, get_peft_model(layer, LoraConfig(r=1, target_modules=["0"])), 1e-3)
    except Exception as error:
        raise UsageError(
            f"Method {method.name}: its optimizer cannot be built with {dict(method.settings)}: {error} (YAML reads "
            "numbers with a point only, such as 1.0e-8)."
        ) from error
