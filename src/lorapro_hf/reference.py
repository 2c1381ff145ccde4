"""What LoRA-Pro computes, written densely in float64 for reading and for the tests.

Everything here forms m x n matrices and inverts without care for cost; it shares no code with the fast path.
Symbols as in `lorapro_hf.projection`; `g` is the gradient of the adapted weight, which only an oracle has.
"""

from __future__ import annotations

import torch
from torch import Tensor

RTOL = 1e-10


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
    ) -> None:
        self.A, self.B, self.scaling = A.detach().double().clone(), B.detach().double().clone(), scaling
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
        h_A, h_B = factor_gradients(u, self.A, self.B, self.scaling, self.x_mode)
        keep = (1 - self.lr * self.weight_decay) ** 0.5
        self.A = keep * self.A - self.lr * h_A
        self.B = keep * self.B - self.lr * h_B
