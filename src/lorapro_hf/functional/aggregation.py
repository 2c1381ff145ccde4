"""Which low-rank matrices come closest to a sum of low-rank matrices? No product of both long sides is formed."""

from __future__ import annotations

import torch
from torch import Tensor

OBJECTIVES = ("cosine", "ridge")
_SMALLEST_LENGTH = 1e-9  # of B' A', beside the longest that is possible
_SMALLEST_PART = 1e-28  # of the squared norms of both matrices, for a direction to have a pole
_SECTIONS = 256
_LEVELS = 6  # 256 sections each: the interval ends at the precision of float64
_NEWTON_STEPS = 10  # six suffice: each doubles the digits, and the first guess is within a factor √r


def inner_product(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> Tensor:
    """The Frobenius inner product of `B A` and `other_B other_A`, `(..., m, r)` times `(..., r, n)`."""
    return ((B.mT @ other_B) * (A @ other_A.mT)).sum((-2, -1))


def fair_shift(
    B: Tensor, A: Tensor, target_B: Tensor, target_A: Tensor, lam: float, objective: str
) -> tuple[Tensor, Tensor]:
    """The change ΔB with which `(B + ΔB) A` is closest to a matrix W = `target_B target_A` (LoRA-FAIR's server step).

    With G = `A Aᵀ` both objectives fall apart into the eigenvectors of G:

    - `"ridge"` minimises `‖W - (B + ΔB) A‖² + λ tr(G)/r ‖ΔB‖²`, which has a closed form.
    - `"cosine"` maximises `cos(W, (B + ΔB) A) - λ ‖ΔB‖²`. The paper takes `λ ‖ΔB‖`, which holds a small ΔB more
      strongly. The best B of a given length of `B A` is the root of a secular equation, as in a trust region, and the
      length is found by a search over one number. Since the cosine does not depend on the length, `‖B + ΔB‖ <= ‖B‖`.
      The cosine does not depend on the size of B either: where `λ ‖B‖²` is far below 1, λ holds B only along the
      directions in which A is short.

    Args:
        B: `(..., m, r)`, float64.
        A: `(..., r, n)`, float64.
        target_B: `(..., m, k)`, float64.
        target_A: `(..., k, n)`, float64.
        lam: λ, from 0 on. At 0 the smallest of all best changes is returned.
        objective: `"cosine"` or `"ridge"`.

    Returns:
        ΔB `(..., m, r)`, and a bool tensor `(...)`: whether there is a maximum. There is none if the cosine grows as
        `B + ΔB` shrinks to 0; ΔB is 0 then.
    """
    D, Q = torch.linalg.eigh(A @ A.mT)
    D = D.where(D.shape[-1] * torch.finfo(D.dtype).eps * D[..., -1:] < D, 0)  # where rows of A depend on others
    spans = D > 0
    N = ((target_B @ (target_A @ A.mT)) @ Q) * spans.unsqueeze(-2)
    C = (B @ Q) * spans.unsqueeze(-2)
    if objective == "ridge":
        divisor = D + lam * D.mean(-1, keepdim=True)
        shift = (N - C * D.unsqueeze(-2)) / divisor.where(spans, 1).unsqueeze(-2)
        return shift @ Q.mT, torch.ones(D.shape[:-1], dtype=torch.bool)
    norm = inner_product(target_B, target_A, target_B, target_A).clamp(min=0).sqrt()
    best, exists = _cosine_maximiser(N, C, D, norm, lam)
    return (best - C) @ Q.mT, exists


def _cosine_maximiser(N: Tensor, C: Tensor, D: Tensor, norm: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """The X with the largest `⟨N, X⟩ / (norm √Σ d ‖x‖²) - λ ‖X - C‖²`, x the columns of X, and whether there is one."""
    # a direction of which neither has a part, such as a slot that no client uses, would be 0 / 0 at its pole
    parts = [X.square().sum(-2) for X in (N, C)]
    has_part = torch.stack([each > _SMALLEST_PART * each.sum(-1, keepdim=True) for each in parts]).any(0)
    D, N = D.where(has_part, 0), N.where(has_part.unsqueeze(-2), 0)
    is_pulled, size = (norm > 0) & N.flatten(-2).any(-1), C.norm(dim=(-2, -1))
    exists = is_pulled & (size > 0)
    longest, norm, size = (value.where(exists, 1)[..., None, None] for value in (D.amax(-1).sqrt(), norm, size))
    n, c, d = N / (norm * longest), C / size, D / longest.squeeze(-1).square()
    sums, scaled_lam = (n.square().sum(-2), (n * c).sum(-2), c.square().sum(-2)), lam * size.squeeze(-1).square()
    if lam == 0:
        best = n / d.where(d > 0, 1).unsqueeze(-2)
    else:
        length, is_inside = _best_length(*sums, d, scaled_lam)
        rho, nu = _multipliers(*sums, d, scaled_lam, length)
        best, exists = (rho.unsqueeze(-1) * n + c) / (1 + nu * d).unsqueeze(-2), exists & is_inside
    multiple = (best * c).sum((-2, -1)) / best.square().sum((-2, -1))  # the one next to C
    exists = exists & (multiple > 0)
    return torch.where(exists[..., None, None], multiple[..., None, None] * size * best, C), exists | ~is_pulled


def _best_length(nn: Tensor, nc: Tensor, cc: Tensor, d: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """The √Σ d ‖x‖² of the best X, and whether it is more than 0; lengths and d are 1 at most."""

    def value_and_slope(length: Tensor) -> tuple[Tensor, Tensor]:
        rho, nu = _multipliers(nn, nc, cc, d, lam, length)
        q = 1 / (1 + nu * d)
        cosine = ((rho * nn + nc) * q).sum(-1, keepdim=True) / length
        change = ((rho.square() * nn - 2 * rho * nu * d * nc + (nu * d).square() * cc) * q.square()).sum(-1, True)
        return cosine - lam * change, 2 * lam * nu * length.square() - cosine  # by the logarithm of the length

    parts = torch.linspace(0, 1, _SECTIONS + 1, dtype=d.dtype).reshape(-1, *(1 for _ in lam.shape))
    low, high = torch.full_like(lam, _SMALLEST_LENGTH), torch.ones_like(lam)
    lengths = low * (high / low) ** parts
    values, slopes = value_and_slope(lengths)
    index = values.argmax(0, keepdim=True)
    is_inside = (index > 0) | (slopes[:1] > 0)
    low, high = (lengths.gather(0, (index + step).clamp(0, _SECTIONS)).squeeze(0) for step in (-1, 1))
    for _ in range(_LEVELS):
        lengths = low * (high / low) ** parts
        _, slopes = value_and_slope(lengths)
        index = ((slopes > 0).sum(0, keepdim=True) - 1).clamp(0, _SECTIONS - 1)
        low, high = (lengths.gather(0, index + step).squeeze(0) for step in (0, 1))
    return (low + high) / 2, is_inside[0, ..., 0]


def _multipliers(nn: Tensor, nc: Tensor, cc: Tensor, d: Tensor, lam: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The ρ and ν of the best X = (ρ n + c) / (1 + ν d) among those with `Σ d ‖x‖² = length²`."""
    rho = 1 / (2 * lam * length)
    squares = (d * (rho.square() * nn + 2 * rho * nc + cc)).clamp(min=0)
    # Newton's iteration on 1/‖·‖, which is concave: from the left it stays on the left of the root
    nu = ((squares.sqrt() / length - 1) / d.where(d > 0, 1)).where(d > 0, -1).amax(-1, keepdim=True)
    for _ in range(_NEWTON_STEPS):
        terms = squares / (1 + nu * d).square()
        total, slope = terms.sum(-1, keepdim=True), (terms * d / (1 + nu * d)).sum(-1, keepdim=True)
        nu = nu + total * (total.sqrt() / length - 1) / slope.clamp(min=torch.finfo(d.dtype).tiny)
    return rho, nu


def truncated_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors `(..., m, rank)` and `(..., rank, n)` of the best approximation of `B A` of a rank, of equal norms.

    Args:
        B: `(..., m, k)`, float64.
        A: `(..., k, n)`, float64.
        rank: at most the smallest of m, n and k.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    root = S[..., :rank].sqrt()
    return Q_B @ U[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * (Vt[..., :rank, :] @ Q_A.mT)
