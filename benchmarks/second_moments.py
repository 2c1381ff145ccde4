"""Compares row and column means of the second moment with other cheap estimates of it, and modes in training.

    python benchmarks/second_moments.py           # about three minutes on one core; no GPU, no download
    python benchmarks/second_moments.py --quick   # a few steps of one seed, to see that it runs; keeps no file

Prints the two tables of `docs/factored.md` and writes them to `second_moments.md` beside this script, or to `--output`:

* Along the trajectory of mode full (dense moments, sequential step), each estimate of V gets the same factors and
  second moments at every step. The table shows how close its change of `s B A` is to that of mode full.
* Every mode and update is trained at several learning rates in float64. The table shows the loss at the best rate.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.functional.bases import row_basis
from lorapro_hf.functional.reference import DenseFactoredAdamW, projected_gradient, sequential_step

RANK, SCALING, BETAS, EPS, WARM_UP, LAST = 8, 2.0, (0.9, 0.999), 1e-12, 8, 40
FOLLOWED_LR = 1e-2
COLUMNS: dict[str, dict[str, Any] | None] = {"full fine-tuning": None} | {
    f"{mode}, {update}": {"mode": mode, "update": update, "trust_region": 0}
    for mode in ("full", "factored")
    for update in ("linear", "sequential")
}


class Size(NamedTuple):
    """How much to run."""

    seeds: tuple[int, ...] = (0, 1, 2)
    followed: int = 80
    trained: tuple[int, int] = (150, 200)  # steps on the regression and on the network
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


QUICK = Size(seeds=(0,), followed=8, trained=(4, 4), rates=(1e-2, 3e-2))


class Problem(nn.Module):
    """Linear layers to fine-tune; each call gives the loss of another batch, drawn from the problem's own generator."""

    def __init__(self, seed: int, tokens: int) -> None:
        super().__init__()
        self.generator, self.tokens = torch.Generator().manual_seed(seed), tokens

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


class Regression(Problem):
    """A 48 × 64 weight with a decaying spectrum to be found from zero; inputs, outputs and noise are uneven."""

    def __init__(self, seed: int, tokens: int) -> None:
        super().__init__(seed, tokens)
        m, n = 48, 64
        U, V = (torch.linalg.qr(self._normal(size, size)).Q for size in (m, n))
        self.target = 3 * (U * torch.arange(1, m + 1, dtype=torch.float64) ** -0.7) @ V[:, :m].T
        self.of_inputs, self.of_outputs = (0.7 * self._normal(n)).exp(), (0.5 * self._normal(m)).exp()
        self.first = _linear(torch.zeros(m, n, dtype=torch.float64))

    def forward(self) -> Tensor:
        """Half the mean square of the weighted errors."""
        x = (self._normal(len(self.of_inputs), self.tokens) * self.of_inputs[:, None]).T
        noise = 0.5 * self._normal(len(self.of_outputs), self.tokens).T
        errors: Tensor = (self.first(x) - x @ self.target.T + noise) * self.of_outputs
        return 0.5 * errors.square().mean()


class Network(Problem):
    """Two layers that classify sums of two token embeddings as a shifted copy would; token i has frequency 1/i."""

    def __init__(self, seed: int, tokens: int) -> None:
        super().__init__(100 + seed, tokens)
        d, h, c = 40, 64, 24
        self.embeddings = self._normal(200, d) * (0.5 * self._normal(d)).exp()
        first, second = self._normal(h, d) / d**0.5, self._normal(c, h) / h**0.5
        self.target = (first + 0.8 * self._normal(h, d) / d**0.5, second + 0.8 * self._normal(c, h) / h**0.5)
        self.first, self.second = _linear(first), _linear(second)
        self.frequencies = 1 / torch.arange(1, 201, dtype=torch.float64)

    def forward(self) -> Tensor:
        """Cross-entropy against the class that the target finds most likely."""
        drawn = [torch.multinomial(self.frequencies, self.tokens, True, generator=self.generator) for _ in range(2)]
        x = self.embeddings[torch.stack(drawn)].sum(0)
        label = (torch.tanh(x @ self.target[0].T) @ self.target[1].T).argmax(1)
        return cross_entropy(3 * self.second(torch.tanh(self.first(x))), label)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def _first_factors(problem: nn.Module, seed: int) -> list[Tensor]:
    """PEFT's first A, uniform in ±1/√n, of each layer; drawn here in float64. B starts as zero."""
    generator = torch.Generator().manual_seed(seed + 7)
    widths = [layer.in_features for layer in problem.children() if isinstance(layer, nn.Linear)]
    return [(2 * torch.rand(RANK, n, generator=generator, dtype=torch.float64) - 1) / n**0.5 for n in widths]


def best_rank_three(V: Tensor) -> Tensor:
    """The closest matrix of rank three to 1/√V."""
    U, S, Vh = torch.linalg.svd(1 / (V.sqrt() + 1e-6 * V.mean().sqrt()), full_matrices=False)
    closest: Tensor = (U[:, :3] * S[:3]) @ Vh[:3]
    return closest


# What M̂ is multiplied with where full mode has 1/√V̂, made of the mean squares that an estimate would keep.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "its root only (`D^(-1/4) M D^(-1/4)`)": lambda V: torch.outer(V.mean(1), V.mean(0)) ** -0.25,
    "column means only": lambda V: V.mean(0).rsqrt().expand_as(V),
    "row means only": lambda V: V.mean(1, keepdim=True).rsqrt().expand_as(V),
    "the smaller of the two": lambda V: torch.minimum(V.mean(0), V.mean(1, keepdim=True)).rsqrt(),
    "one number": lambda V: V.mean().rsqrt().expand_as(V),
    "best rank three of the dense 1/√V (needs V)": best_rank_three,
}
RANK_ONE, POLAR = "**row and column means, rank one**", "elementwise in the polar coordinates"


class PolarMoments:
    """Second moments of each entry of the coordinates `B̂ᵀ g̃` and `(I − P_B) g̃ Âᵀ`.

    When the factors move, they are carried over with the squared overlaps of the polar factors: there is no room for
    the cross terms that would make this exact.
    """

    def __init__(self) -> None:
        self.polar: tuple[Tensor, Tensor] | None = None
        self.V_a, self.V_b = torch.zeros(()), torch.zeros(())

    def direction(self, projected: Tensor, M: Tensor, pair: tuple[Tensor, Tensor], floor: Tensor, t: int) -> Tensor:
        """Count the projected gradient in and divide M by the roots, to which `floor` is added, in coordinates."""
        a, b = (basis.vectors[0] @ basis.rows[0] for basis in (row_basis(pair[0][None]), row_basis(pair[1].T[None])))
        if self.polar is not None:
            self.V_a = (b @ self.polar[1].T).square() @ self.V_a
            self.V_b = self.V_b @ (a @ self.polar[0].T).square().T
        self.polar = a, b
        beta = BETAS[1]
        (g_a, g_b), (M_a, M_b) = ((b @ X, (X - b.T @ (b @ X)) @ a.T) for X in (projected, M))
        self.V_a, self.V_b = beta * self.V_a + (1 - beta) * g_a**2, beta * self.V_b + (1 - beta) * g_b**2
        roots = [(V / (1 - beta**t)).sqrt() + floor for V in (self.V_a, self.V_b)]
        m, n = M.shape
        # Each coordinate becomes about ±1; the norm should be that of a direction whose m n entries are ±1.
        u: Tensor = b.T @ (M_a / roots[0]) + (M_b / roots[1]) @ a
        return u * math.sqrt(m * n / (RANK * (m + n)))


class Follower:
    """Mode full on one pair, and beside it the steps that the estimates of V would have taken."""

    def __init__(self, A: Tensor, m: int) -> None:
        self.A, self.B = A, A.new_zeros(m, RANK)
        # Keeps the first moment in the tangent space and the means of g̃∘g̃, and gives the rank-one direction.
        self.factored = DenseFactoredAdamW(self.A, self.B, SCALING, lr=0.0, betas=BETAS, eps=EPS)
        self.polar, self.M, self.V = PolarMoments(), torch.zeros(m, A.shape[1], dtype=A.dtype), A.new_zeros(())

    def step(self, g: Tensor, lr: float) -> dict[str, tuple[float, float]]:
        """Take full mode's step; gives (cosine, ratio of norms) of each estimate's change of `s B A` to full mode's."""
        projected, (beta1, beta2) = projected_gradient(g, self.A, self.B), BETAS
        self.M, self.V = beta1 * self.M + (1 - beta1) * projected, beta2 * self.V + (1 - beta2) * projected**2
        directions = {RANK_ONE: self.factored.direction(g)}
        t = self.factored.t
        V, carried = self.V / (1 - beta2**t), self.factored.M / (1 - beta1**t)
        directions |= {name: carried * weight(V) for name, weight in WEIGHTS.items()}
        directions[POLAR] = self.polar.direction(projected, carried, (self.A, self.B), 1e-3 * V.mean().sqrt(), t)
        before = self.B @ self.A
        A, B = sequential_step(self.M / (1 - beta1**t) / (V.sqrt() + EPS), self.A, self.B, SCALING, lr)
        full, compared = B @ A - before, {}
        for name, u in directions.items():
            of_A, of_B = sequential_step(u, self.A, self.B, SCALING, lr)
            change = of_B @ of_A - before
            ratio = change.norm() / full.norm()
            compared[name] = (float((change * full).sum() / full.norm() ** 2 / ratio), float(ratio))
        self.A, self.B = self.factored.A, self.factored.B = A, B
        self.factored.M = projected_gradient(self.factored.M, A, B)
        return compared


def follow(kind: type[Problem], size: Size) -> dict[str, Tensor]:
    """For each estimate, `(steps, seeds · layers, 2)`: cosines and ratios of norms."""
    runs: dict[str, list[Tensor]] = {}
    for seed in size.seeds:
        weights = list((problem := kind(seed, tokens=48)).parameters())
        first = [weight.detach().clone() for weight in weights]
        pairs = [Follower(A, len(W)) for A, W in zip(_first_factors(problem, seed), weights, strict=True)]
        steps = []
        for t in range(size.followed):
            for W, start, pair in zip(weights, first, pairs, strict=True):
                W.data = start + SCALING * pair.B @ pair.A
            gradients, lr = torch.autograd.grad(problem(), weights), FOLLOWED_LR * min(1, (t + 1) / WARM_UP)
            steps.append([pair.step(g, lr) for pair, g in zip(pairs, gradients, strict=True)])
        for name in steps[0][0]:
            runs.setdefault(name, []).append(torch.tensor([[of_pair[name] for of_pair in step] for step in steps]))
    return {name: torch.cat(values, dim=1) for name, values in runs.items()}


def train(kind: type[Problem], tokens: int, steps: int, config: dict[str, Any] | None, lr: float, size: Size) -> Tensor:
    """Mean loss of the last steps, `(seeds,)`; all seeds side by side. `config` None: full fine-tuning."""
    problems = nn.ModuleList([kind(seed, tokens) for seed in size.seeds])
    starts = [A for seed, problem in zip(size.seeds, problems, strict=True) for A in _first_factors(problem, seed)]
    optimizer: torch.optim.Optimizer
    if config is None:
        optimizer = torch.optim.AdamW(problems.parameters(), lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
    else:
        adapter = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["first", "second"])
        model = get_peft_model(problems, adapter).double()
        optimizer = create_lorapro_optimizer(model, lr=lr, betas=BETAS, eps=EPS, config=config)
        for pair, start in zip(optimizer.pairs, starts, strict=True):
            pair.A.data.copy_(start)
    factors = [min(1, (t + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * t / steps)) for t in range(steps + 1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors.__getitem__)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([problem() for problem in problems])
        torch.autograd.backward(loss.sum())
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses[-LAST:]).mean(0)


def followed_table(size: Size) -> list[str]:
    """The estimates of V along full mode's trajectory."""
    early = size.followed // 4
    regression, network = follow(Regression, size), follow(Network, size)
    spans = f"steps 1–{early} | from {early + 1}"
    lines = [f"| estimate of V | regression, {spans} | network, {spans} |", "|---|---|---|---|---|"]
    for name in regression:
        parts = [values for of in (regression, network) for values in (of[name][:early], of[name][early:])]
        cells = []
        for cosine, ratio in (part.mean((0, 1)).tolist() for part in parts):
            shown = f"{cosine:.{2 if cosine < 0.985 else 3}f}"
            cells.append(f"{f'**{shown}**' if name == RANK_ONE else shown} / {ratio:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def trained_table(size: Size) -> list[str]:
    """The losses that the modes reach, and how far apart the seeds are."""
    lines, notes = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"], []
    for tokens, suffix in ((48, ""), (4, ", 4 tokens")):
        for kind, steps in zip((Regression, Network), size.trained, strict=True):
            runs = [[train(kind, tokens, steps, config, lr, size) for lr in size.rates] for config in COLUMNS.values()]
            cells = torch.stack([min(of, key=lambda losses: float(losses.mean().nan_to_num(math.inf))) for of in runs])
            means, spread = cells.mean(1), (cells[1:].amax(1) - cells[1:].amin(1)).min()
            name = kind.__name__.lower() + suffix
            lines.append(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means.tolist())} |")
            notes.append(f"{name} {means[1:].max() - means[1:].min():.3f} and {spread:.3f}")
    note = "Between the four modes' means, and at least between the seeds of any one of them: " + "; ".join(notes) + "."
    return [*lines, "", note]


def report(size: Size) -> str:
    """Both tables, with what they were made with."""
    seeds, rates = (", ".join(f"{value:g}" for value in values) for values in (size.seeds, size.rates))
    lines = [
        "# Second moments as row and column means\n",
        f"`python benchmarks/second_moments.py`, torch {torch.__version__} on {platform.machine()}, float64; seeds "
        f"{seeds}; rank {RANK}, scaling {SCALING:g}, betas {BETAS}.\n",
        "Cosine of, and ratio of norms to, full mode's change of `s B A` in the same step; learning rate "
        f"{FOLLOWED_LR:g}, {size.followed} steps:\n",
        *followed_table(size),
        f"\nMean loss of the last {LAST} steps of {size.trained[0]} (regression) and {size.trained[1]} (network), at "
        f"the best of the learning rates {rates}; batches of 48 tokens unless stated otherwise:\n",
        *trained_table(size),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps of one seed; writes no file unless told where")
    parser.add_argument("--output", type=Path, help="file to write (default: second_moments.md beside this script)")
    options = parser.parse_args(arguments)
    output = options.output or (None if options.quick else Path(__file__).with_suffix(".md"))
    text = report(QUICK if options.quick else Size())
    print(text, end="")
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are too small to share out, and sums keep their order
    main()
