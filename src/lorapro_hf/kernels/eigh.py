"""How are many small symmetric matrices decomposed at once, without waiting for the device?"""

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

    On CUDA a Triton kernel does this without a host-device synchronisation for r up to its `MAX_RANK`. LAPACK and
    cuSOLVER, which serve everything else, report failures to the host, for which it waits on CUDA.

    Args:
        matrices: `(K, r, r)`, float32 or float64.

    Returns:
        `(K, r)` and `(K, r, r)`, as `torch.linalg.eigh` gives them.

    Raises:
        ValueError: a matrix holds NaN or Inf (the Triton kernel returns NaN instead).
    """
    if matrices.device.type == "cuda" and has_triton():
        from lorapro_hf.kernels.triton_eigh import MAX_RANK
        from lorapro_hf.kernels.triton_eigh import symmetric_eigh as triton_eigh

        if matrices.shape[-1] <= MAX_RANK:
            return triton_eigh(matrices)
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(
            "a LoRA factor holds NaN, Inf or values out of range; go back to a checkpoint whose adapter is finite."
        ) from error
    return eigenvalues, vectors
