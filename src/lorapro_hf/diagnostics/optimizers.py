"""What does any optimizer show of how it steps a pair: rates, steps taken, and the scale of the loss?"""

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
    """How many steps the optimizer has taken with a pair; `None` where it does not say."""
    count = optimizer.state.get(pair.A, {}).get("step")
    return None if count is None else float(count)


def loss_scale(optimizer: Any) -> float:
    """What the gradients are still multiplied by, which accelerate may undo as late as in the step."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    stage = private(scaler, "_per_optimizer_states")[id(optimizer.optimizer)]["stage"]
    return 1.0 if stage is OptState.UNSCALED else float(scaler.get_scale())


def groups_of(pair: LoRAPair, optimizer: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The param groups of both factors; empty where the optimizer does not show them."""
    found: list[Mapping[str, Any]] = [{}, {}]
    for group in getattr(optimizer, "param_groups", []):
        for position, factor in enumerate((pair.A, pair.B)):
            if any(parameter is factor for parameter in group["params"]):
                found[position] = group
    return found[0], found[1]


def decayed_rates(groups: tuple[Mapping[str, Any], Mapping[str, Any]], optimizer: Any) -> Rates:
    """Learning rates, and what decoupled decay leaves of the factors; other decay counts as part of the step."""
    if isinstance(optimizer, LoRAProAdamW):
        return optimizer.rule.rates(groups)
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    lr_A, lr_B = (group.get("lr", 0.0) for group in groups)
    keep_A, keep_B = (
        1 - group.get("lr", 0.0) * group.get("weight_decay", 0.0) if decoupled else 1.0 for group in groups
    )
    return Rates(lr_A, lr_B, keep_A, keep_B)
