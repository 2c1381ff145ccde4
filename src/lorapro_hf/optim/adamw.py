"""How are parameters that belong to no pair stepped? As by `torch.optim.AdamW(fused=True)`, sharded or not."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.distributed.access import local
from lorapro_hf.optim.rules.base import Group, fused_adamw


def step_adamw(
    parameters: Sequence[Tensor], state: MutableMapping[Tensor, dict[str, Any]], group: Group, found_inf: Tensor
) -> None:
    """Take one AdamW step of parameters with gradients; change nothing, not even a count, if `found_inf` is 1.

    Args:
        parameters: plain tensors or DTensors, whose state is then sharded as they are.
        state: `exp_avg`, `exp_avg_sq` and `step` by parameter; missing ones are created.
        group: learning rate, betas, eps and weight decay.
        found_inf: 0 or 1, float32.
    """
    for p in parameters:
        if "exp_avg" not in state[p]:
            state[p].update(
                step=torch.zeros((), dtype=torch.float32, device=p.device),
                exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                exp_avg_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
            )
    for kind in {(p.device, p.dtype) for p in parameters}:  # on CUDA the kernel takes one dtype at a time
        there, own = found_inf.to(kind[0]), [p for p in parameters if (p.device, p.dtype) == kind]
        torch._foreach_add_([state[p]["step"] for p in own], 1 - there)
        own = [p for p in own if local(p).numel()]  # a rank may hold nothing of a short tensor
        if own:
            exp_avgs, exp_avg_sqs = ([local(state[p][name]) for p in own] for name in ("exp_avg", "exp_avg_sq"))
            gradients = [local(p.grad) for p in own if p.grad is not None]
            steps = [state[p]["step"] for p in own]
            fused_adamw([local(p) for p in own], gradients, exp_avgs, exp_avg_sqs, steps, group, there)
