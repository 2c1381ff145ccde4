"""What are the adjusted gradients of these pairs now, for an optimizer that is not ours?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.pairs import LoRAPair
from lorapro_hf.stacks import Stack, exact_arithmetic, global_norm, read_stacks, stacks_of, store_layers
from lorapro_hf.steps import adjusted_gradients_


@torch.no_grad()
def project_pair_gradients_(pairs: Sequence[LoRAPair], config: LoRAProConfig) -> Tensor:
    """Overwrite the `.grad` of every pair's factors with the adjusted gradients, ahead of any optimizer's step.

    Factors that tied layers hold a second time lose their `.grad`: the first layer's carries the sum.

    Args:
        pairs: as `find_lora_pairs` gives them; pairs without gradients are left out.
        config: its `x_mode` and `rtol` are used.

    Returns:
        The global 2-norm of the equivalent gradients, a scalar on their device.

    Raises:
        ValueError: a scaling is 0, or a factor is not finite.
        RuntimeError: a gradient is missing for one factor of a pair, sparse or sharded.
    """
    stacks = stacks_of(pairs)
    with exact_arithmetic(stacks):
        read = read_stacks(stacks, config)
        norm = global_norm(read)
        for each in read:
            h = adjusted_gradients_(each, config.x_mode)
            layers = each.stack.layers_A(h.A), each.stack.layers_B(h.B)
            for position, values in enumerate(layers):
                _store_gradients(each.stack, position, values, each.live)
        return norm


def _store_gradients(stack: Stack, position: int, values: Tensor, live: list[int] | None) -> None:
    taking_part = range(len(stack.pairs)) if live is None else live
    for index in taking_part:
        parameter = stack.factors[index][position]
        if parameter.grad is None:  # a tied layer had it
            parameter.grad = torch.empty_like(parameter)
        for tied in stack.pairs[index].tied_parameters:
            tied.grad = None
    gradients = [factors[position].grad for factors in stack.factors]
    store_layers(gradients, values, live)  # type: ignore[arg-type]
