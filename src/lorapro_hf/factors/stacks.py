"""How are many pairs of one shape read and written as one batch?

In rows layout every factor-size quantity of K pairs is `(K, r, length)`: A as it is, B transposed. Packed pairs
(experts, convolution groups) count one by one: K is the number of layers times those packed in each.
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
from lorapro_hf.functional.bases import RowBasis, row_bases
from lorapro_hf.functional.projection import Coordinates, compute_dtype, gradient_coordinates


class Rows(NamedTuple):
    """Two factor-size quantities of all pairs of a stack, in the dtype that steps are computed in."""

    A: Tensor  # (K, r, n)
    B: Tensor  # (K, r, m)


class Stack:
    """Pairs whose factors agree in shape, dtype and device, and in the param groups that they are stepped in.

    Args:
        pairs: at least one.
        groups: positions of the param groups of A and of B, for those who step.
        factors: whole tensors to read and write in place of the pairs' own, with their gradients in `.grad`.
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
        self._scalings: list[float] = []
        self._scaling = torch.empty(0)

    @property
    def packed(self) -> int:
        """How many pairs each layer holds."""
        return self.pairs[0].batch

    def scaling(self) -> Tensor:
        """The scalings as they are now, `(K,)`.

        Raises:
            ValueError: one is 0 or not finite.
        """
        scalings = [check_scaling(pair) for pair in self.pairs]
        if scalings != self._scalings:  # a copy to the device waits for it: only when something has changed
            self._scalings = scalings
            self._scaling = torch.tensor(scalings, dtype=self.dtype, device=self.device)
        return self.per_entry(self._scaling)

    def per_entry(self, of_pairs: Tensor) -> Tensor:
        """`(pairs,)` as `(K,)`."""
        return of_pairs.repeat_interleave(self.packed) if self.packed > 1 else of_pairs

    def entries(self, live: list[int] | None) -> list[int] | None:
        """The entries of some pairs."""
        if live is None or self.packed == 1:
            return live
        return [index * self.packed + i for index in live for i in range(self.packed)]

    def mask(self, live: list[int]) -> Tensor:
        """1 for the given pairs and 0 for the others, `(pairs,)` float32, without waiting for the device."""
        chosen = set(live)
        mask = torch.tensor([float(index in chosen) for index in range(len(self.pairs))], device="cpu")
        if self.device.type == "cuda":
            mask = mask.pin_memory()
        return mask.to(self.device, non_blocking=True)

    @torch.no_grad()
    def read(self) -> Rows:
        """Copies of the factors."""
        A, B = zip(*self.factors, strict=True)
        return self.rows(stacked(A, self.dtype), stacked(B, self.dtype))

    def read_gradients(self) -> tuple[Rows, list[int] | None] | None:
        """The gradients and which pairs have some: None for all. None instead of both if no pair has.

        Raises:
            RuntimeError: a gradient is missing for one factor of a pair, or sparse.
        """
        found = [pair.gradients_of(*factors) for pair, factors in zip(self.pairs, self.factors, strict=True)]
        if None not in found:
            A, B = zip(*found, strict=True)
            return self.rows(stacked(A, self.dtype), stacked(B, self.dtype)), None
        live = [index for index, gradients in enumerate(found) if gradients is not None]
        if not live:
            return None
        either = [
            gradients or tuple(map(torch.zeros_like, factors))
            for gradients, factors in zip(found, self.factors, strict=True)
        ]
        A, B = zip(*either, strict=True)
        return self.rows(stacked(A, self.dtype), stacked(B, self.dtype)), live

    def write(
        self, rows: Rows, live: list[int] | None, masters: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> None:
        """Store new factors, rounded to the dtype of the parameters.

        Args:
            rows: the values.
            live: the pairs to store, `None` for all.
            masters: wider tensors `(pairs, *A.shape)` and `(pairs, *B.shape)` that take the values as they are.
        """
        # Turned over as a batch: layer by layer that takes twice as long.
        layers = self.layers_A(rows.A), self.layers_B(rows.B).contiguous()
        for values, master, parameters in zip(layers, masters, zip(*self.factors, strict=True), strict=True):
            store_layers(parameters, values, live)
            if master is not None:
                store_layers(master.unbind(), values, live)

    def layers_A(self, rows: Tensor) -> Tensor:
        """Rows `(K, r, n)` as `(pairs, *A.shape)`."""
        return self.pairs[0].factor_A(self.per_layer(rows))

    def layers_B(self, rows: Tensor) -> Tensor:
        """Rows `(K, r, m)` as `(pairs, *B.shape)`."""
        return self.pairs[0].factor_B(self.per_layer(rows).mT)

    def per_layer(self, stacked: Tensor) -> Tensor:
        """`(K, ...)` as `(pairs, ...)`, or `(pairs, packed, ...)` where pairs are packed."""
        return stacked if self.pairs[0].layout == "matrix" else stacked.unflatten(0, (-1, self.packed))

    def rows(self, A: Tensor, B: Tensor) -> Rows:
        """`(pairs, *A.shape)` and `(pairs, *B.shape)` as rows, without a copy where the layout allows it."""
        first = self.pairs[0]
        matrices_A, matrices_B = first.matrix_A(A), first.matrix_B(B)
        if first.layout != "matrix":
            matrices_A, matrices_B = matrices_A.flatten(0, 1), matrices_B.flatten(0, 1)
        return Rows(matrices_A, matrices_B.mT)


class StackGradient(NamedTuple):
    """What a step starts from: a stack's factors, their bases and the equivalent gradient."""

    stack: Stack
    live: list[int] | None
    scaling: Tensor  # (K,)
    factors: Rows
    basis_A: RowBasis
    basis_B: RowBasis
    coordinates: Coordinates


@torch.no_grad()
def read_stacks(stacks: Iterable[Stack], config: LoRAProConfig) -> list[StackGradient]:
    """The equivalent gradients of all stacks that have gradients; nothing is changed.

    Raises:
        ValueError: a scaling is 0.
        RuntimeError: a gradient is missing for one factor of a pair, or sparse.
    """
    found = [(stack, *found) for stack in stacks if (found := stack.read_gradients()) is not None]
    factors = [stack.read() for stack, _, _ in found]
    bases = row_bases([rows for pair in factors for rows in pair], config.rtol)
    read = []
    for (stack, gradients, live), own, basis_A, basis_B in zip(found, factors, bases[::2], bases[1::2], strict=True):
        scaling = stack.scaling()
        coordinates = gradient_coordinates(basis_A, basis_B, gradients.A, gradients.B, scaling[:, None, None])
        read.append(StackGradient(stack, live, scaling, own, basis_A, basis_B, coordinates))
    return read


@contextmanager
def exact_arithmetic(stacks: Iterable[Stack]) -> Iterator[None]:
    """Switch off what would silently round the products of a step: autocast, and TF32 on CUDA."""
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


def global_norm(read: Sequence[StackGradient]) -> Tensor:
    """The 2-norm of all equivalent gradients together, a float32 or float64 scalar left on its device."""
    if not read:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm([x for each in read for x in each.coordinates])


def stacks_of(
    pairs: Sequence[LoRAPair],
    groups: Callable[[LoRAPair], tuple[int, int]] = lambda pair: (0, 0),
    factors: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Stack]:
    """Pairs grouped into stacks; `factors` as in `Stack`."""
    _keep_freed_memory()
    alike: dict[tuple[Any, ...], list[tuple[LoRAPair, tuple[Tensor, Tensor]]]] = {}
    own = [(pair.A, pair.B) for pair in pairs] if factors is None else factors
    for pair, (A, B) in zip(pairs, own, strict=True):
        key = (A.shape, B.shape, pair.layout, pair.batch, A.dtype, B.dtype, A.device, groups(pair))
        alike.setdefault(key, []).append((pair, (A, B)))
    return [
        Stack([pair for pair, _ in each], groups(each[0][0]), [tensors for _, tensors in each])
        for each in alike.values()
    ]


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next one, instead of asking the system for it page by page.

    glibc returns freed memory beyond a limit that grows with the largest block that was ever freed, up to 32 MB; the
    pages cost a third of an efficient step otherwise. Training frees such blocks sooner or later; this does it now. The
    block is never touched, so that it takes no memory. Without effect on other devices and C libraries.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8, device="cpu")


def store_layers(parameters: Sequence[Tensor], values: Tensor, live: list[int] | None) -> None:
    """Copy `values` `(pairs, ...)` into as many parameters, or into those of the live ones."""
    layers = values.unbind()
    if live is not None:
        parameters, layers = [parameters[index] for index in live], tuple(layers[index] for index in live)
    torch._foreach_copy_(list(parameters), list(layers))


def stacked(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Tensors of one shape as one, in another dtype."""
    return torch.stack(list(tensors)).to(dtype)
