"""How are many small symmetric matrices decomposed without waiting for the device?"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


@cache
def has_triton() -> bool:
    """Whether Triton is installed and not turned off by `LORAPRO_HF_NO_TRITON=1` in the environment."""
    return find_spec("triton") is not None and os.environ.get("LORAPRO_HF_NO_TRITON", "0") in ("", "0")


def symmetric_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of symmetric positive semidefinite matrices.

    On CUDA a Triton kernel does this without a host-device synchronisation, for r up to its `MAX_RANK`. In all other
    cases LAPACK or cuSOLVER serves; on CUDA the host waits for its report of failures.

    Args:
        matrices: `(K, r, r)`, float32 or float64.

    Returns:
        `(K, r)` and `(K, r, r)`, as `torch.linalg.eigh` gives them; NaN for a matrix that holds NaN or Inf.
    """
    if matrices.device.type == "cuda" and has_triton():
        from lorapro_hf.kernels.triton_eigh import MAX_RANK
        from lorapro_hf.kernels.triton_eigh import symmetric_eigh as triton_eigh

        if matrices.shape[-1] <= MAX_RANK:
            return triton_eigh(matrices)
    # Given NaN or Inf, LAPACK fails for the whole batch or returns arbitrary values, depending on r.
    is_finite = matrices.isfinite().flatten(1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(is_finite[:, None, None], matrices, 0))
    nan = float("nan")
    return torch.where(is_finite[:, None], values, nan), torch.where(is_finite[:, None, None], vectors, nan)
