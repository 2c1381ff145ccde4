"""How does any other optimizer get the projected gradients?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import Access, access_to
from lorapro_hf.distributed.ownership import PairOwnership
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import StackGradient, exact_arithmetic, global_norm, read_stacks, stacks_of
from lorapro_hf.optim.finite import of_factors, require_finite
from lorapro_hf.optim.lora_pro import can_be_read


@torch.no_grad()
def project_pair_gradients_(pairs: Sequence[LoRAPair], config: LoRAProConfig) -> Tensor:
    """Overwrite the `.grad` of every pair's factors with the projected gradients, before any optimizer's step.

    Tied layers hold factors a second time; these lose their `.grad`, as the first layer's carries the sum.

    Args:
        pairs: from `find_lora_pairs`; pairs without gradients are left out.
        config: its `x_mode` and `rtol` are used.

    Returns:
        The global 2-norm of the equivalent gradients, a scalar on their device.

    Raises:
        ValueError: a scaling is 0, or a factor is not finite (on the CPU; elsewhere the norm is NaN then). Nothing has
            been changed.
        RuntimeError: a gradient is missing for one factor of a pair, sparse, or sharded in a way that is not supported.
    """
    access = access_to(pairs)
    ownership = PairOwnership(pairs, access, shared=False)
    ownership.fetch()
    stacks = stacks_of(pairs, factors=ownership.factors)
    with exact_arithmetic(stacks):
        read = read_stacks(stacks, config)
        norm = global_norm(read)
        if can_be_read(norm) and not norm.isfinite():
            require_finite(of_factors(pairs, access), access.group)
        for each in read:
            h = each.projected_gradients_(config.x_mode)
            for factor, values in (("A", each.stack.layers_A(h.A)), ("B", each.stack.layers_B(h.B))):
                _store_gradients(each, factor, values, access)
        return norm


def _store_gradients(read: StackGradient, factor: str, values: Tensor, access: Access) -> None:
    pairs = read.stack.pairs
    pair_ids = range(len(pairs)) if read.pair_ids is None else read.pair_ids
    for pair in (pairs[index] for index in pair_ids):
        parameter = getattr(pair, factor)
        if parameter.grad is None:  # the tied layer had it
            parameter.grad = torch.empty_like(parameter)
        for tied in pair.tied_parameters:
            tied.grad = None
    gradients = [getattr(pairs[index], factor).grad for index in pair_ids]
    access.store(gradients, [values[index] for index in pair_ids])
