"""What would each mode cost: memory on the busiest rank, and which learning rates are worth trying?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lorapro_hf.commands.inspect.report import ModeCost
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.ownership import assign_owners, group_alike
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.optim.memory import available_bytes, scratch_bytes, state_bytes_by_device
from lorapro_hf.optim.rules import all_settings, rule_of
from lorapro_hf.optim.rules.base import UpdateRule

# Full fine-tuning's rates fall with the size of the model: numbers of parameters up to which a range holds.
_RATES_OF_THE_WEIGHT = ((1e9, (1e-4, 1e-3)), (3e9, (3e-5, 2e-4)), (float("inf"), (7e-6, 6e-5)))
_RATES_OF_LORA = (1e-4, 1e-3)


def learning_rates(rule: UpdateRule, parameters: int) -> tuple[float, float]:
    """The range to try with a mode's rule, for a base model of so many parameters."""
    if rule.takes_lora_rates:
        return _RATES_OF_LORA
    return next(rates for most, rates in _RATES_OF_THE_WEIGHT if parameters <= most)


def shares_of(pairs: Sequence[LoRAPair], ranks: int) -> list[list[LoRAPair]]:
    """The pairs that each of so many ranks would step, as the optimizer shares them out."""
    own: list[list[LoRAPair]] = [[] for _ in range(ranks)]
    alike = group_alike(pairs)
    for indices, owners in zip(alike, assign_owners([len(indices) for indices in alike], ranks), strict=True):
        for index, owner in zip(indices, owners, strict=True):
            own[owner].append(pairs[index])
    return own


def mode_costs(
    pairs: Sequence[LoRAPair], ordinary: Sequence[Tensor], *, parameters: int, weights: int | None, ranks: int = 1
) -> tuple[list[ModeCost], dict[str, int | None]]:
    """The costs of every mode, and the memory that is free by device.

    The meta device stands for CUDA if there is one here, and else for the CPU. `ordinary` are trainable parameters of
    no pair, `parameters` counts those of the base model, and `weights` are the bytes yet to be loaded, if known.
    """
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gradients: Counter[torch.device] = Counter()
    for tensor in (*(factor for pair in pairs for factor in (pair.A, pair.B)), *ordinary):
        gradients[tensor.device] += tensor.numel() * tensor.element_size()
    to_load = Counter({next(iter(gradients)): weights or 0})
    places = {device: here if device.type == "meta" else device for device in gradients}
    free = {device: available_bytes(place) for device, place in places.items()}
    shares = shares_of(pairs, ranks)
    costs = []
    for config in all_settings(False):
        state, scratch = max(
            (_need(own, ordinary, config, here) for own in shares), key=lambda need: (need[0] + need[1]).total()
        )
        need = state + scratch + gradients + to_load
        rooms = [None if (room := free[device]) is None else count <= room for device, count in need.items()]
        fits = False if False in rooms else None if weights is None or None in rooms else True
        total = None if weights is None else need.total()
        rates = learning_rates(rule_of(config), parameters)
        costs.append(ModeCost(config.mode, config.moments_dtype, state.total(), scratch.total(), total, fits, rates))
    return costs, {str(places[device]): room for device, room in free.items()}


def _need(
    own: Sequence[LoRAPair], ordinary: Sequence[Tensor], config: LoRAProConfig, here: torch.device
) -> tuple[Counter[torch.device], Counter[torch.device]]:
    """The bytes of state and scratch of one rank, by device."""
    place = here if own and own[0].A.device.type == "meta" else None
    return Counter(state_bytes_by_device(own, config, ordinary)), Counter(scratch_bytes(own, config, place))
