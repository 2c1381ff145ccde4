"""How are many pairs of one shape read and written as one batch?

In rows layout every factor-size quantity of K entries is `(K, r, length)`: A as it is, B transposed. A pair that packs
several (experts, convolution groups) has an entry for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.factors.pairs import LoRAPair, check_scaling
from lorapro_hf.functional.bases import (
    Bases,
    Coordinates,
    compute_dtype,
    coordinate_norms,
    factor_gradients_,
    gradient_coordinates,
    row_bases,
)
from lorapro_hf.kernels.native_steps import NativePairs, serves


class Rows(NamedTuple):
    """Two factor-size quantities of all pairs of a stack, in the dtype of the computation."""

    A: Tensor  # (K, r, n)
    B: Tensor  # (K, r, m)


class Stack:
    """Pairs whose factors agree in shape, dtype, device and param groups.

    Args:
        pairs: at least one.
        groups: positions of the param groups of A and of B.
        factors: whole tensors to read and write in place of the pairs' own, with their gradients in `.grad`.

    Attributes:
        edges: the bulk edges of the base weights `(K,)`, float64 where the device has it, once they are known.
    """

    def __init__(
        self,
        pairs: Sequence[LoRAPair],
        groups: tuple[int, int] = (0, 0),
        factors: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.pairs = list(pairs)
        self.groups = groups
        self.factors = [(pair.A, pair.B) for pair in pairs] if factors is None else list(factors)
        A, B = self.factors[0]
        self.dtype, self.device = compute_dtype(A, B), A.device
        self.stored_dtypes = A.dtype, B.dtype
        self._shapes = A.shape, B.shape
        self.packed = self.pairs[0].batch  # the entries of each pair
        first = self.pairs[0]
        (*_, r, n), (*_, m, _) = first.matrix_A(A).shape, first.matrix_B(B).shape
        self.matrix_shape = r, m, n
        self.edges = torch.empty(0)
        self._scalings: list[float] = []
        self._scaling = torch.empty(0)
        self._chosen: list[int] = []
        self._mask = torch.empty(0)

    def scaling(self) -> Tensor:
        """The present scalings, `(K,)`; raises a `ValueError` if one is 0 or not finite."""
        scalings = [check_scaling(pair) for pair in self.pairs]
        if scalings != self._scalings:  # a copy to the device waits for it: only when something has changed
            self._scalings = scalings
            self._scaling = torch.tensor(scalings, dtype=self.dtype, device=self.device)
        return self.per_entry(self._scaling)

    def per_entry(self, of_pairs: Tensor) -> Tensor:
        """`(pairs,)` as `(K,)`."""
        return of_pairs.repeat_interleave(self.packed) if self.packed > 1 else of_pairs

    def entries(self, pair_ids: list[int] | None) -> list[int] | None:
        """The entries of some pairs, `None` for all."""
        if pair_ids is None or self.packed == 1:
            return pair_ids
        return [index * self.packed + i for index in pair_ids for i in range(self.packed)]

    def active(self, pair_ids: list[int] | None, found_inf: Tensor) -> Tensor:
        """Whether each pair takes the step, bool `(pairs,)`; the host does not wait for the device.

        Pairs without gradients do not (`pair_ids` are those with some, `None` for all); none does if `found_inf` is 1.
        """
        taken = found_inf == 0
        if pair_ids is None:
            return taken.expand(len(self.pairs))
        if pair_ids != self._chosen:  # kept on the device, since a CUDA graph would copy freed memory of the host
            chosen = set(pair_ids)
            mask = torch.tensor([index in chosen for index in range(len(self.pairs))], device="cpu")
            if self.device.type == "cuda":
                mask = mask.pin_memory()
            self._chosen, self._mask = pair_ids, mask.to(self.device, non_blocking=True)
        return taken & self._mask

    @torch.no_grad()
    def read(self) -> Rows:
        """Copies of the factors."""
        return self._read(self.factors)

    def gradients(self) -> list[tuple[Tensor, Tensor] | None]:
        """The gradients of A and B of each pair, `None` for pairs without.

        Raises:
            RuntimeError: a factor or its gradient has another shape than at first, with which kernels would reach
                beyond their memory; otherwise as `LoRAPair.gradients`.
        """
        gradients = [pair.gradients(*factors) for pair, factors in zip(self.pairs, self.factors, strict=True)]
        for pair, factors, of_pair in zip(self.pairs, self.factors, gradients, strict=True):
            for A, B in (factors, of_pair or factors):
                if (A.shape, B.shape) != self._shapes:
                    raise RuntimeError(
                        f"{pair.name}: lora_A and lora_B, or their gradients, have the shapes {tuple(A.shape)} and "
                        f"{tuple(B.shape)}, but the optimizer was built for {tuple(self._shapes[0])} and "
                        f"{tuple(self._shapes[1])}. Build the optimizer again after the shapes have changed."
                    )
        return gradients

    def read_gradients(self, gradients: Sequence[tuple[Tensor, Tensor] | None]) -> Rows:
        """Copies of gradients; 0 for pairs without."""
        filled = [
            (torch.zeros_like(factors[0]), torch.zeros_like(factors[1])) if of_pair is None else of_pair
            for of_pair, factors in zip(gradients, self.factors, strict=True)
        ]
        return self._read(filled)

    def is_native(self) -> bool:
        """Whether the compiled kernels of the CPU can step the pairs where they lie."""
        return self.pairs[0].layout == "matrix" and serves(self.factors)

    def _read(self, tensors: Sequence[tuple[Tensor, Tensor]]) -> Rows:
        A, B = zip(*tensors, strict=True)
        return self.rows(stacked(A, self.dtype), stacked(B, self.dtype))

    def write(
        self, rows: Rows, pair_ids: list[int] | None, masters: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> None:
        """Store new factors of some pairs (`None` for all), rounded to the dtype of the parameters.

        `masters` are wider tensors `(pairs, *A.shape)` and `(pairs, *B.shape)` that take the values unrounded.
        """
        chosen = range(len(self.pairs)) if pair_ids is None else pair_ids
        # Transposed as a batch: layer by layer that takes twice as long.
        layers = self.layers_A(rows.A), self.layers_B(rows.B).contiguous()
        for values, master, parameters in zip(layers, masters, zip(*self.factors, strict=True), strict=True):
            new = values.unbind()
            for stored in (parameters,) if master is None else (parameters, master.unbind()):
                torch._foreach_copy_([stored[index] for index in chosen], [new[index] for index in chosen])

    def layers_A(self, rows: Tensor) -> Tensor:
        """Rows `(K, r, n)` as `(pairs, *A.shape)`."""
        return self.pairs[0].factor_A(self.per_layer(rows))

    def layers_B(self, rows: Tensor) -> Tensor:
        """Rows `(K, r, m)` as `(pairs, *B.shape)`."""
        return self.pairs[0].factor_B(self.per_layer(rows).mT)

    def per_layer(self, stacked: Tensor) -> Tensor:
        """`(K, ...)` as `(pairs, ...)`, or as `(pairs, packed, ...)` where pairs pack several entries."""
        return stacked if self.pairs[0].layout == "matrix" else stacked.unflatten(0, (-1, self.packed))

    def rows(self, A: Tensor, B: Tensor) -> Rows:
        """`(pairs, *A.shape)` and `(pairs, *B.shape)` as rows, without a copy where the layout allows it."""
        first = self.pairs[0]
        matrices_A, matrices_B = first.matrix_A(A), first.matrix_B(B)
        if first.layout != "matrix":
            matrices_A, matrices_B = matrices_A.flatten(0, 1), matrices_B.flatten(0, 1)
        return Rows(matrices_A, matrices_B.mT)


class NativeGradient(NamedTuple):
    """The input of a step in the compiled kernels, which read factors and gradients where they lie."""

    stack: Stack
    pair_ids: list[int] | None  # the pairs that have gradients, `None` for all
    scaling: Tensor  # (K,)
    native: NativePairs

    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """The norms of both coordinates and of their core, `(K,)` each."""
        of_a, of_b, of_core = self.native.norms.to(self.stack.dtype).unbind(1)
        return of_a, of_b, of_core

    def largest_inverses(self) -> Tensor:
        """The largest inverse of a singular value of A or of B, `(K,)`."""
        singular = self.native.bases[:, :, -1].flatten(1)
        return torch.where(singular != 0, 1 / singular, 0).amax(-1).to(self.stack.dtype)

    def largest_singular(self) -> Tensor:
        """The largest singular value of A or of B, `(K,)`."""
        return self.native.bases[:, :, -1].flatten(1).amax(-1).to(self.stack.dtype)


class StackGradient(NamedTuple):
    """The input of a step: a stack's factors, their bases and the equivalent gradient."""

    stack: Stack
    pair_ids: list[int] | None  # the pairs that have gradients, `None` for all
    scaling: Tensor  # (K,)
    factors: Rows
    bases: Bases
    coordinates: Coordinates

    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """The norms of both coordinates and of their core, `(K,)` each."""
        return coordinate_norms(self.bases, self.coordinates)

    def largest_inverses(self) -> Tensor:
        """The largest inverse of a singular value of A or of B, `(K,)`."""
        return torch.maximum(self.bases.A.inverse.amax(-1), self.bases.B.inverse.amax(-1))

    def largest_singular(self) -> Tensor:
        """The largest singular value of A or of B, `(K,)`."""
        return torch.maximum(self.bases.A.singular.amax(-1), self.bases.B.singular.amax(-1))

    def products(self) -> tuple[Tensor, Tensor]:
        """`left` `(K, 2r, m)` and `right` `(K, 2r, n)` whose product `leftᵀ right` is the equivalent gradient."""
        a, b = self.coordinates
        return torch.cat([self.bases.B.rows, b], dim=-2), torch.cat([a, self.bases.A.rows], dim=-2)

    def projected_gradients_(self, x_mode: str) -> Rows:
        """The projected gradients `(h_A, h_B)`; overwrites the coordinates."""
        return Rows(*factor_gradients_(*self.bases, self.coordinates, self.scaling[:, None, None], x_mode))


Gradient = StackGradient | NativeGradient


@torch.no_grad()
def read_stacks(stacks: Iterable[Stack], config: LoRAProConfig) -> list[StackGradient]:
    """The equivalent gradients of all stacks that have gradients.

    Raises:
        ValueError: a scaling is 0 or not finite.
        RuntimeError: a gradient is missing for one factor of a pair, or sparse.
    """
    reached = []
    for stack in stacks:
        gradients, pair_ids = _reached(stack)
        if pair_ids != []:
            reached.append((stack, stack.read_gradients(gradients), pair_ids))
    factors = [stack.read() for stack, _, _ in reached]
    bases = row_bases([rows for of_stack in factors for rows in of_stack], config.rtol)
    read = []
    both = map(Bases, bases[::2], bases[1::2])
    for (stack, of_gradients, pair_ids), of_stack, own_bases in zip(reached, factors, both, strict=True):
        scaling = stack.scaling()
        coordinates = gradient_coordinates(*own_bases, of_gradients.A, of_gradients.B, scaling[:, None, None])
        read.append(StackGradient(stack, pair_ids, scaling, of_stack, own_bases, coordinates))
    return read


@torch.no_grad()
def read_natively(stacks: Iterable[Stack], config: LoRAProConfig) -> list[Gradient]:
    """Read all stacks with gradients; the compiled kernels read theirs in place, `read_stacks` reads the others."""
    read: list[Gradient] = []
    others = []
    for stack in stacks:
        if not stack.is_native():
            others.append(stack)
            continue
        gradients, pair_ids = _reached(stack)
        if pair_ids != []:
            scaling = stack.scaling()
            pairs = NativePairs(stack.factors, gradients, scaling, config.rtol)
            read.append(NativeGradient(stack, pair_ids, scaling, pairs))
    return [*read, *read_stacks(others, config)]


def _reached(stack: Stack) -> tuple[list[tuple[Tensor, Tensor] | None], list[int] | None]:
    """The gradients of all pairs, and the pairs that have some, `None` for all."""
    gradients = stack.gradients()
    pair_ids = [index for index, of_pair in enumerate(gradients) if of_pair is not None]
    return gradients, None if len(pair_ids) == len(gradients) else pair_ids


@contextmanager
def exact_arithmetic(stacks: Iterable[Stack | Tensor]) -> Iterator[None]:
    """Switch off autocast, and TF32 on CUDA, which would silently round products on the devices of the arguments."""
    matmul: Any = torch.backends.cuda.matmul
    setting = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"  # the latter before torch 2.9
    exact = {"fp32_precision": "ieee", "allow_tf32": False}[setting]
    with ExitStack() as off:
        for device_type in {stack.device.type for stack in stacks}:
            off.enter_context(torch.autocast(device_type, enabled=False))
            if device_type == "cuda":
                off.callback(setattr, matmul, setting, getattr(matmul, setting))
                setattr(matmul, setting, exact)
        yield


def global_norm(read: Sequence[Gradient]) -> Tensor:
    """The 2-norm of all equivalent gradients together, a float32 or float64 scalar left on its device."""
    if not read:
        return torch.zeros(())
    parts = [each.coordinates if isinstance(each, StackGradient) else each.norms()[:2] for each in read]
    return torch.nn.utils.get_total_norm([part for both in parts for part in both])


def stacks_of(
    pairs: Sequence[LoRAPair],
    groups: Callable[[LoRAPair], tuple[int, int]] = lambda pair: (0, 0),
    factors: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Stack]:
    """Pairs grouped into stacks; `factors` as in `Stack`."""
    _keep_freed_memory()
    alike: dict[tuple[Any, ...], list[int]] = {}
    factors = [(pair.A, pair.B) for pair in pairs] if factors is None else factors
    for index, (pair, (A, B)) in enumerate(zip(pairs, factors, strict=True)):
        key = (A.shape, B.shape, pair.layout, pair.batch, A.dtype, B.dtype, A.device, groups(pair))
        alike.setdefault(key, []).append(index)
    return [
        Stack([pairs[index] for index in indices], key[-1], [factors[index] for index in indices])
        for key, indices in alike.items()
    ]


@cache
def _keep_freed_memory() -> None:
    """Make the C library keep the memory that a step frees, for the next step.

    glibc returns freed blocks to the system beyond a limit that grows with the largest block ever freed, up to 32 MB.
    Fetching the pages again costs a third of an efficient step. This block is freed at once and never touched, so it
    takes no memory.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8, device="cpu")


def stacked(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Tensors of one shape as one, in another dtype."""
    return torch.stack(list(tensors)).to(dtype)
