"""What a row of the support table is, and how the usual ones are built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import support_models as models
from lora_layers import Net, Row
from lorapro_hf.config import MODES
from trainer_helpers import VOCABULARY

COLUMNS = (*MODES, "callback")


@dataclass
class Case(Row):
    """A row of the table.

    Args:
        ordinary: what is trained beside the factors, by plain AdamW; with a part of those parameters' names.
        refused: for columns in which it is refused, a pattern of the message.
        note: what the reader should know, or why it is refused.
        how: makes the adapted model from the base and the settings.
        config: settings of LoRA-Pro.
        lr: learning rate.
        reload: how the adapter is saved and loaded: `"plain"`, `"converted"` to one that fits the untouched base, as
            PEFT does for initializations that change it, or `""`, where PEFT has no way that works here.
        within: a context that the model needs when it is called.
        since: the oldest PEFT that knows it, for what cannot be seen from the settings.
    """

    ordinary: tuple[str, str] | None = None
    refused: dict[str, str] = field(default_factory=dict)
    note: str = ""
    how: Callable[[nn.Module, LoraConfig], PeftModel] = get_peft_model
    config: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    reload: str = "plain"
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    since: str = ""

    def build(self, **settings: Any) -> PeftModel:
        made = {name: value() if callable(value) else value for name, value in self.settings.items()}
        return replaced(self, settings=made).build(**settings) if made != self.settings else super().build(**settings)

    def adapt(self, model: nn.Module, config: LoraConfig) -> PeftModel:
        return self.how(model, config)

    def output(self, model: nn.Module) -> torch.Tensor:
        with self.within():
            return super().output(model)


def replaced(case: Row, **changes: Any) -> Case:
    return Case(**{**{f.name: getattr(case, f.name) for f in fields(case)}, **changes})


def everywhere(pattern: str) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, pattern)


def linear(name: str, settings: dict[str, Any] | None = None, **more: Any) -> Case:
    return Case(name, lambda: Net(nn.Linear(6, 5)), settings or {}, **more)


def token_ids() -> torch.Tensor:
    return torch.arange(16).view(2, 8) * 5 % VOCABULARY


def language(name: str, settings: dict[str, Any] | None = None, pairs: int = 4, **more: Any) -> Case:
    return Case(name, models.llama, {**models.Q_AND_V, **(settings or {})}, token_ids, pairs, **more)
