"""Which rates, step counts and loss scale does an optimizer of any kind show?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.functional.step_options import Rates
from lorapro_hf.optim.lora_pro import LoRAProAdamW
from lorapro_hf.utils.private_names import private


def steps_of(pair: LoRAPair, optimizer: Any) -> float | None:
    """The number of steps that the optimizer has taken with a pair; `None` if it keeps no count."""
    count = optimizer.state.get(pair.A, {}).get("step")
    return None if count is None else float(count)


def loss_scale(optimizer: Any) -> float:
    """The factor by which the gradients are still scaled; accelerate may undo it as late as in the step."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    stage = private(scaler, "_per_optimizer_states")[id(optimizer.optimizer)]["stage"]
    return 1.0 if stage is OptState.UNSCALED else float(scaler.get_scale())


def groups_of(pair: LoRAPair, optimizer: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The param groups of A and B; empty if the optimizer does not show them."""
    groups = {id(parameter): group for group in getattr(optimizer, "param_groups", []) for parameter in group["params"]}
    return groups.get(id(pair.A), {}), groups.get(id(pair.B), {})


def decayed_rates(groups: tuple[Mapping[str, Any], Mapping[str, Any]], optimizer: Any) -> Rates:
    """The learning rates, and the fractions of the factors that decoupled decay keeps.

    Decay of any other kind counts as part of the step.
    """
    if isinstance(optimizer, LoRAProAdamW):
        return optimizer.rule.rates(groups)
    lr_A, lr_B = (group.get("lr", 0.0) for group in groups)
    if not isinstance(optimizer, torch.optim.AdamW):
        return Rates(lr_A, lr_B)
    return Rates(lr_A, lr_B, *(1 - group.get("lr", 0.0) * group.get("weight_decay", 0.0) for group in groups))
