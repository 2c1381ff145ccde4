"""How does each mode step a stack of pairs? Called once it is clear what the step starts from; nothing here waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.factors.stacks import Rows, StackGradient, store_layers
from lorapro_hf.functional.bases import ALL_DIRECTIONS, row_bases, row_basis
from lorapro_hf.functional.factor_steps import Rates, change_through, linear_step, select, sequential_step
from lorapro_hf.functional.factored import Bases, FactoredState, factored_step
from lorapro_hf.functional.projection import Coordinates, factor_gradients_, outside_
from lorapro_hf.kernels.dense import dense_update
from lorapro_hf.optim.state import StackMoments

Group = dict[str, Any]


def adjusted_gradients_(read: StackGradient, x_mode: str) -> Rows:
    """The adjusted factor gradients `(h_A, h_B)`, in rows layout; overwrites the coordinates that were read."""
    scaling = read.scaling[:, None, None]
    return Rows(*factor_gradients_(read.basis_A, read.basis_B, read.coordinates, scaling, x_mode))


def longest_adjusted(read: StackGradient, norm: Tensor) -> Tensor:
    """A bound on the adjusted gradients, given the norm of the equivalent ones; infinite where they may overflow."""
    stretch = torch.maximum(read.basis_A.inverse.amax(-1), read.basis_B.inverse.amax(-1)) / read.scaling.abs()
    return stretch.amax() * norm.to(stretch)


def efficient_step(
    read: StackGradient,
    h: Rows,
    moments: StackMoments,
    groups: tuple[Group, Group],
    skip: Tensor,
    config: LoRAProConfig,
) -> None:
    """AdamW on the factors with their adjusted gradients, in the dtype of the moments."""
    stack = read.stack
    moments.refresh_masters()
    own = stack.layers_A(read.factors.A), stack.layers_B(read.factors.B)
    # stepped in place
    after = [x.contiguous() if master is None else master for x, master in zip(own, moments.masters, strict=True)]
    before = stack.rows(*(values.clone() for values in after)) if config.is_sequential else None
    gradients = stack.layers_A(h.A), stack.layers_B(h.B)
    for factor, group, values, of_factor in zip("AB", groups, after, gradients, strict=True):
        states = (values, of_factor.contiguous(), moments[factor, "exp_avg"], moments[factor, "exp_avg_sq"])
        if moments.uniform and read.live is None:
            one_by_one = [[each] for each in states]
            steps = [moments.steps[0]]
        else:
            indices = range(len(values)) if read.live is None else read.live
            one_by_one = [[each[index] for index in indices] for each in states]
            steps = [moments.steps[index] for index in indices]
        fused_adamw(one_by_one[0], one_by_one[1], one_by_one[2], one_by_one[3], steps, group, skip)
    if before is not None:
        _let_A_follow_(read, before, after, moments, groups, skip, config)
    for position, values in enumerate(after):
        store_layers([factors[position] for factors in stack.factors], values, read.live)


def _let_A_follow_(
    read: StackGradient,
    before: Rows,
    after: list[Tensor],
    moments: StackMoments,
    groups: tuple[Group, Group],
    skip: Tensor,
    config: LoRAProConfig,
) -> None:
    """Have the change that AdamW has made to A act through the B that AdamW has made, as far as that B can."""
    stack = read.stack
    keep_A, keep_B = (1 - group["lr"] * group["weight_decay"] for group in groups)
    A, Bt = stack.rows(*after)
    dtype_B = moments.factors(read.factors)[1][1]
    if dtype_B is not None:
        Bt = Bt.to(dtype_B).to(Bt.dtype)
    kept = keep_A * before.A
    change = change_through(A - kept, keep_B * before.B, row_basis(Bt, config.rtol))
    after[0].copy_(stack.layers_A(select(active_entries(read, skip), kept.add_(change), before.A)))


def full_step(
    read: StackGradient, moments: StackMoments, groups: tuple[Group, Group], skip: Tensor, config: LoRAProConfig
) -> None:
    """Adam on the equivalent gradient; its direction, seen through the bases of the factors, moves them."""
    stack = read.stack
    factors, bases, dtypes = stepped_factors(read, moments, config)
    if config.is_sequential:
        bases = Bases(bases.A, row_basis(factors.B, ALL_DIRECTIONS))
    basis_A, basis_B = bases
    u_A, B_u, K_u = dense_update(
        moments.dense,
        *equivalent_products(read),
        basis_A.rows,
        basis_B.rows,
        stack.per_entry(moments.steps),
        skip,
        betas=groups[0]["betas"],
        eps=groups[0]["eps"],
        sequential=config.is_sequential,
        live=stack.entries(read.live),
        backend=config.backend,
    )
    rates, active = rates_of(groups, config), active_entries(read, skip)
    if K_u is not None:
        options: Any = {"rtol": config.rtol, "live": active, "factor_dtypes": dtypes}
        new = Rows(*sequential_step(*factors, u_A, B_u, K_u, read.scaling, *bases, rates, **options)[:2])
    else:
        coordinates = Coordinates(B_u, outside_(u_A, basis_B))
        h_A, h_B = factor_gradients_(*bases, coordinates, read.scaling[:, None, None], config.x_mode)
        new = Rows(*linear_step(*factors, h_A, h_B, rates, live=active, factor_dtypes=dtypes))
    stack.write(new, read.live, moments.masters)


def factored_mode_step(
    read: StackGradient, moments: StackMoments, groups: tuple[Group, Group], skip: Tensor, config: LoRAProConfig
) -> None:
    """Adam with moments in the form of factors."""
    stack = read.stack
    factors, bases, dtypes = stepped_factors(read, moments, config)
    coordinates = read.coordinates
    if bases.A is not read.basis_A:
        left, right = equivalent_products(read)
        a = (bases.B.rows @ left.mT) @ right
        coordinates = Coordinates(a, outside_((bases.A.rows @ right.mT) @ left, bases.B))
    state = FactoredState(
        moments["A", "exp_avg"],
        moments["B", "exp_avg"],
        moments["A", "exp_avg_sq"],
        moments["B", "exp_avg_sq"],
        stack.per_entry(moments.steps) - 1,  # a copy: the step adds to it, and the pairs' own have been counted
    )
    new = factored_step(
        *factors,
        bases,
        coordinates,
        read.scaling,
        state,
        rates_of(groups, config),
        betas=groups[0]["betas"],
        eps=groups[0]["eps"],
        update="sequential" if config.is_sequential else "linear",
        x_mode=config.x_mode,
        rtol=config.rtol,
        live=active_entries(read, skip),
        factor_dtypes=dtypes,
    )
    stack.write(Rows(new.A, new.Bt), read.live, moments.masters)


def stepped_factors(
    read: StackGradient, moments: StackMoments, config: LoRAProConfig
) -> tuple[Rows, Bases, tuple[torch.dtype | None, torch.dtype | None]]:
    """The factors that a step moves, their bases, and the dtypes to round them to.

    With master copies these are not the factors that the gradient was taken at: each has its own bases, as the small
    directions of a factor differ by more than its roundings.
    """
    moments.refresh_masters()
    factors, dtypes = moments.factors(read.factors)
    if factors is read.factors:
        return factors, Bases(read.basis_A, read.basis_B), dtypes
    return factors, Bases(*row_bases(list(factors), config.rtol)), dtypes


def equivalent_products(read: StackGradient) -> tuple[Tensor, Tensor]:
    """`left` `(K, 2r, m)` and `right` `(K, 2r, n)` whose product `leftᵀ right` is the equivalent gradient."""
    a, b = read.coordinates
    return torch.cat([read.basis_B.rows, b], dim=-2), torch.cat([a, read.basis_A.rows], dim=-2)


def active_entries(read: StackGradient, skip: Tensor) -> Tensor:
    """Which entries take the step, bool `(K,)`."""
    taken = skip == 0
    if read.live is None:
        return taken.expand(len(read.scaling))
    return taken & (read.stack.per_entry(read.stack.mask(read.live)) > 0)


def rates_of(groups: tuple[Group, Group], config: LoRAProConfig) -> Rates:
    """Learning rates, and what decay leaves of each factor so that their product decays by `1 − lr * weight_decay`."""
    keep = []
    for group in groups:
        left = 1 - group["lr"] * group["weight_decay"]
        keep.append(left.clamp_min(0).sqrt() if isinstance(left, Tensor) else max(0.0, left) ** 0.5)
    return Rates(groups[0]["lr"], groups[1]["lr"], keep[0], keep[1], config.step_limit)


def fused_adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: Group,
    skip: Tensor,
) -> None:
    """`torch.optim.AdamW(fused=True)` for steps that are counted already; does nothing where `skip` is 1."""
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
        found_inf=skip,
    )
