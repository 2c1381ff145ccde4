"""What would each mode cost: memory on the busiest rank, and which learning rates are worth trying?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lorapro_hf.commands.inspect.report import ModeCost
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.ownership import assign_owners, group_alike
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.optim.memory import available_bytes, scratch_bytes, state_bytes_by_device
from lorapro_hf.optim.rules import all_settings, rule_of
from lorapro_hf.optim.rules.base import UpdateRule

# Where full fine-tuning's rates fall with the size of the model: parameters up to which a range holds.
_RATES_OF_THE_WEIGHT = ((1e9, (1e-4, 1e-3)), (3e9, (3e-5, 2e-4)), (float("inf"), (7e-6, 6e-5)))
_RATES_OF_LORA = (1e-4, 1e-3)

Bytes = dict[torch.device, int]
Needs = tuple[Bytes, Bytes]


def learning_rates(rule: UpdateRule, parameters: int) -> tuple[float, float]:
    """The range to try.

    Args:
        rule: of the mode.
        parameters: of the base model.
    """
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
    pairs: Sequence[LoRAPair],
    ordinary: Sequence[Tensor],
    *,
    parameters: int,
    weights: int | None,
    ranks: int = 1,
) -> tuple[list[ModeCost], dict[str, int | None]]:
    """The costs of every mode, and the memory that is free by device.

    Args:
        pairs: at least one; on the devices they are trained on, or on the meta device, which stands for CUDA if there
            is one here and else for the CPU.
        ordinary: trainable parameters of no pair.
        parameters: of the base model.
        weights: bytes of the weights that are yet to be loaded, 0 if all are, `None` if that is not known.
        ranks: how many processes share the pairs out.
    """
    gradients: Bytes = {}
    for tensor in (*(factor for pair in pairs for factor in (pair.A, pair.B)), *ordinary):
        gradients[tensor.device] = gradients.get(tensor.device, 0) + tensor.numel() * tensor.element_size()
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    places = {device: here if device.type == "meta" else device for device in gradients}
    free = {device: available_bytes(place) for device, place in places.items()}
    shares = shares_of(pairs, ranks)
    costs = []
    for config in all_settings(False):
        needs = [_need(own, ordinary, config, here) for own in shares]
        state, scratch = max(needs, key=lambda need: sum(map(_total, need)))
        more: Bytes = {} if weights is None else {next(iter(gradients)): weights}
        fits = _fits((state, scratch, gradients, more), free)
        total = None if weights is None else sum(map(_total, (state, scratch, gradients, more)))
        fits = None if fits and weights is None else fits  # what fits may not any more beside the weights
        rates = learning_rates(rule_of(config), parameters)
        costs.append(ModeCost(config.mode, config.moments_dtype, _total(state), _total(scratch), total, fits, rates))
    return costs, {str(places[device]): room for device, room in free.items()}


def _need(own: Sequence[LoRAPair], ordinary: Sequence[Tensor], config: LoRAProConfig, here: torch.device) -> Needs:
    """State and scratch of one rank."""
    place = here if own and own[0].A.device.type == "meta" else None
    return state_bytes_by_device(own, config, ordinary), scratch_bytes(own, config, place)


def _fits(needs: Iterable[Bytes], free: Mapping[torch.device, int | None]) -> bool | None:
    together: Bytes = {}
    for need in needs:
        for device, count in need.items():
            together[device] = together.get(device, 0) + count
    rooms = [None if (room := free[device]) is None else count <= room for device, count in together.items()]
    return False if False in rooms else None if None in rooms else True


def _total(need: Bytes) -> int:
    return sum(need.values())
