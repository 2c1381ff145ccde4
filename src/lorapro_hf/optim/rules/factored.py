"""Mode factored: Adam on the equivalent gradient, with moments of the size of the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import NativeGradient, Rows, StackGradient
from lorapro_hf.functional.bases import compute_dtype
from lorapro_hf.functional.factored import FactoredState, factored_step
from lorapro_hf.functional.step_options import Group, StepOptions
from lorapro_hf.optim.rules.base import PairState, RowsOf, matrix_shapes
from lorapro_hf.optim.rules.native import native_options, step_natively
from lorapro_hf.optim.rules.stack_state import StackState, StateSpec
from lorapro_hf.optim.rules.tangent import TangentMoment, first_moment, stepped_coordinates

_LARGEST = 1e15  # the mode sums squares of gradients; beyond this norm the sums overflow in float32
_BLOCK_ELEMENTS = 2**20  # of a matrix of the size of a weight that diagnostics form at a time


class Factored(TangentMoment):
    """The factors step along Adam's direction of the weight, a product of rank 2r."""

    name = "factored"
    steps_natively = True

    def state_spec(self, pair: LoRAPair) -> list[StateSpec]:
        """The first moment in the tangent space of the factors, and the column and row means of the second."""
        (A, B), dtype = matrix_shapes(pair), compute_dtype(pair.A, pair.B)
        return [
            StateSpec("exp_avg", "A", A, dtype),
            StateSpec("exp_avg_sq", "A", (*A[:-2], A[-1]), dtype),
            StateSpec("exp_avg", "B", B, dtype, "rows"),
            StateSpec("exp_avg_sq", "B", B[:-1], dtype),
        ]

    def check_group(self, group: Group) -> None:
        """Nothing: an `eps` of 0 is no division by zero here."""

    def largest_norm(self, dtype: torch.dtype) -> float:
        """The same for every dtype."""
        return _LARGEST

    def step(self, read: StackGradient, state: StackState, options: StepOptions) -> Rows:
        """The step of `factored_step`."""
        factors, bases, coordinates = stepped_coordinates(read, state, options.rtol)
        moments = FactoredState(
            state["A", "exp_avg"],
            state["B", "exp_avg"],
            state["A", "exp_avg_sq"],
            state["B", "exp_avg_sq"],
            read.stack.per_entry(state.steps) - 1,  # the step counts again, on this copy
        )
        new = factored_step(*factors, bases, coordinates, read.scaling, moments, options)
        return Rows(new.A, new.Bt)

    def native_step(self, read: NativeGradient, state: StackState, options: StepOptions) -> None:
        """Step factors and state in place."""
        step_natively(self.name, read, state, options, native_options(options))

    def intended_direction(self, gradient: RowsOf, A: Tensor, B: Tensor, state: PairState, group: Group) -> RowsOf:
        """Adam's direction from the stored moments."""
        (beta1, beta2), eps = group["betas"], group["eps"]
        steps, started = float(state[0].get("step", torch.zeros(()))) + 1, "exp_avg" in state[0]
        grown_1, grown_2 = 1 - beta1**steps, 1 - beta2**steps
        row, column = (mean * (1 - beta2) for mean in _mean_squares(gradient, B.shape[0], A))
        if started:
            row += beta2 * state[1]["exp_avg_sq"]
            column += beta2 * state[0]["exp_avg_sq"]
            left, right = first_moment(A, B, state, self.config.rtol)
        row, column = row / grown_2, column / grown_2
        divided = (column.sqrt() + eps) / (row.mean().sqrt() + eps)

        def direction(rows: slice) -> Tensor:
            M = gradient(rows).mul_(1 - beta1)
            if started:
                M.add_(left[rows] @ right, alpha=beta1)
            root = torch.outer(row[rows].sqrt() + eps, divided)
            return torch.where(root > 0, M.div_(grown_1) / root, 0)

        return direction


def _mean_squares(gradient: RowsOf, m: int, A: Tensor) -> tuple[Tensor, Tensor]:
    """The means of the squares of a gradient's rows `(m,)` and columns `(n,)`."""
    row, column = A.new_zeros(m), A.new_zeros(A.shape[1])
    height = max(1, _BLOCK_ELEMENTS // A.shape[1])
    for rows in (slice(start, start + height) for start in range(0, m, height)):
        square = gradient(rows).square_()
        row[rows] = square.mean(1)
        column += square.sum(0) / m
    return row, column
