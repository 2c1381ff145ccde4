"""What do the rules share that keep a first moment in the tangent space of the factors, in polar coordinates?"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapro_hf.factors.stacks import Rows, Stack, StackGradient
from lorapro_hf.functional.bases import Bases, Coordinates, RowBasis, outside_, row_bases, row_basis
from lorapro_hf.functional.factored import transport
from lorapro_hf.optim.rules.base import PairState, UpdateRule, stepped_factors
from lorapro_hf.optim.rules.stack_state import MASTER, StackState


def stepped_coordinates(read: StackGradient, state: StackState, rtol: float | None) -> tuple[Rows, Bases, Coordinates]:
    """The factors that a step moves, their bases, and the equivalent gradient in these bases."""
    factors, bases = stepped_factors(read, state, rtol)
    if bases is read.bases:
        return factors, bases, read.coordinates
    left, right = read.products()
    a = (bases.B.rows @ left.mT) @ right
    return factors, bases, Coordinates(a, outside_((bases.A.rows @ right.mT) @ left, bases.B))


def first_moment(A: Tensor, B: Tensor, state: PairState, rtol: float | None) -> tuple[Tensor, Tensor]:
    """A first moment `M = B̂ M_a + M_b Â` as a product `left @ right`, with the polar factors of the stepped factors."""
    of_A = row_basis(state[0].get(MASTER, A).to(A.dtype), rtol)
    of_B = row_basis(state[1].get(MASTER, B).to(A.dtype).mT.contiguous(), rtol)
    left = torch.cat([_polar(of_B).mT, state[1]["exp_avg"]], dim=1)
    return left, torch.cat([state[0]["exp_avg"], _polar(of_A)])


class TangentMoment(UpdateRule):
    """A rule whose first moment is `B̂ M_a + M_b Â`, with the polar factors of the stepped factors."""

    def weight_moment(self, stack: Stack, state: StackState) -> tuple[Tensor, Tensor]:
        """The moment itself; in mode rite it is preconditioned."""
        return _moment(state, Bases(*row_bases(list(state.factors(stack.read())), self.config.rtol)))

    def follow(self, state: StackState, before: Bases, after: Bases) -> None:
        """Project the moment onto the tangent space of the new factors, as each step does."""
        moments = transport(*_moment(state, before), after)
        for side, moment in zip("AB", moments, strict=True):
            state[side, "exp_avg"].copy_(moment)


def _moment(state: StackState, bases: Bases) -> tuple[Tensor, Tensor]:
    left, right = [_polar(bases.B), state["B", "exp_avg"]], [state["A", "exp_avg"], _polar(bases.A)]
    return torch.cat(left, dim=-2), torch.cat(right, dim=-2)


def _polar(basis: RowBasis) -> Tensor:
    return basis.vectors @ basis.rows
