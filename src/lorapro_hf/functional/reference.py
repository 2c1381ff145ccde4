"""What does LoRA-Pro compute? Written densely in float64, for reading and for the tests.

These functions form and invert m x n matrices, and share no code with the fast path. Symbols are those of `projection`;
`g` is the gradient of the adapted weight, which only tests know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(eq=False)
class Hyperparameters:
    """The settings of a dense AdamW, named as in `create_lorapro_optimizer` and `LoRAProConfig`.

    `longest` is the largest norm that a step of the weight may have, `None` for no limit.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    x_mode: str = "sylvester"
    longest: float | None = None


class DenseFullAdamW(Hyperparameters):
    """LoRA-Pro's AdamW of mode full on one pair A `(r, n)`, B `(m, r)`, in float64, from the full gradient itself."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float, **hyperparameters: Any) -> None:
        super().__init__(**hyperparameters)
        self.A, self.B, self.scaling = A.detach().double().clone(), B.detach().double().clone(), scaling
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
        step_A, step_B = -self.lr * h_A, -self.lr * h_B
        keep = (1 - self.lr * self.weight_decay) ** 0.5
        kept = kept_fraction(self.scaling * ((self.B + step_B) @ (self.A + step_A) - self.B @ self.A), self.longest)
        self.A, self.B = keep * self.A + kept * step_A, keep * self.B + kept * step_B


def sequential_step(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    lr_A: float,
    lr_B: float | None = None,
    keep: tuple[float, float] = (1.0, 1.0),
    longest: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors after a step along `u` `(m, n)` of B first and then, through the new B, of A.

    Decay leaves the fractions `keep` of A and B. A step longer than `longest` is shortened.
    """
    u, A, B = u.double(), A.double(), B.double()
    decayed_A, decayed_B = keep[0] * A, keep[1] * B
    pinv_A = torch.linalg.pinv(decayed_A, rtol=RTOL)
    step_B = -(lr_A if lr_B is None else lr_B) / scaling * u @ pinv_A
    through_B = torch.linalg.pinv(decayed_B + step_B, rtol=RTOL)
    step_A = -lr_A / scaling * through_B @ (u - u @ pinv_A @ decayed_A)
    kept = kept_fraction(scaling * ((B + step_B) @ (A + step_A) - B @ A), longest)
    return decayed_A + kept * step_A, decayed_B + kept * step_B


def kept_fraction(D: Tensor, longest: float | None) -> float:
    """The largest fraction of a step `D` `(m, n)` whose Schatten norm of order 16 is at most `longest`."""
    if longest is None or not D.any():
        return 1.0
    singular = torch.linalg.svdvals(D)
    length = singular[0] * ((singular / singular[0]) ** 16).sum() ** (1 / 16)
    return min(1.0, longest / float(length))


def change_through(change: Tensor, B: Tensor, new_B: Tensor) -> Tensor:
    """`B'⁺ B change` `(r, n)`: the change of A that moves `B'A` as `change` would have moved `BA`."""
    return torch.linalg.pinv(new_B.double(), rtol=RTOL) @ B.double() @ change.double()


def lengthened(change: Tensor, B: Tensor, lr: float) -> Tensor:
    """`(I + 0.25 (BᵀB + n γ²)⁻¹)^½ change` `(r, n)`: the change of A of mode efficient, by an eigendecomposition."""
    B, change = B.double(), change.double()
    identity = torch.eye(B.shape[1], dtype=torch.float64)
    square = identity + 0.25 * torch.linalg.inv(B.T @ B + change.shape[1] * lr**2 * identity)
    values, vectors = torch.linalg.eigh((square + square.T) / 2)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T @ change


class DenseFactoredAdamW(DenseFullAdamW):
    """AdamW of mode factored on one pair, in float64, with a dense first moment in the tangent space."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float, *, update: str = "linear", **hyperparameters: Any) -> None:
        super().__init__(A, B, scaling, **hyperparameters)
        self.update = update
        self.row, self.column = torch.zeros(len(B), dtype=torch.float64), torch.zeros(A.shape[-1], dtype=torch.float64)

    def step(self, g: Tensor) -> None:
        """One step for the full gradient `g` `(m, n)`."""
        u = self.direction(g)
        if self.update == "sequential":
            keep = ((1 - self.lr * self.weight_decay) ** 0.5,) * 2
            self.A, self.B = sequential_step(u, self.A, self.B, self.scaling, self.lr, keep=keep, longest=self.longest)
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


class DenseSpectral(DenseFactoredAdamW):
    """Mode spectral on one pair, in float64.

    Args:
        iterations: how often polar factor and projection are repeated.
        hyperparameters: as for `DenseFactoredAdamW`; the second beta and `eps` play no role.
    """

    def __init__(self, A: Tensor, B: Tensor, scaling: float, *, iterations: int = 1, **hyperparameters: Any) -> None:
        super().__init__(A, B, scaling, **hyperparameters)
        self.iterations = iterations

    def step(self, g: Tensor) -> None:
        """One step for the full gradient `g` `(m, n)`, none if it is 0."""
        if g.any():
            super().step(g)

    def direction(self, g: Tensor) -> Tensor:
        """Count the gradient in and return `0.2 √max(m, n) P_T(msign N)` `(m, n)`."""
        beta = self.betas[0]
        projected = projected_gradient(g, self.A, self.B)
        self.M = beta * self.M + (1 - beta) * projected
        u = beta * self.M + (1 - beta) * projected
        for _ in range(self.iterations):
            u = projected_gradient(polar_factor(u), self.A, self.B)
        return 0.2 * max(g.shape) ** 0.5 * u


class DenseRite(Hyperparameters):
    """Mode rite on one pair, in float64, with QR decompositions of both factors as in the paper.

    Args:
        clip, skip, escape: the settings `rite_clip`, `rite_skip` and `rite_escape`.
        hyperparameters: as for `DenseFullAdamW`; the step is linear, without `x_mode`.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scaling: float,
        *,
        clip: float = 1.0,
        skip: float = 1.0,
        escape: bool = False,
        **hyperparameters: Any,
    ) -> None:
        super().__init__(**hyperparameters)
        self.A, self.B, self.scaling = A.detach().double().clone(), B.detach().double().clone(), scaling
        self.clip, self.skip, self.escape, self.t = clip, skip, escape, 0
        r = len(A)
        self.M = [torch.zeros(rows, r, dtype=torch.float64) for rows in (A.shape[-1], len(B))]
        self.V = [torch.zeros(r, r, dtype=torch.float64) for _ in range(2)]
        self.rho = [0.0, 0.0]

    def unmagnified(self, g: Tensor) -> list[Tensor]:
        """ḡ of A `(n, r)` and ḡ of B `(m, r)` for the full gradient `g` `(m, n)`; zeros where they are skipped."""
        (_, of_A), (_, of_B) = _orthonormal(self.A.T), _orthonormal(self.B)
        found = [self.scaling * g.double().T @ self.B @ of_B, self.scaling * g.double() @ self.A.T @ of_A]
        return [each * (not self.skip or each.square().mean().sqrt() <= self.skip) for each in found]

    def step(self, g: Tensor, norm: float | None = None) -> None:
        """One step for the full gradient `g` `(m, n)`; `norm` is that of ḡ of all pairs, by default of this pair."""
        unmagnified = self.unmagnified(g)
        norm = float(torch.cat(unmagnified).norm()) if norm is None else norm
        clipped = min(1.0, self.clip / norm) if self.clip and norm else 1.0
        (old_A, inverse_A), (old_B, inverse_B) = _orthonormal(self.A.T), _orthonormal(self.B)
        self.t += 1
        beta1, beta2 = (beta * (1 - beta ** (self.t - 1)) / (1 - beta**self.t) for beta in self.betas)
        for side, each in enumerate(clipped * found for found in unmagnified):
            self.V[side] = beta2 * self.V[side] + (1 - beta2) * each.T @ each / len(each)
            self.rho[side] *= beta2
            values, vectors = torch.linalg.eigh(self.V[side])
            root = (values.clamp_min(0) + self.eps**2 + self.rho[side]).sqrt() + self.eps
            self.M[side] = beta1 * self.M[side] + (1 - beta1) * each @ (vectors / root) @ vectors.T
        step_A, step_B = -self.lr * inverse_B @ self.M[0].T, -self.lr * self.M[1] @ inverse_A.T
        keep = (1 - self.lr * self.weight_decay) ** 0.5
        kept = kept_fraction(self.scaling * ((self.B + step_B) @ (self.A + step_A) - self.B @ self.A), self.longest)
        self.A, self.B = keep * self.A + kept * step_A, keep * self.B + kept * step_B
        for side, (old, factor) in enumerate(((old_B, self.B), (old_A, self.A.T))):
            P = _orthonormal(factor)[0].T @ old
            carried = P @ self.V[side] @ P.T
            if self.escape:
                self.rho[side] += _second_moment_lost(self.V[side], carried)
            self.M[side], self.V[side] = self.M[side] @ P.T, carried


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The basis `Q R R⁺` of the columns and `R⁺`."""
    r = columns.shape[1]
    square = torch.cat([columns, columns.new_zeros(r, r)])  # R is r x r even for fewer rows
    inverse = torch.linalg.pinv(torch.linalg.qr(square).R, rtol=RTOL)
    return columns @ inverse, inverse


def _second_moment_lost(old: Tensor, new: Tensor) -> float:
    eigenvalue = (torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(new)).max()
    return max(0.0, min(float(eigenvalue), float(old.trace() - new.trace())))


def polar_factor(matrix: Tensor) -> Tensor:
    """`U Vᵀ` of the singular value decomposition, without the directions that are absent."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    present = S[0] * RTOL**0.5 < S
    return U[:, present] @ Vh[present]
