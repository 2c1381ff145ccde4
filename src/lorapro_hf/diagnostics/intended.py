"""Along which direction of the weight does a LoRA-Pro optimizer mean to step? Dense, one layer at a time.

Computed from the optimizer's state before the step and the equivalent gradient, apart from the kernels that take the
step, so that what these round or leave out shows in the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.diagnostics.figures import Halves
from lorapro_hf.factors.recording import row_blocks
from lorapro_hf.functional.bases import RowBasis, row_basis
from lorapro_hf.kernels.dynamic_map import tables_on
from lorapro_hf.kernels.storage import BLOCK
from lorapro_hf.optim.state import MASTER

Group = Mapping[str, Any]
State = Mapping[str, Tensor]


def adam_direction_(
    out: Tensor,
    equivalent: Halves,
    A: Tensor,
    B: Tensor,
    states: tuple[State, State],
    group: Group,
    config: LoRAProConfig,
) -> Tensor:
    """Adam's direction `(m, n)` for a pair in modes full, full_8bit and factored, a block of rows at a time.

    Args:
        out: `(m, n)`, where the direction is written to.
        equivalent: the equivalent gradient of this step.
        A: `(r, n)`.
        B: `(m, r)`.
        states: the optimizer's state of A and of B before the step; empty before the first one.
        group: betas and eps.
        config: mode and rtol.

    Returns:
        `out`.
    """
    beta1, beta2 = group["betas"]
    steps = float(states[0].get("step", torch.zeros(()))) + 1
    grown_1, grown_2, eps = 1 - beta1**steps, 1 - beta2**steps, group["eps"]
    started, factored = "exp_avg" in states[0], config.mode == "factored"
    low_rank = _factored_moment(A, B, states, config) if factored and started else None
    if factored:
        row, column = (mean / grown_2 for mean in _grown_means(out, equivalent, states, beta2))
        divided = (column.sqrt() + eps) / (row.mean().sqrt() + eps)
    for rows in row_blocks(out):
        block = equivalent.rows(rows)
        if factored:
            root = torch.outer(row[rows].sqrt() + eps, divided)
        else:
            root = block.square() * (1 - beta2)
            if started:
                root.add_(_dense_moment(states[0], "exp_avg_sq", rows, root.dtype), alpha=beta2)
            root = (root / grown_2).sqrt_().add_(eps)
        M = block.mul_(1 - beta1)
        if started:
            past = low_rank.rows(rows) if low_rank else _dense_moment(states[0], "exp_avg", rows, M.dtype)
            M.add_(past, alpha=beta1)
        out[rows] = torch.where(root > 0, M.div_(grown_1) / root, 0)
    return out


def _grown_means(out: Tensor, equivalent: Halves, states: tuple[State, State], beta2: float) -> tuple[Tensor, Tensor]:
    """The means of the squares of a gradient's rows `(m,)` and columns `(n,)`, added to the optimizer's."""
    row, column = out.new_zeros(out.shape[0]), out.new_zeros(out.shape[1])
    for rows in row_blocks(out):
        square = equivalent.rows(rows).square_()
        row[rows] = square.mean(1)
        column += square.sum(0) / out.shape[0]
    row, column = row * (1 - beta2), column * (1 - beta2)
    if "exp_avg" in states[0]:
        row += beta2 * states[1]["exp_avg_sq"]
        column += beta2 * states[0]["exp_avg_sq"]
    return row, column


def _dense_moment(state: State, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
    values, absmax = state[name][rows], state.get(f"{name}_absmax")
    if absmax is None:
        return values.to(dtype)
    signed = name == "exp_avg"
    code = tables_on(values.device)[0 if signed else 2]
    exact = code.index_select(0, values.flatten().int()).view(values.shape)
    exact *= absmax[rows].repeat_interleave(BLOCK, dim=-1)[..., : values.shape[-1]]
    return (exact if signed else exact.square_()).to(dtype)  # the second one is kept by its root


def _factored_moment(A: Tensor, B: Tensor, states: tuple[State, State], config: LoRAProConfig) -> Halves:
    """`M = B̂ M_a + M_b Â` with the polar factors of what is stepped."""
    of_A = row_basis(states[0].get(MASTER, A).to(A.dtype), config.rtol)
    of_B = row_basis(states[1].get(MASTER, B).to(A.dtype).mT.contiguous(), config.rtol)
    left = torch.cat([_polar(of_B).mT, states[1]["exp_avg"]], dim=1)
    return Halves(left, torch.cat([states[0]["exp_avg"], _polar(of_A)]))


def _polar(basis: RowBasis) -> Tensor:
    return basis.vectors @ basis.rows
