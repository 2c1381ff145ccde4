"""Do ten steps of each mode end where the dense float64 oracles do, and bfloat16 factors where they do on the CPU?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu_parts.record import Record, distance
from lorapro_hf import LoRAPair, LoRAProAdamW, LoRAProConfig, find_lora_pairs
from lorapro_hf.commands.bench.workloads import SyntheticModel, Workload
from lorapro_hf.config import MODES, UPDATES
from lorapro_hf.functional import reference
from lorapro_hf.kernels.dense import has_triton
from lorapro_hf.kernels.storage import BLOCK, dynamic_map, dynamic_thresholds
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.tangent import first_moment

SMALL_RANK = 16  # above it the Sylvester equation of the oracle, with r² unknowns, would take minutes
STEPS, LR, DECAY = 10, 3e-3, 0.1
BLOCKS = (("q_proj", 256, 224), ("down_proj", 160, 320))
# About ten times the distances seen on the CPU, for bfloat16 with noise of 1e-6 in the gradients.
FP32_LIMIT = 2e-5
STEEP_LIMIT = 6e-4  # at large ranks these modes divide by small singular values
STEEP_MODES = ("spectral", "efficient")
BF16_MOMENTS_LIMIT = 1e-2  # the dither of a second moment depends on its last bit
# A number at the border of two codes, or halfway between two numbers of bfloat16, may become either.
CODED_LIMIT = 3e-2
TWIN_LIMIT = 3e-2
MASTERS_LIMIT = 1e-2


class DenseFull(reference.DenseFullAdamW):
    """Mode full with both updates."""

    def __init__(self, *arguments: Any, update: str, **hyperparameters: Any) -> None:
        super().__init__(*arguments, **hyperparameters)
        self.update = update

    def spend(self, u: Tensor) -> None:
        """A step along u `(m, n)`."""
        if self.update == "linear":
            super().spend(u)
            return
        keep = ((1 - self.lr * self.weight_decay) ** 0.5,) * 2
        self.A, self.B = reference.sequential_step(
            u, self.A, self.B, self.scaling, self.lr, keep=keep, longest=self.longest
        )


class DenseFull8Bit(DenseFull):
    """Mode full_8bit: the moments are the nearest codes."""

    def step(self, g: Tensor) -> None:
        """One step for the full gradient `g` `(m, n)`."""
        super().step(g)
        self.M = through_codes(self.M, True)
        self.V = through_codes(self.V.sqrt(), False).square()


class DenseEfficient(reference.Hyperparameters):
    """Mode efficient, by `torch.optim.AdamW` along the projected gradients."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float, *, update: str, **hyperparameters: Any) -> None:
        super().__init__(**hyperparameters)
        self.scaling, self.update = scaling, update
        self.factors = [factor.detach().double().clone().requires_grad_() for factor in (A, B)]
        self.adamw = torch.optim.AdamW(self.factors, lr=self.lr, weight_decay=self.weight_decay)

    @property
    def A(self) -> Tensor:
        """The present A."""
        return self.factors[0].detach()

    @property
    def B(self) -> Tensor:
        """The present B."""
        return self.factors[1].detach()

    def step(self, g: Tensor) -> None:
        """One step for the full gradient `g` `(m, n)`."""
        gradients = reference.factor_gradients(g, self.A, self.B, self.scaling, self.x_mode)
        keep = 1 - self.lr * self.weight_decay
        kept_A, kept_B = keep * self.A, keep * self.B
        for factor, gradient in zip(self.factors, gradients, strict=True):
            factor.grad = gradient
        self.adamw.step()
        if self.update == "sequential":
            change = reference.change_through(self.A - kept_A, kept_B, self.B)
            self.factors[0].data.copy_(kept_A + change)


def through_codes(values: Tensor, signed: bool) -> Tensor:
    """The values after storage in 8 bits, blocks of a row sharing a scale."""
    codes, borders = dynamic_map(signed).double(), dynamic_thresholds(signed).double()[1:-1]
    parts = []
    for part in values.split(BLOCK, dim=-1):
        scale = part.abs().amax(-1, keepdim=True)
        relative = torch.where(scale > 0, part / scale, 0)
        parts.append(codes[torch.bucketize(relative, borders)] * scale)
    return torch.cat(parts, dim=-1)


def settings_of_modes(rank: int) -> list[dict[str, Any]]:
    """Every mode with every update that it has; a choice of X that the oracle can solve for at this rank."""
    chosen = []
    for mode, update in itertools.product(MODES, UPDATES):
        config = {"mode": mode, "update": update}
        if rank > SMALL_RANK and mode != "rite":
            config["x_mode"] = "symmetric"
        try:
            rule_of(LoRAProConfig(**config))
        except ValueError:  # mode rite has one way to move both factors
            continue
        chosen.append(config)
    return chosen


def oracle_of(pair: LoRAPair, config: dict[str, Any]) -> Any:
    """The dense oracle of a mode, at the factors of a pair."""
    mode, update = config["mode"], config.get("update", "linear")
    weight, region = pair.layer.get_base_layer().weight, rule_of(LoRAProConfig(**config)).trust_region
    edge = float(weight.double().norm()) * sum(size**-0.5 for size in weight.shape)
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "longest": region and region * edge}
    start = pair.A.detach().cpu(), pair.B.detach().cpu(), pair.scaling
    if mode == "rite":
        return reference.DenseRite(*start, **options)
    options["x_mode"] = config.get("x_mode", "sylvester")
    kinds: dict[str, Callable[..., Any]] = {
        "full": DenseFull,
        "full_8bit": DenseFull8Bit,
        "factored": reference.DenseFactoredAdamW,
        "spectral": reference.DenseSpectral,
        "efficient": DenseEfficient,
    }
    return kinds[mode](*start, update=update, **options)


class Run:
    """Some pairs of two shapes and their optimizer; half of the B are zero, as in a new adapter."""

    def __init__(self, rank: int, dtype: str, config: dict[str, Any], device: torch.device, is_tiny: bool) -> None:
        block = BLOCKS[:1] if rank > SMALL_RANK else BLOCKS
        if is_tiny and rank <= SMALL_RANK:
            block = tuple((name, m // 4, n // 4) for name, m, n in block)
        self.model = SyntheticModel(Workload("check", block, 2, rank, dtype), device)
        self.pairs = find_lora_pairs(self.model.model)
        with torch.no_grad():
            for pair in self.pairs[: len(block)]:
                pair.B.zero_()
        self.optimizer = LoRAProAdamW(self.model.factors, self.pairs, lr=LR, weight_decay=DECAY, config=config)
        self.starts = [self.product(pair) for pair in self.pairs]

    def product(self, pair: LoRAPair) -> Tensor:
        """`s B A` of a pair in float64 on the CPU, from master copies where there are some."""
        of_A, of_B = (self.optimizer.state.get(factor, {}).get("master", factor) for factor in (pair.A, pair.B))
        return pair.scaling * of_B.detach().cpu().double() @ of_A.detach().cpu().double()

    def moved(self) -> Tensor:
        """How far the weights have moved, all in one vector."""
        return torch.cat(
            [(self.product(p) - start).flatten() for p, start in zip(self.pairs, self.starts, strict=True)]
        )

    def gradients(self, step: int) -> list[Tensor]:
        """A dense gradient of each weight, which depends on the step."""
        found = []
        for index, pair in enumerate(self.pairs):
            generator = torch.Generator().manual_seed(1000 * step + index)
            common = torch.Generator().manual_seed(10**6 + index)
            shape = len(pair.B), pair.A.shape[1]
            steady, noise = (torch.randn(shape, generator=each, dtype=torch.float64) for each in (common, generator))
            found.append(0.1 * (steady + 0.5 * noise) * torch.linspace(0.1, 2, shape[1], dtype=torch.float64))
        return found


def factor_gradients(pair: LoRAPair, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both factors of a pair for the dense gradient `g`, in float64 on the CPU."""
    A, B = pair.A.detach().cpu().double(), pair.B.detach().cpu().double()
    return pair.scaling * B.T @ g, pair.scaling * g @ A.T


def give(pair: LoRAPair, gradients: tuple[Tensor, Tensor]) -> None:
    """Set the gradients of a pair."""
    pair.A.grad, pair.B.grad = gradients[0].to(pair.A), gradients[1].to(pair.B)


def distances_of_state(run: Run, oracles: Sequence[Any], mode: str) -> list[float]:
    """How far the moments are from those of the oracles; none for codes."""
    found = []
    for pair, oracle in zip(run.pairs, oracles, strict=True):
        of_A, of_B = (run.optimizer.state[factor] for factor in (pair.A, pair.B))
        if mode == "full":
            found += [distance(of_A["exp_avg"], oracle.M), distance(of_A["exp_avg_sq"], oracle.V)]
        elif mode in ("factored", "spectral"):
            left, right = first_moment(pair.A.detach(), pair.B.detach(), (of_A, of_B), None)
            found.append(distance(left @ right, oracle.M))
            if mode == "factored":
                found += [distance(of_A["exp_avg_sq"], oracle.column), distance(of_B["exp_avg_sq"], oracle.row)]
        elif mode == "rite":  # eigenvalues do not depend on the bases
            values = [torch.linalg.eigvalsh(each["exp_avg_sq"].cpu().double()) for each in (of_A, of_B)]
            found += [distance(v, torch.linalg.eigvalsh(V)) for v, V in zip(values, oracle.V, strict=True)]
        elif mode == "efficient":
            for state, factor in zip((of_A, of_B), oracle.factors, strict=True):
                expected = oracle.adamw.state[factor]
                found += [distance(state[name], expected[name]) for name in ("exp_avg", "exp_avg_sq")]
    return found


def limit_of(config: dict[str, Any]) -> float:
    """The largest distance of float32 factors from the oracle."""
    if config["mode"] == "full_8bit":
        return CODED_LIMIT
    if "moments_dtype" in config:
        return BF16_MOMENTS_LIMIT
    return STEEP_LIMIT if config["mode"] in STEEP_MODES else FP32_LIMIT


def against_oracle(record: Record, name: str, rank: int, config: dict[str, Any]) -> None:
    """Ten steps of float32 factors beside the dense oracle."""
    run, limit = Run(rank, "fp32", config, record.device, record.is_tiny), limit_of(config)
    oracles = [oracle_of(pair, config) for pair in run.pairs]
    for step in range(2 if record.is_tiny else STEPS):
        dense = run.gradients(step)
        norm = None
        if config["mode"] == "rite":
            parts = [part for oracle, g in zip(oracles, dense, strict=True) for part in oracle.unmagnified(g)]
            norm = float(torch.cat([part.flatten() for part in parts]).norm())
        for pair, oracle, g in zip(run.pairs, oracles, dense, strict=True):
            give(pair, factor_gradients(pair, g))
            oracle.step(g) if norm is None else oracle.step(g, norm)
        run.optimizer.step()
    products = [pair.scaling * oracle.B @ oracle.A for pair, oracle in zip(run.pairs, oracles, strict=True)]
    expected = torch.cat([(p - start).flatten() for p, start in zip(products, run.starts, strict=True)])
    record.check(f"{name}: movement of s B A", distance(run.moved(), expected), limit)
    if config["mode"] != "full_8bit" and "moments_dtype" not in config:
        record.check(f"{name}: state", max(distances_of_state(run, oracles, config["mode"])), limit)


def against_twin(record: Record, name: str, rank: int, config: dict[str, Any]) -> None:
    """Ten steps of bfloat16 factors beside the same steps on the CPU."""
    limit = MASTERS_LIMIT if config["master_factors"] else TWIN_LIMIT
    limit = CODED_LIMIT if config["mode"] == "full_8bit" else limit
    run = Run(rank, "bf16", config, record.device, record.is_tiny)
    twin = Run(rank, "bf16", config, torch.device("cpu"), record.is_tiny)
    for step in range(2 if record.is_tiny else STEPS):
        for pair, other, g in zip(run.pairs, twin.pairs, run.gradients(step), strict=True):
            gradients = factor_gradients(pair, g)
            give(pair, gradients)
            give(other, gradients)
        run.optimizer.step()
        twin.optimizer.step()
    record.check(f"{name}: movement of s B A", distance(run.moved(), twin.moved()), limit)


def check_modes(record: Record, rank: int) -> None:
    """Check every mode at one rank: float32 factors, and bfloat16 factors without and with master copies."""
    configs = settings_of_modes(rank)
    with ExitStack() as spies:
        called = [spies.enter_context(spy) for spy in _spies()] if record.on_cuda and has_triton() else []
        for config in configs:
            name = f"{config['mode']} {config['update']}, r={rank}, fp32"
            record.attempt(name, partial(against_oracle, record, name, rank, config))
        if called:
            _require_kernels(record, rank, *called)
    if rank == SMALL_RANK:
        _check_variants(record, rank)
    for config, masters in itertools.product(configs, (False, True)):
        name = f"{config['mode']} {config['update']}, r={rank}, bf16{' with masters' if masters else ''}"
        record.attempt(name, partial(against_twin, record, name, rank, {**config, "master_factors": masters}))


def _check_variants(record: Record, rank: int) -> None:
    """Moments in bfloat16, and products that would be rounded to TF32 outside a step."""
    for update in UPDATES:
        config = {"mode": "full", "update": update, "moments_dtype": "bfloat16"}
        name = f"full {update}, r={rank}, fp32, bfloat16 moments"
        record.attempt(name, partial(against_oracle, record, name, rank, config))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for mode in ("full", "factored"):
            name = f"{mode} linear, r={rank}, fp32, TF32 switched on"
            record.attempt(name, partial(against_oracle, record, name, rank, {"mode": mode, "update": "linear"}))
    finally:
        torch.set_float32_matmul_precision(before)


def _spies() -> list[Any]:
    """Counters of the calls of both Triton kernels."""
    from lorapro_hf.kernels import triton_dense, triton_eigh

    return [
        mock.patch.object(triton_eigh, "symmetric_eigh", wraps=triton_eigh.symmetric_eigh),
        mock.patch.object(triton_dense, "dense_update", wraps=triton_dense.dense_update),
    ]


def _require_kernels(record: Record, rank: int, eigh: Any, dense: Any) -> None:
    """Fail if steps have fallen back to torch."""
    from lorapro_hf.kernels.triton_eigh import MAX_RANK

    record.check(f"steps at r={rank} without the Triton kernel of dense moments", float(not dense.called), 0)
    if rank <= MAX_RANK:
        record.check(f"steps at r={rank} without the Triton eigensolver", float(not eigh.called), 0)
