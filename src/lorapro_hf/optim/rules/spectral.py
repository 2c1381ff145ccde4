"""Mode spectral: steps along the orthogonalised momentum of the weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import NativeGradient, Rows, StackGradient
from lorapro_hf.functional.bases import compute_dtype
from lorapro_hf.functional.spectral import LENGTH, SpectralState, spectral_step
from lorapro_hf.functional.step_options import Group, StepOptions
from lorapro_hf.optim.rules.base import PairState, RowsOf, matrix_shapes
from lorapro_hf.optim.rules.native import native_options, step_natively
from lorapro_hf.optim.rules.stack_state import StackState, StateSpec
from lorapro_hf.optim.rules.tangent import TangentMoment, first_moment, stepped_coordinates

_BLOCK_ELEMENTS = 2**20  # of a matrix of the size of a weight that diagnostics form at a time


class Spectral(TangentMoment):
    """The factors step along the polar factor of the momentum, projected on their tangent space.

    A pair whose gradient is 0, such as an expert without tokens, waits like a pair without a gradient. The polar factor
    of a fading momentum is as long as any, so that such a pair would walk on.
    """

    name = "spectral"
    takes_lora_rates = True
    steps_natively = True

    def state_spec(self, pair: LoRAPair) -> list[StateSpec]:
        """The first moment in the tangent space of the factors."""
        (A, B), dtype = matrix_shapes(pair), compute_dtype(pair.A, pair.B)
        return [StateSpec("exp_avg", "A", A, dtype), StateSpec("exp_avg", "B", B, dtype, "rows")]

    def check_group(self, group: Group) -> None:
        """Nothing: the mode has no `eps`."""

    def step(self, read: StackGradient, state: StackState, options: StepOptions) -> Rows:
        """The step of `spectral_step`."""
        a, b = read.coordinates
        options = _with_gradient(options, a.flatten(1).any(1) | b.flatten(1).any(1))
        factors, bases, coordinates = stepped_coordinates(read, state, options.rtol)
        moments = SpectralState(state["A", "exp_avg"], state["B", "exp_avg"])
        iterations = self.config.spectral_iterations
        return Rows(*spectral_step(*factors, bases, coordinates, read.scaling, moments, options, iterations))

    def native_step(self, read: NativeGradient, state: StackState, options: StepOptions) -> None:
        """Step factors and state in place."""
        options = _with_gradient(options, read.native.norms.any(1))
        step_natively(
            self.name, read, state, options, native_options(options, iterations=self.config.spectral_iterations)
        )

    def intended_direction(self, gradient: RowsOf, A: Tensor, B: Tensor, state: PairState, group: Group) -> RowsOf:
        """The projected polar factor, from QR decompositions and a singular value decomposition."""
        beta = group["betas"][0]
        P_A, P_B = (_orthonormal_rows(factor, self.config.rtol) for factor in (A, B.mT))
        a, b = A.new_zeros(len(P_B), A.shape[1]), A.new_zeros(len(B), len(P_A))
        height = max(1, _BLOCK_ELEMENTS // A.shape[1])
        for rows in (slice(start, start + height) for start in range(0, len(B), height)):
            block = gradient(rows)
            a += P_B[:, rows] @ block
            b[rows] = block @ P_A.mT
        # g̃ = P_B g + (I − P_B) g P_A; ahead = β (β M + (1 − β) g̃) + (1 − β) g̃
        left, right = torch.cat([P_B.mT, b - P_B.mT @ (P_B @ b)], 1), torch.cat([a, P_A])
        if not (a.any() or b.any()):
            return lambda rows: A.new_zeros(len(B[rows]), A.shape[1])
        right = right * (1 - beta**2)
        if "exp_avg" in state[0]:
            M_left, M_right = first_moment(A, B, state, self.config.rtol)
            left, right = torch.cat([left, beta**2 * M_left], 1), torch.cat([right, M_right])
        for _ in range(self.config.spectral_iterations):
            left, right = _polar_factors(left, right, self.config.rtol)
            seen_by_B, seen_by_A = P_B @ left, right @ P_A.mT
            left = torch.cat([P_B.mT, left @ seen_by_A - P_B.mT @ (seen_by_B @ seen_by_A)], 1)
            right = torch.cat([seen_by_B @ right, P_A])
        right = right * (LENGTH * max(len(B), A.shape[1]) ** 0.5)
        return lambda rows: left[rows] @ right


def _with_gradient(options: StepOptions, has_gradient: Tensor) -> StepOptions:
    """The options of a step for the active pairs with a gradient; `has_gradient` is bool `(K,)`."""
    return replace(options, active=has_gradient if options.active is None else options.active & has_gradient)


def _orthonormal_rows(factor: Tensor, rtol: float | None) -> Tensor:
    """Orthonormal rows that span the rows of a factor."""
    _, singular, rows = torch.linalg.svd(factor.double(), full_matrices=False)
    return rows[_present(singular, factor, rtol)].to(factor.dtype)


def _polar_factors(left: Tensor, right: Tensor, rtol: float | None) -> tuple[Tensor, Tensor]:
    """Thin factors of the polar factor of `left @ right`."""
    Q_left, R_left = torch.linalg.qr(left.double())
    Q_right, R_right = torch.linalg.qr(right.double().mT)
    U, singular, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    present = _present(singular, left, rtol)
    return (Q_left @ U[:, present]).to(left), (Vh[present] @ Q_right.mT).to(right)


def _present(singular: Tensor, like: Tensor, rtol: float | None) -> Tensor:
    """The directions whose squared singular value is above `rtol` times the largest."""
    rtol = len(singular) * torch.finfo(like.dtype).eps if rtol is None else rtol
    return singular.square() > rtol * singular.square().amax()
