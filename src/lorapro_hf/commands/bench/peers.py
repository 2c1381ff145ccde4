"""How is each optimizer built for a task, what is missing for it, and how much memory does it keep?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn

from lorapro_hf.commands.bench.settings import BASELINE, METHODS, Method
from lorapro_hf.commands.bench.workloads import ALPHA
from lorapro_hf.optim.factory import create_lorapro_optimizer

RATE = 1e-5


class Adapted(Protocol):
    """What an optimizer is built for: a model with LoRA, its factors in the order A, B, A, B, and their rank."""

    model: PeftModel
    factors: list[nn.Parameter]

    @property
    def rank(self) -> int:
        """Rank of all factors."""


def missing(method: Method) -> str | None:
    """What to do for a method whose package is not installed, else `None`."""
    if method.package is None or importlib.util.find_spec(method.package) is not None:
        return None
    return f"not installed: pip install '{method.install}'"


def _adamw(task: Adapted) -> Any:
    return torch.optim.AdamW(task.factors, lr=RATE, weight_decay=0.0, fused=True)


def _adamw_package(mode: str) -> Callable[[Adapted], Any]:
    def build(task: Adapted) -> Any:
        from lora_pro import LoRAProAdamW

        # `eig`, because the default solver of that package solves another equation
        settings = {"lr": RATE, "weight_decay": 0.0, "lorapro_mode": mode, "efficient_solver": "eig"}
        return LoRAProAdamW(task.model, **settings)

    return build


def _riemannian(task: Adapted) -> Any:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(task.model, torch.optim.AdamW, lr=RATE, weight_decay=0.0)


def _lorafa(task: Adapted) -> Any:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(task.model, r=task.rank, lora_alpha=ALPHA, lr=RATE)


def _lorarite(task: Adapted) -> Any:
    from pytorch_optimizer import LoRARite

    return LoRARite(task.factors, lr=RATE)  # in the order A, B, A, B, as it wants them


_BUILDERS: Mapping[str, Callable[[Adapted], Any]] = {
    BASELINE: _adamw,
    "adamw_efficient": _adamw_package("efficient"),
    "adamw_full": _adamw_package("full"),
    "riemannian": _riemannian,
    "lorafa": _lorafa,
    "lorarite": _lorarite,
}


def build_optimizer(name: str, task: Adapted) -> Any:
    """The optimizer of that name for the factors of `task`; whatever it is, it has `step()`."""
    mode = METHODS[name].mode
    if mode is not None:
        return create_lorapro_optimizer(task.model, lr=RATE, config={"mode": mode})
    return _BUILDERS[name](task)
