"""Modes full and full_8bit: Adam on the equivalent gradient, with moments of the size of the weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lorapro_hf.config import MOMENTS_DTYPES
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.recording import row_blocks
from lorapro_hf.factors.stacks import Gradient, NativeGradient, Rows, Stack, StackGradient
from lorapro_hf.functional.bases import (
    ALL_DIRECTIONS,
    Bases,
    Coordinates,
    compute_dtype,
    factor_gradients_,
    outside_,
    row_bases,
    row_basis,
)
from lorapro_hf.functional.factor_steps import linear_step, sequential_step
from lorapro_hf.functional.step_options import Group, StepOptions
from lorapro_hf.kernels.dense import DirectionProducts, choose_backend, dense_update, tile_elements
from lorapro_hf.kernels.storage import BLOCK, Moments, moment_tensors, tables_on
from lorapro_hf.optim.rules.base import PairState, RowsOf, UpdateRule, dense_shape, stepped_factors
from lorapro_hf.optim.rules.native import native_options, step_kernel
from lorapro_hf.optim.rules.stack_state import StackState, StateSpec

# Arrays of a tile: gradient, direction, and the moments and codes in transit where they are not stored as computed.
_TILE_ARRAYS = 10
_FIRST = ("exp_avg", "exp_avg_absmax")


class Full(UpdateRule):
    """The factors step along Adam's direction of the weight."""

    name = "full"
    keeps_dense_moments = True
    steps_natively = True
    moments_dtypes: ClassVar[tuple[str, ...]] = MOMENTS_DTYPES

    def storage(self, exact: torch.dtype) -> torch.dtype:
        """The dtype of the stored moments of pairs that are computed in the dtype `exact`."""
        return exact if self.config.moments_dtype == "float32" else torch.bfloat16

    def state_spec(self, pair: LoRAPair) -> list[StateSpec]:
        """Both moments, of the shape of the weight."""
        tensors = moment_tensors(dense_shape(pair), self.storage(compute_dtype(pair.A, pair.B)))
        return [StateSpec(name, "A", shape, dtype) for name, (shape, dtype) in tensors.items()]

    def check_device(self, device: torch.device) -> None:
        """Raise if the backend cannot serve the device."""
        choose_backend(self.config.backend, device)

    def scratch_bytes(self, pairs: Sequence[LoRAPair], device: torch.device) -> int:
        """Copies of the factors, and a tile of the dense moments."""
        elements = sum(torch.Size(dense_shape(pair)).numel() for pair in pairs)
        tile = _TILE_ARRAYS * min(tile_elements(device), elements) * torch.float32.itemsize
        return super().scratch_bytes(pairs, device) + tile

    def step(self, read: StackGradient, state: StackState, options: StepOptions) -> Rows:
        """A step along Adam's direction, of which only the products with the bases of the factors are formed."""
        factors, bases = stepped_factors(read, state, options.rtol)
        if options.sequential:
            bases = Bases(bases.A, row_basis(factors.B, ALL_DIRECTIONS))
        products = self._products(read, state, options, (*read.products(), bases.A.rows, bases.B.rows))
        if options.sequential:
            new = sequential_step(*factors, products, read.scaling, bases, options)
            return Rows(new.A, new.Bt)
        coordinates = Coordinates(products.B_u, outside_(products.u_A, bases.B))
        h_A, h_B = factor_gradients_(*bases, coordinates, read.scaling[:, None, None], options.x_mode)
        return Rows(*linear_step(*factors, h_A, h_B, options))

    def native_step(self, read: NativeGradient, state: StackState, options: StepOptions) -> None:
        """Step factors and moments in place."""
        r, m, n = read.stack.matrix_shape
        shapes = {"first_A": (2 * r, n), "first_B": (2 * r, m), "second_B": (r, m)}
        K, dtype = len(state.steps), read.stack.dtype
        before = {name: torch.zeros(K, *shape, dtype=dtype, device="cpu") for name, shape in shapes.items()}
        right, left, rows_B = before.values()
        step_kernel("full_before", read, before, options, native_options(options))
        products = self._products(read, state, options, (left, right, right[:, r:], rows_B))
        after = {"first_A": products.B_u, "first_B": products.u_A, "second_A": products.K_u}
        step_kernel("full_after", read, after, options, native_options(options))

    def _products(
        self,
        read: Gradient,
        state: StackState,
        options: StepOptions,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> DirectionProducts:
        assert options.found_inf is not None
        return dense_update(
            Moments(*(state.tensors.get(("A", name)) for name in Moments._fields)),  # type: ignore[arg-type]
            *operands,
            read.stack.per_entry(state.steps),
            options.found_inf,
            betas=options.betas,
            eps=options.eps,
            sequential=options.sequential,
            entries=read.stack.entries(read.pair_ids),
            backend=self.config.backend,
        )

    def weight_moment(self, stack: Stack, state: StackState) -> tuple[Tensor, Tensor]:
        """The part of the dense moment that both factors can follow, `P_B M + (I − P_B) M P_A`."""
        A, B = row_bases(list(stack.read()), self.config.rtol)
        through_B, through_A = torch.zeros_like(A.rows), torch.zeros_like(B.rows)
        for entry in range(len(through_B)):
            stored = {name: tensor[entry] for (_, name), tensor in state.tensors.items() if name in _FIRST}
            for rows in row_blocks(stored["exp_avg"]):
                block = _stored_moment(stored, "exp_avg", rows, stack.dtype)
                through_B[entry].addmm_(B.rows[entry, :, rows], block)
                through_A[entry, :, rows] = A.rows[entry] @ block.mT
        return torch.cat([B.rows, outside_(through_A, B)], dim=-2), torch.cat([through_B, A.rows], dim=-2)

    def intended_direction(self, gradient: RowsOf, A: Tensor, B: Tensor, state: PairState, group: Group) -> RowsOf:
        """Adam's direction from the stored moments."""
        (beta1, beta2), moments = group["betas"], state[0]
        steps, started = float(moments.get("step", torch.zeros(()))) + 1, "exp_avg" in moments
        grown_1, grown_2 = 1 - beta1**steps, 1 - beta2**steps

        def direction(rows: slice) -> Tensor:
            M = gradient(rows)
            root = M.square() * (1 - beta2)
            M = M.mul_(1 - beta1)
            if started:
                root.add_(_stored_moment(moments, "exp_avg_sq", rows, root.dtype), alpha=beta2)
                M.add_(_stored_moment(moments, "exp_avg", rows, M.dtype), alpha=beta1)
            root = (root / grown_2).sqrt_().add_(group["eps"])
            return torch.where(root > 0, M.div_(grown_1) / root, 0)

        return direction


class Full8Bit(Full):
    """The same with moments in 8-bit codes; each block of them has a scale."""

    name = "full_8bit"
    moments_dtypes = ("float32",)

    def storage(self, exact: torch.dtype) -> torch.dtype:
        """Codes, whatever the dtype of the pairs."""
        return torch.uint8


def _stored_moment(state: Mapping[str, Tensor], name: str, rows: slice, dtype: torch.dtype) -> Tensor:
    values, absmax = state[name][rows], state.get(f"{name}_absmax")
    if absmax is None:
        return values.to(dtype)
    signed = name == "exp_avg"
    code = tables_on(values.device)[0 if signed else 2]
    exact = code.index_select(0, values.flatten().int()).view(values.shape)
    exact *= absmax[rows].repeat_interleave(BLOCK, dim=-1)[..., : values.shape[-1]]
    return (exact if signed else exact.square_()).to(dtype)  # the second moment is stored as its root
