"""How are parameters that belong to no pair stepped? As by `torch.optim.AdamW(fused=True)`, sharded or not."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.distributed.access import local


def step_adamw(
    parameters: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Any]],
    group: Mapping[str, Any],
    found_inf: Tensor,
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


def fused_adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: Mapping[str, Any],
    found_inf: Tensor,
) -> None:
    """`torch.optim.AdamW(fused=True)` for steps that have been counted already; does nothing where `found_inf` is 1."""
    torch._fused_adamw_(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )
