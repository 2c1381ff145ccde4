"""Which backend takes the step of dense moments on this device?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorapro_hf.kernels.eigh import has_triton
from lorapro_hf.kernels.storage import Moments, bitsandbytes_operators
from lorapro_hf.kernels.torch_dense import DirectionProducts


def dense_update(
    moments: Moments,
    left: Tensor,
    right: Tensor,
    A: Tensor,
    B: Tensor,
    steps: Tensor,
    found_inf: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    sequential: bool = False,
    entries: Sequence[int] | None = None,
    backend: str = "auto",
) -> DirectionProducts:
    """Update dense moments with equivalent gradients and return the products of Adam's direction, tile by tile.

    With `g = leftᵀ right`: `M ← β₁ M + (1−β₁) g`, `V ← β₂ V + (1−β₂) g∘g` and `u = M̂ / (√V̂ + eps)`. Each tile of u is
    multiplied with the factors at once: beside the moments nothing of the size of `g` exists. The host does not wait
    for the device.

    Args:
        moments: of K weights `(m, n)`, updated in place.
        left: `(K, 2r, m)`.
        right: `(K, 2r, n)`.
        A: rows to multiply u with, `(K, r, n)`: A, or its orthonormal rows, which are better conditioned.
        B: the same for the columns of B, `(K, r, m)`.
        steps: `(K,)` float32, the step counts, this step included.
        found_inf: 0-dim; where it is 1 the moments stay as they are and u counts as 0.
        betas: decay rates of the moments.
        eps: added to the denominator.
        sequential: also give `K_u`.
        entries: the active entries, by default all; the others stay as they are and get zeros.
        backend: `"torch"`, `"compiled"`, `"triton"`, or `"auto"`.

    Raises:
        RuntimeError: the backend cannot serve this device.
    """
    chosen = choose_backend(backend, A.device)
    if chosen == "triton":
        from lorapro_hf.kernels import triton_dense

        return DirectionProducts(
            *triton_dense.dense_update(
                moments,
                left,
                right,
                A,
                B,
                steps,
                found_inf,
                betas=betas,
                eps=eps,
                sequential=sequential,
                entries=entries,
            )
        )
    from lorapro_hf.kernels import torch_dense

    products = DirectionProducts(torch.zeros_like(B), torch.zeros_like(A), torch.zeros_like(A) if sequential else None)
    torch_dense.dense_update(
        moments,
        left,
        right,
        A,
        B,
        steps,
        found_inf,
        products=products,
        entries=range(len(A)) if entries is None else entries,
        betas=betas,
        eps=eps,
        compiled=chosen == "compiled",
    )
    return products


def require_backend(backend: str, device: torch.device, storage: torch.dtype) -> None:
    """Raise, before any step, if `dense_update` lacks a package or cannot serve a device.

    Raises:
        ImportError: 8-bit storage needs bitsandbytes here.
        RuntimeError: the backend cannot serve this device.
    """
    if choose_backend(backend, device) != "triton" and storage == torch.uint8:
        bitsandbytes_operators()


def choose_backend(backend: str, device: torch.device) -> str:
    """The backend for this device: the given one, or the choice of `"auto"`.

    Raises:
        RuntimeError: it cannot serve this device.
    """
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton() else "torch"
    if backend == "triton" and (device.type != "cuda" or not has_triton()):
        missing = "it is not installed, or turned off" if device.type == "cuda" else f"the factors are on {device.type}"
        raise RuntimeError(f"backend='triton' needs CUDA and the package triton, but {missing}. Use backend='auto'.")
    return backend
