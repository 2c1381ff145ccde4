"""Given two factors and their gradients, which factor gradients move the weight best?

`W = W0 + s B A` with `A` `(r, n)` and `B` `(m, r)`; autograd gives `grad_A = s Bᵀ g` and `grad_B = s g Aᵀ` of the full
gradient `g`, which is never formed. Stepping along `h_A`, `h_B` moves `W`, to first order, along the equivalent
gradient `s (B h_A + h_B A)`. LoRA-Pro (arXiv 2407.18242, theorem 2.1) takes the projected gradients: the `h_A`, `h_B`
that bring it closest to `g` in the Frobenius norm. They are unique up to an r x r matrix X, which `x_mode` fixes. The
computation is described in `bases`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapro_hf.config import X_MODES, check_choice
from lorapro_hf.functional.bases import compute_dtype, factor_gradients_, gradient_coordinates, row_bases


@torch.no_grad()
def project_lora_gradients(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: float | Tensor,
    *,
    x_mode: str = "sylvester",
    rtol: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewrite the gradients of two low-rank factors so that `scaling * B @ A` moves as full fine-tuning would move it.

    Computes in float32 or, for float64 inputs, in float64 (Gram matrices always in float64 where the device has it) and
    casts back. Costs O((m + n) r²) and allocates nothing larger than the factors. NaN gradients give NaN results.

    Args:
        A: `(..., r, n)`, PEFT's `lora_A`, with any leading batch dimensions.
        B: `(..., m, r)`, PEFT's `lora_B`.
        grad_A: gradient of the loss by `A`, shaped like it.
        grad_B: gradient of the loss by `B`, shaped like it.
        scaling: the factor in front of `B @ A`; a tensor shaped like the batch dimensions gives one per pair (its
            values are not checked, which would wait for the device).
        x_mode: `"sylvester"` stays closest to `grad_A` and `grad_B`, `"symmetric"` lets both factors contribute alike,
            `"zero"` lets A do what both could. All three have the same equivalent gradient.
        rtol: directions of a factor whose squared singular value is at most `rtol` times the largest are treated as
            absent. Default: `max(r * eps(compute dtype), max(m, n) * eps(Gram dtype))`, which in float32 keeps singular
            values down to about 1e-3 of the largest (r = 8): rounding in the gradients would be amplified beyond that.

    Returns:
        `(h_A, h_B)`, in shape and dtype like `grad_A` and `grad_B`.

    Raises:
        ValueError: shapes that do not fit together, an unknown `x_mode`, a scaling of 0, or NaN or Inf in a factor (on
            the CPU; elsewhere the results are NaN, as finding out would wait for the device).
    """
    check_choice("x_mode", x_mode, X_MODES)
    _check_inputs(A, B, grad_A, grad_B, scaling)
    dtype = compute_dtype(A, B, grad_A, grad_B)
    one_A, one_B, one_grad_A, one_grad_B = (x.to(dtype).reshape(-1, *x.shape[-2:]) for x in (A, B, grad_A, grad_B))
    s = scaling.to(one_A).expand(A.shape[:-2]).reshape(-1, 1, 1) if isinstance(scaling, Tensor) else scaling

    # Under autocast the products would silently run in bf16.
    with torch.autocast(A.device.type, enabled=False):
        basis_A, basis_B = row_bases([one_A, one_B.mT], rtol)
        for name, basis in (("A", basis_A), ("B", basis_B)):
            if A.device.type == "cpu" and basis.inverse.isnan().any():
                raise ValueError(
                    f"the factor {name} holds NaN or Inf; go back to a checkpoint whose adapter is finite."
                )
        coordinates = gradient_coordinates(basis_A, basis_B, one_grad_A, one_grad_B.mT, s)
        h_A, h_B = factor_gradients_(basis_A, basis_B, coordinates, s, x_mode)
    return h_A.reshape(A.shape).to(grad_A.dtype), h_B.mT.reshape(B.shape).to(grad_B.dtype)


@torch.no_grad()
def equivalent_gradient(A: Tensor, B: Tensor, h_A: Tensor, h_B: Tensor, scaling: float | Tensor) -> Tensor:
    """The direction `scaling * (B @ h_A + h_B @ A)` in which steps along `h_A` and `h_B` move the adapted weight.

    Args:
        A: `(..., r, n)`.
        B: `(..., m, r)`.
        h_A: step direction of A, shaped like it.
        h_B: step direction of B, shaped like it.
        scaling: as in `project_lora_gradients`.

    Returns:
        `(..., m, n)`, computed in float32 at least and returned in the promoted dtype of the inputs.

    Raises:
        ValueError: shapes that do not fit together, or a scaling of 0.
    """
    _check_inputs(A, B, h_A, h_B, scaling)
    dtype = compute_dtype(A, B, h_A, h_B)
    out_dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.promote_types(h_A.dtype, h_B.dtype))
    A, B, h_A, h_B = (tensor.to(dtype) for tensor in (A, B, h_A, h_B))
    s = scaling.to(A)[..., None, None] if isinstance(scaling, Tensor) else scaling
    with torch.autocast(A.device.type, enabled=False):
        return (s * (torch.cat([B, h_B], dim=-1) @ torch.cat([h_A, A], dim=-2))).to(out_dtype)


def _check_inputs(A: Tensor, B: Tensor, like_A: Tensor, like_B: Tensor, scaling: float | Tensor) -> None:
    if A.dim() < 2 or B.dim() < 2 or A.shape[:-2] != B.shape[:-2] or A.shape[-2] != B.shape[-1]:
        raise ValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} are no factor pair; expected A (..., r, n) and B (..., m, r) "
            "with the same batch dimensions and the same r."
        )
    if like_A.shape != A.shape or like_B.shape != B.shape:
        raise ValueError(
            f"gradients {tuple(like_A.shape)}, {tuple(like_B.shape)} must be shaped like A {tuple(A.shape)} and "
            f"B {tuple(B.shape)}."
        )
    if isinstance(scaling, Tensor):
        if scaling.dim() > 0 and scaling.shape != A.shape[:-2]:
            raise ValueError(
                f"scaling {tuple(scaling.shape)} must have the batch dimensions of the factors, {tuple(A.shape[:-2])}."
            )
    elif scaling == 0:
        raise ValueError("scaling is 0: the factors do not reach the weight, so their steps cannot move it.")
