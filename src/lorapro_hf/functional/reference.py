"""What LoRA-Pro computes, written densely in float64 for reading and for the tests.

Everything here forms m x n matrices and inverts without care for cost; it shares no code with the fast path.
Symbols as in `lorapro_hf.functional.projection`; `g` is the gradient of the adapted weight, which only an oracle has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.config import TRUST_REGION

RTOL = 1e-10
FRESH_START = 0.03  # a share, of the limit, that is as good as nothing


def projected_gradient(g: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The closest equivalent gradient to `g` `(m, n)`: `P_B g + (I − P_B) g P_A`, with orthogonal projectors."""
    g, A, B = g.double(), A.double(), B.double()
    P_B = B @ torch.linalg.pinv(B, rtol=RTOL)
    P_A = torch.linalg.pinv(A, rtol=RTOL) @ A
    return P_B @ g + (g - P_B @ g) @ P_A


def factor_gradients(g: Tensor, A: Tensor, B: Tensor, scaling: float, x_mode: str = "sylvester") -> tuple[Tensor, ...]:
    """The optimal `(h_A, h_B)` for the full gradient `g` `(m, n)`, from the closed form and a dense solve for X."""
    g, A, B = g.double(), A.double(), B.double()
    grad_A, grad_B = scaling * B.T @ g, scaling * g @ A.T
    inverse_B = torch.linalg.pinv(B.T @ B, hermitian=True, rtol=RTOL)
    inverse_A = torch.linalg.pinv(A @ A.T, hermitian=True, rtol=RTOL)
    plain_A = inverse_B @ grad_A / scaling**2
    plain_B = (grad_B - B @ inverse_B @ B.T @ grad_B) @ inverse_A / scaling**2
    if x_mode == "zero":
        X = torch.zeros_like(inverse_A)
    elif x_mode == "symmetric":
        X = -0.5 * plain_A @ A.T @ inverse_A
    else:
        X = _solve_sylvester(B.T @ B, A @ A.T, -plain_A @ A.T)
    return plain_A + X @ A, plain_B - B @ X


def _solve_sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """The least-norm X with `P X + X Q = C`, by the r² x r² Kronecker system."""
    identity = torch.eye(len(P), dtype=P.dtype)
    system = torch.kron(P, identity) + torch.kron(identity, Q)  # Q is symmetric
    solution = torch.linalg.pinv(system, rtol=RTOL) @ C.reshape(-1)
    return solution.reshape(C.shape)


class DenseFullAdamW:
    """LoRA-Pro's AdamW of the full mode on one pair, in float64, fed with the full gradient itself.

    Args:
        A: `(r, n)`.
        B: `(m, r)`.
        scaling: factor in front of `B @ A`.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay of `scaling * B @ A`.
        x_mode: as in `project_lora_gradients`.
        trust_region: as in `LoRAProConfig`, a number in `[0, 1)`.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scaling: float,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        x_mode: str = "sylvester",
        trust_region: float = TRUST_REGION,
    ) -> None:
        self.A, self.B, self.scaling = A.detach().double().clone(), B.detach().double().clone(), scaling
        self.trust_region = trust_region
        self.lr, self.betas, self.eps, self.weight_decay, self.x_mode = lr, betas, eps, weight_decay, x_mode
        self.M = torch.zeros(len(B), A.shape[-1], dtype=torch.float64)
        self.V = torch.zeros_like(self.M)
        self.t = 0

    def step(self, g: Tensor) -> None:
        """One step for the full gradient `g` `(m, n)`."""
        beta1, beta2 = self.betas
        self.t += 1
        projected = projected_gradient(g, self.A, self.B)
        self.M = beta1 * self.M + (1 - beta1) * projected
        self.V = beta2 * self.V + (1 - beta2) * projected**2
        u = (self.M / (1 - beta1**self.t)) / ((self.V / (1 - beta2**self.t)).sqrt() + self.eps)
        self.spend(u)

    def spend(self, u: Tensor) -> None:
        """A linear step along u `(m, n)`."""
        h_A, h_B = factor_gradients(u, self.A, self.B, self.scaling, self.x_mode)
        keep = (1 - self.lr * self.weight_decay) ** 0.5
        self.A, self.B = keep * self.A, keep * self.B
        of_A = of_B = 1.0
        if self.trust_region:
            of_A, of_B = limited_shares(self.A, self.B, -self.lr * h_A, -self.lr * h_B, self.trust_region)
        self.A = self.A - of_A * self.lr * h_A
        self.B = self.B - of_B * self.lr * h_B


def sequential_step(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    lr_A: float,
    lr_B: float | None = None,
    trust_region: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors after the direction `u` `(m, n)` has been spent on B first and then, through the new B, on A.

    Args:
        u: `(m, n)`.
        A: `(r, n)`, already decayed.
        B: `(m, r)`, already decayed.
        scaling: factor in front of `B @ A`.
        lr_A: learning rate of A.
        lr_B: learning rate of B, by default that of A.
        trust_region: the norm that the product of both changes may have, as a share of that of `ΔB A + B ΔA`; A's
            change is shortened.
    """
    u, A, B = u.double(), A.double(), B.double()
    pinv_A = torch.linalg.pinv(A, rtol=RTOL)
    step_B = -(lr_A if lr_B is None else lr_B) / scaling * u @ pinv_A
    new_B = B + step_B
    step_A = -lr_A / scaling * torch.linalg.pinv(new_B, rtol=RTOL) @ (u - u @ pinv_A @ A)
    if trust_region is not None:
        step_A *= largest_share(A, B, lambda share: (share * step_A, step_B), trust_region)
    return A + step_A, new_B


def limited_shares(A: Tensor, B: Tensor, step_A: Tensor, step_B: Tensor, limit: float) -> tuple[float, float]:
    """What a trust region leaves of the changes of A and of B in a linear step."""
    share = largest_share(A, B, lambda x: (x * step_A, x * step_B), limit)
    return (0.0, 1.0) if share < FRESH_START * limit else (share, share)


def largest_share(A: Tensor, B: Tensor, steps: Callable[[float], tuple[Tensor, Tensor]], limit: float) -> float:
    """The largest share in [0, 1] whose `steps` keep `‖ΔB ΔA‖` within `limit` times `‖ΔB A + B ΔA‖`, by bisection."""

    def within(share: float) -> bool:
        step_A, step_B = steps(share)
        return bool((step_B @ step_A).norm() <= limit * (step_B @ A + B @ step_A).norm())

    low, high = 0.0, 1.0
    if within(high):
        return high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def change_through(change: Tensor, B: Tensor, new_B: Tensor) -> Tensor:
    """`B'⁺ B change` `(r, n)`: what A has to change by so that `B'A` moves as `change` would have moved `BA`."""
    return torch.linalg.pinv(new_B.double(), rtol=RTOL) @ B.double() @ change.double()


class DenseFactoredAdamW(DenseFullAdamW):
    """AdamW of the factored mode on one pair, in float64: a dense first moment that is kept in the tangent space.

    Args:
        update: `"linear"` or `"sequential"`.
        options: as for `DenseFullAdamW`.
    """

    def __init__(self, A: Tensor, B: Tensor, scaling: float, *, update: str = "linear", **options: Any) -> None:
        super().__init__(A, B, scaling, **options)
        self.update = update
        self.row, self.column = torch.zeros(len(B), dtype=torch.float64), torch.zeros(A.shape[-1], dtype=torch.float64)

    def step(self, g: Tensor) -> None:
        """One step for the full gradient `g` `(m, n)`."""
        u = self.direction(g)
        if self.update == "sequential":
            keep = (1 - self.lr * self.weight_decay) ** 0.5
            limit = self.trust_region or None
            self.A, self.B = sequential_step(u, keep * self.A, keep * self.B, self.scaling, self.lr, trust_region=limit)
        else:
            self.spend(u)
        self.M = projected_gradient(self.M, self.A, self.B)

    def direction(self, g: Tensor) -> Tensor:
        """Count the gradient in and return Adam's direction `(m, n)`."""
        beta1, beta2 = self.betas
        self.t += 1
        projected = projected_gradient(g, self.A, self.B)
        self.M = beta1 * self.M + (1 - beta1) * projected
        self.row = beta2 * self.row + (1 - beta2) * (projected**2).mean(1)
        self.column = beta2 * self.column + (1 - beta2) * (projected**2).mean(0)
        row, column = self.row / (1 - beta2**self.t), self.column / (1 - beta2**self.t)
        root = torch.outer(row.sqrt() + self.eps, column.sqrt() + self.eps) / (row.mean().sqrt() + self.eps)
        return torch.where(root > 0, self.M / (1 - beta1**self.t) / root, 0)
