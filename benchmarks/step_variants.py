"""Compares the package's ways of spending a step on the two factors with others.

    python benchmarks/step_variants.py                   # half an hour on one core; goes on where it was stopped
    python benchmarks/step_variants.py --set seeds=[0]   # any option of `lorapro compare`

Trains with `lorapro compare` after adding the variants below to its methods; `step_variants.yaml` has the task.
The summary is copied to `step_variants/` beside this script, except with options.

The variants are written for reading, in dense tensors: Adam's direction u of the equivalent gradient is formed as a
matrix and handed to a function that moves the factors.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorapro_hf import cli, find_lora_pairs, project_lora_gradients
from lorapro_hf.commands.common import optimizers
from lorapro_hf.commands.compare import methods
from lorapro_hf.commands.compare.settings import read_settings
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.functional.bases import row_basis

HERE = Path(__file__).parent
BETAS, EPS = (0.9, 0.999), 1e-8
LIMIT = 0.1  # of a limited step: of the norm of A, or of the step to first order
DAMPING = 1e-2  # of the largest eigenvalue, added to all where a step is damped

Factors = tuple[Tensor, Tensor]
Spend = Callable[[Tensor, Tensor, Tensor, float, float, int], Factors]


def inverse_gram(rows: Tensor, damping: float = 0.0) -> Tensor:
    """`(F Fᵀ)⁺` `(r, r)` of a factor's rows, or `(F Fᵀ + damping λ_max)⁻¹` on the directions that are present."""
    basis = row_basis(rows)
    eigenvalues = basis.singular.square()
    inverse = torch.where(eigenvalues > 0, 1 / (eigenvalues + damping * eigenvalues.amax()), 0)
    return (basis.vectors * inverse) @ basis.vectors.mT


def linear(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """Both at once, as in the paper."""
    h_A, h_B = project_lora_gradients(A, B, s * (B.mT @ u), s * (u @ A.mT), s)
    return -lr * h_A, -lr * h_B


def linear_limited(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """Both at once, shortened alike so that A moves by a tenth of its norm at most."""
    d_A, d_B = linear(u, A, B, s, lr, step)
    kept_fraction = (LIMIT * A.norm() / d_A.norm().clamp_min(1e-30)).clamp_max(1)
    return kept_fraction * d_A, kept_fraction * d_B


def linear_within_first_order(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """Both at once, shortened alike: the product of the two changes is at most a tenth of their first-order change."""
    d_A, d_B = linear(u, A, B, s, lr, step)
    meant, product = (B @ d_A + d_B @ A).norm(), (d_B @ d_A).norm()
    kept_fraction = (LIMIT * meant / product.clamp_min(1e-30)).clamp_max(1)
    return kept_fraction * d_A, kept_fraction * d_B


def B_first(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int, damping: float = 0.0) -> Factors:
    """B takes its part, A the rest through the new B: the package's sequential update."""
    of_A = inverse_gram(A)
    d_B = -lr / s * (u @ A.mT) @ of_A
    new = (B + d_B).mT
    rest = new @ u
    return -lr / s * inverse_gram(new, damping) @ (rest - (rest @ A.mT) @ of_A @ A), d_B


def B_first_damped(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """The same, with small directions of the new B held back."""
    return B_first(u, A, B, s, lr, step, DAMPING)


def B_first_limited(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int, limit: float = LIMIT) -> Factors:
    """The same, A moving by a tenth of its norm at most."""
    d_A, d_B = B_first(u, A, B, s, lr, step)
    return (limit * A.norm() / d_A.norm().clamp_min(1e-30)).clamp_max(1) * d_A, d_B


def B_first_within_first_order(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """The same, A moving so far that the product of the two changes is a tenth of the change to first order at most."""
    d_A, d_B = B_first(u, A, B, s, lr, step)
    of_B, of_A, product = (d_B @ A).norm(), (B @ d_A).norm(), (d_B @ d_A).norm()
    excess = (product.square() - (LIMIT * of_A).square()).clamp_min(1e-30).sqrt()
    return (LIMIT * of_B / excess).clamp_max(1) * d_A, d_B  # the two parts of the change are at right angles


def B_first_limited_to_a_third(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """The same with a third of the norm."""
    return B_first_limited(u, A, B, s, lr, step, 1 / 3)


def B_first_limited_to_all(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """The same with the whole norm."""
    return B_first_limited(u, A, B, s, lr, step, 1.0)


def B_first_rescaled(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """The same, longer, so that the weight moves by the norm that Adam asks for in spite of the low rank."""
    d_A, d_B = B_first(u, A, B, s, lr, step)
    moved = s * (d_B @ (A + d_A) + B @ d_A)
    return B_first(u, A, B, s, lr * float(lr * u.norm() / moved.norm().clamp_min(1e-30)), step)


def A_first(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """The mirror image; at B = 0 it moves B alone, as the paper does."""
    d_B, d_A = B_first(u.mT, B.mT, A.mT, s, lr, step)
    return d_A.mT, d_B.mT


def in_turns(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """B first in odd steps, A first in even ones."""
    return (B_first if step % 2 else A_first)(u, A, B, s, lr, step)


def one_a_step(u: Tensor, A: Tensor, B: Tensor, s: float, lr: float, step: int) -> Factors:
    """B alone in odd steps, A alone in even ones, as AltLoRA does."""
    if step % 2:
        return torch.zeros_like(A), -lr / s * (u @ A.mT) @ inverse_gram(A)
    return -lr / s * inverse_gram(B.mT) @ (B.mT @ u), torch.zeros_like(B)


WAYS: Mapping[str, Spend] = {
    way.__name__: way
    for way in (
        linear,
        linear_limited,
        linear_within_first_order,
        B_first,
        B_first_damped,
        B_first_limited,
        B_first_within_first_order,
        B_first_limited_to_a_third,
        B_first_limited_to_all,
        B_first_rescaled,
        A_first,
        in_turns,
        one_a_step,
    )
}


class Variant(torch.optim.Optimizer):
    """Mode full with a step spent in another way."""

    def __init__(self, pairs: Iterable[LoRAPair], lr: float, spend: str) -> None:
        self.pairs, self.spend = list(pairs), WAYS[spend]
        super().__init__([factor for pair in self.pairs for factor in (pair.A, pair.B)], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move all factors."""
        lr = self.param_groups[0]["lr"]
        for pair in self.pairs:
            A, B, s = pair.A, pair.B, pair.scaling
            h_A, h_B = project_lora_gradients(A, B, A.grad, B.grad, s)
            state = self.state[A]
            u = self._direction(state, s * (B @ h_A + h_B @ A))
            d_A, d_B = self.spend(u, A, B, s, lr, int(state["step"]))
            A += d_A
            B += d_B

    def _direction(self, state: dict[str, Any], g: Tensor) -> Tensor:
        """Adam's direction for the gradient g: what AdamW at rate 1 subtracts from zero."""
        if not state:
            state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
        state["step"] += 1
        zero = torch.zeros_like(g)
        moments = ([state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]])
        hyper = {"lr": 1.0, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": 0.0, "eps": EPS}
        torch._fused_adamw_([zero], [g], *moments, **hyper, amsgrad=False, maximize=False)
        return zero.neg_()


def build(model: nn.Module, lr: float, spend: str) -> Variant:
    """The optimizer of a variant, as `lorapro compare` builds it."""
    return Variant(find_lora_pairs(model), lr, spend)


def register() -> None:
    """Add the variants to the methods of `lorapro compare`."""
    optimizers.BUILDERS = {**optimizers.BUILDERS, "variant": (build, {})}
    methods.METHODS = {**methods.METHODS, **{each.name: each for each in map(method, WAYS)}}


def method(way: str) -> methods.ComparedMethod:
    """A variant as a method of the comparison."""
    return methods.ComparedMethod(f"step_{way}", way.replace("_", " "), "variant", (), {"spend": way})


def main(options: list[str]) -> int:
    """Run the comparison, and keep its summary if no option has changed it."""
    register()
    code = cli.main(["compare", str(HERE / "step_variants.yaml"), *options])
    if not code and not options:
        results = Path(read_settings(HERE / "step_variants.yaml").output_dir)
        shutil.copy(results / "summary.json", HERE / "step_variants")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
