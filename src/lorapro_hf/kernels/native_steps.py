"""How do pairs step in the C++ kernels, in place and one after the other?

The kernels serve whole float32 and float64 factors on a CPU. Their formulas are those of `lorapro_hf.functional`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.kernels import native
from lorapro_hf.kernels.native import address

# Here torch is about as fast; beyond, MKL and LAPACK are faster than the plain loops of the kernels.
MAX_RANK = 64


class _Stack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("entries", "r", "m", "n", "threads")),
        *((name, ctypes.c_void_p) for name in ("A", "B", "grad_A", "grad_B", "scaling")),
        ("rtol", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("bases", "across", "norms")),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr_A", "lr_B", "keep_A", "keep_B")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps")),
        *((name, ctypes.c_int64) for name in ("sequential", "x_mode", "iterations")),
        *((name, ctypes.c_double) for name in ("clipped", "skip", "reach")),
    ]


class _State(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("first_A", "first_B", "second_A", "second_B", "escape_A", "escape_B", "steps", "active", "longest")
    ]


class NativePairs:
    """K pairs of one shape, whose factors the kernels read and write where they lie.

    Args:
        factors: A `(r, n)` and B `(m, r)` of each pair, contiguous, all float32 or all float64.
        gradients: shaped like the factors; `None` for pairs without.
        scaling: `(K,)`.
        rtol: as in `row_bases`.

    Attributes:
        bases: eigenvectors and singular values of A and of B, `(K, 2, r + 1, r)` float64; 0 without gradients.
        norms: of both coordinates of the equivalent gradient and of their common core, `(K, 3)` float64.
    """

    def __init__(
        self,
        factors: Sequence[tuple[Tensor, Tensor]],
        gradients: Sequence[tuple[Tensor, Tensor] | None],
        scaling: Tensor,
        rtol: float | None,
    ) -> None:
        (A, B), K = factors[0], len(factors)
        r, n, m = A.shape[0], A[0].numel(), B.shape[0]
        on_cpu: Any = {"dtype": torch.float64, "device": "cpu"}  # the default device may be another
        self.bases = torch.zeros(K, 2, r + 1, r, **on_cpu)
        self._across = torch.zeros(K, 2, r, r, **on_cpu)
        self.norms = torch.zeros(K, 3, **on_cpu)
        self._scaling, self._suffix = scaling.double(), str(A.dtype).removeprefix("torch.")
        # Kept as long as their addresses are in use: gradients of convolutions may lie in another order.
        self._factors = list(factors)
        self._gradients = [
            None if both is None else (_like(both[0], own[0]), _like(both[1], own[1]))
            for both, own in zip(gradients, factors, strict=True)
        ]
        addresses = [
            [A.data_ptr() for A, _ in factors],
            [B.data_ptr() for _, B in factors],
            [0 if both is None else both[0].data_ptr() for both in self._gradients],
            [0 if both is None else both[1].data_ptr() for both in self._gradients],
        ]
        self._addresses = torch.tensor(addresses, device="cpu")
        self._stack = _Stack(
            K, r, m, n, torch.get_num_threads(), *map(address, self._addresses), address(self._scaling),
            -1.0 if rtol is None else rtol, address(self.bases), address(self._across), address(self.norms),
        )  # fmt: skip
        self._call("measure")

    def step(self, name: str, state: Mapping[str, Tensor | None], groups: Sequence[Mapping[str, Any]]) -> None:
        """Step the active pairs in place.

        Args:
            name: of the kernel.
            state: the tensors of the state by the names of `LoraproState`; `steps`, `active` and `longest` are `(K,)`.
            groups: the options of the step by the names of `LoraproOptions`; in mode efficient a second entry for B.
        """
        options = (_Options * len(groups))(*(_Options(**group) for group in groups))
        self._call(name, ctypes.byref(_State(**{field: address(tensor) for field, tensor in state.items()})), options)
        stepped = zip(self._factors, self._gradients, strict=True)
        torch.autograd.graph.increment_version([each for own, both in stepped if both is not None for each in own])

    def _call(self, name: str, *arguments: Any) -> None:
        library = native.native_kernels()
        assert library is not None
        getattr(library, f"lorapro_{name}_{self._suffix}")(ctypes.byref(self._stack), *arguments)


def serves(factors: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernels can step pairs of one shape."""
    A, B = factors[0]
    return (
        A.dtype in (torch.float32, torch.float64)
        and 0 < A.shape[0] <= MAX_RANK
        and min(A.numel(), B.numel()) > 0
        and all(_lies_plainly(each, A.dtype) for pair in factors for each in pair)
        and native.native_kernels() is not None
    )


def _like(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient as it is, or a contiguous copy of the dtype of its factor."""
    if _lies_plainly(gradient, factor.dtype) and not gradient.is_neg():
        return gradient
    return gradient.to(factor).contiguous().resolve_neg()


def _lies_plainly(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous()
