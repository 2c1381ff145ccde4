"""LoRA-Pro's AdamW: factor pairs step towards full fine-tuning, every other parameter gets `torch.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.checkpoint import check_state_dict
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.kernels.dense import require_backend
from lorapro_hf.memory import state_bytes_by_device
from lorapro_hf.moments import StackMoments, state_dtype
from lorapro_hf.pairs import LoRAPair
from lorapro_hf.stacks import Stack, StackGradient, exact_arithmetic, global_norm, read_stacks, stacks_of
from lorapro_hf.steps import (
    adjusted_gradients_,
    efficient_step,
    factored_mode_step,
    full_step,
    fused_adamw,
    longest_adjusted,
)

# Mode factored sums squares of what it reads; beyond this they overflow in float32.
_LARGEST = 1e15


class LoRAProAdamW(torch.optim.Optimizer):
    r"""AdamW whose steps on LoRA factors move the adapted weight as full fine-tuning would (arXiv 2407.18242).

    For a pair with gradients `g_A`, `g_B` and adjusted gradients `h_A`, `h_B` (see `project_lora_gradients`):

    * `mode="full"`: Adam's moments M, V are those of the equivalent gradient `s (B h_A + h_B A)`. Their direction
      `u = M̂ / (√V̂ + ε)` is spent on the factors: with `update="linear"` it is projected once more, from `s Bᵀ u` and
      `s u Aᵀ`, and both step along the result; with `update="sequential"` B steps first and A then makes up for the
      rest, so that the weight moves as meant. Weight decay multiplies both factors by `√(1 − lr·λ)`, so that `s B A`
      decays by `1 − lr·λ`; the frozen weight is not touched. Learning rates are those of full fine-tuning. State:
      8 bytes per adapted weight element, 4 with `moments_dtype="bfloat16"`.
    * `mode="full_8bit"`: the same with moments in 8 bits, about 2 bytes per element.
    * `mode="factored"`: the same with moments that are products of factor-size tensors; about half of AdamW's state.
    * `mode="efficient"`: plain AdamW on the factors, fed with `h_A`, `h_B`. Learning rates are those of LoRA.

    Parameters of no pair (biases, `modules_to_save`, DoRA magnitudes) get what `torch.optim.AdamW(fused=True)` gives
    them, to the bit. Moments of a pair are kept in float32 (float64 for float64 factors) unless the mode says
    otherwise, also for bf16 factors and through `load_state_dict`. If any gradient holds NaN or Inf (in mode factored
    also beyond 1e15) the whole step is left out and counted in `skipped_steps`; no parameter and no state changes.
    (Steps that a `GradScaler` leaves out do not reach the optimizer, nor its count.) A pair that no backward reached is
    left out of the step.

    Pairs of one shape are stepped together, and on CUDA no step waits for the device (with r beyond what the Triton
    kernel of `lorapro_hf.kernels.triton_eigh` takes, or without Triton, once).

    Args:
        params: as for any optimizer, best as named parameters: `model.named_parameters()` or groups of them. It must
            hold all factors of `pairs`.
        pairs: from `find_lora_pairs(model)`.
        lr: learning rate; groups may have their own, also A and B of one pair.
        betas: decay rates of the moments; both factors of a pair need the same, except in mode efficient.
        eps: added to the denominator; both factors of a pair need the same, except in mode efficient.
        weight_decay: decoupled weight decay.
        config: mode and projection settings, a `LoRAProConfig` or a dictionary; default `LoRAProConfig()`.

    Raises:
        ValueError: no pairs, factors missing from `params`, or hyperparameters out of range.
        ImportError: mode full_8bit needs bitsandbytes on this device.
        RuntimeError: the backend asked for cannot serve the device of the factors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Sequence[LoRAPair],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        config: LoRAProConfig | Mapping[str, Any] | None = None,
    ) -> None:
        if not pairs:
            raise ValueError("no LoRA pairs to optimize; pass find_lora_pairs(model), or use torch.optim.AdamW.")
        _check_hyperparameters(lr, betas, eps, weight_decay)
        self.config = LoRAProConfig.of(config)
        self.pairs = list(pairs)
        if self.config.keeps_dense_moments:
            for pair in self.pairs:
                require_backend(self.config.backend, pair.A.device, state_dtype(pair, self.config, "exp_avg"))
        self.last_grad_norm: Tensor | None = None
        self._stacks: list[Stack] = []
        self._moments: dict[Stack, StackMoments] = {}
        self._signature: list[Any] = []
        self._of_pairs: set[int] = set()
        self._skipped: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.param_groups[0].setdefault("skipped_steps", 0)
        self._group_of_parameters()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of ordinary parameters or of factors, as in `torch.optim.Optimizer`."""
        merged = {**self.defaults, **param_group}
        _check_hyperparameters(merged["lr"], merged["betas"], merged["eps"], merged["weight_decay"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # What a checkpoint must agree in: kept in the group because that is what state_dict saves.
        group["lora_pro_mode"] = self.config.mode
        group["moments_dtype"] = self.config.moments_dtype
        group["param_shapes"] = [list(parameter.shape) for parameter in group["params"]]

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because a gradient was not finite; reading it waits for the device."""
        recent = 0 if self._skipped is None else int(self._skipped.item())
        return self.param_groups[0]["skipped_steps"] + recent

    def estimated_state_bytes(self) -> int:
        """Bytes of optimizer state once every parameter has been stepped, the pairs' and the others'."""
        self._current_stacks()
        others = [p for _, parameters in self._others() for p in parameters if p.requires_grad]
        return sum(state_bytes_by_device(self.pairs, self.config, others).values())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step, or none if a gradient is not finite.

        Raises:
            ValueError: a closure is given, a scaling is 0, a factor is not finite or lost its place in `param_groups`.
            RuntimeError: no pair has a gradient, or one is missing for one factor of a pair, sparse or sharded. Nothing
                has been changed in any of these cases.
        """
        if closure is not None:
            raise ValueError(
                "LoRAProAdamW takes no closure, since it adjusts the gradients once per step. Call loss.backward() "
                "before step()."
            )
        stacks = self._current_stacks()
        with exact_arithmetic(stacks):
            read = read_stacks(stacks, self.config)
            if not read:
                raise RuntimeError(
                    f"none of the {len(self.pairs)} LoRA pairs has a gradient. Call loss.backward() before step(), and "
                    "build the optimizer from the model that is trained, with the adapter active that it was built for."
                )
            self._step_all(read)

    def _step_all(self, read: list[StackGradient]) -> None:
        others = [(group, [p for p in own if p.grad is not None]) for group, own in self._others()]
        gradients = [p.grad for _, parameters in others for p in parameters if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise RuntimeError("a parameter has a sparse gradient, which AdamW does not take; use sparse=False.")
        skip = self._measure(read, gradients)
        adjusted = []
        if self.config.mode == "efficient":
            adjusted = [adjusted_gradients_(each, self.config.x_mode) for each in read]
        # Allocated before anything is stepped: where memory does not suffice, nothing has been changed.
        moments_of = [self._moments_of(each.stack) for each in read]
        self._skipped = skip.clone() if self._skipped is None else self._skipped.add_(skip.to(self._skipped.device))
        for group, parameters in others:
            self._step_others(parameters, group, skip)
        while read:  # what a stack was read into is let go once it is stepped
            each, moments = read.pop(), moments_of.pop()
            there = skip.to(each.stack.device)
            groups = (self.param_groups[each.stack.groups[0]], self.param_groups[each.stack.groups[1]])
            moments.count_step(each.live, there)
            if self.config.mode == "efficient":
                efficient_step(each, adjusted.pop(), moments, groups, there)
            elif self.config.mode == "factored":
                factored_mode_step(each, moments, groups, there, self.config)
            else:
                full_step(each, moments, groups, there, self.config)

    def _measure(self, read: list[StackGradient], gradients: list[Tensor]) -> Tensor:
        """Set `last_grad_norm`; 1 if the step must be left out, else 0: float32 on the device of the first stack."""
        norm = global_norm(read)
        # A norm tells whether all that it was taken of is finite, without another pass over it.
        lengths = [norm]
        if self.config.mode == "efficient":
            lengths += [longest_adjusted(each, norm) for each in read]
        if gradients:
            lengths.append(_largest(gradients))
        dtype = torch.float64 if any(length.dtype == torch.float64 for length in lengths) else torch.float32
        longest = torch.stack([length.to(norm.device, dtype) for length in lengths]).amax()
        limit = _LARGEST if self.config.mode == "factored" else float("inf")
        self.last_grad_norm = norm
        return (~(longest.isfinite() & (longest <= limit))).float()

    def _current_stacks(self) -> list[Stack]:
        """The pairs in stacks, built anew when parameters or groups have been replaced."""
        factors = [factor for pair in self.pairs for factor in (pair.A, pair.B, *pair.tied_parameters)]
        signature = [
            list(map(id, factors)),
            [factor.dtype for factor in factors],
            [factor.device for factor in factors],
            [list(map(id, group["params"])) for group in self.param_groups],
        ]
        if signature != self._signature:
            positions = self._group_of_parameters()
            self._stacks = stacks_of(self.pairs, lambda pair: (positions[id(pair.A)], positions[id(pair.B)]))
            self._moments, self._signature = {}, signature
            self._of_pairs = set(map(id, factors))
        for stack in self._stacks:
            self._check_groups(stack.pairs[0].name, *stack.groups)
        return self._stacks

    def _moments_of(self, stack: Stack) -> StackMoments:
        """What is remembered of a stack; taken over from the state when that has been loaded or moved."""
        moments = self._moments.get(stack)
        if moments is None or not moments.is_shown_by(self.state):
            moments = self._moments[stack] = StackMoments(stack, self.config)
            moments.adopt(self.state)
        return moments

    def _group_of_parameters(self) -> dict[int, int]:
        """The position of each parameter's group, after checking that all factors are there."""
        positions = {id(p): position for position, group in enumerate(self.param_groups) for p in group["params"]}
        for pair in self.pairs:
            A, B = pair.A, pair.B
            if any(id(factor) not in positions for factor in (A, B, *pair.tied_parameters)):
                raise ValueError(
                    f"{pair.name}: its factors are not in the optimizer's param_groups. Build the optimizer from the "
                    "model it trains, after moving or wrapping it: create_lorapro_optimizer(model, lr=...)."
                )
            self._check_groups(pair.name, positions[id(A)], positions[id(B)])
        return positions

    def _check_groups(self, name: str, position_A: int, position_B: int) -> None:
        """Raise if the two groups of a pair ask for what one pair of moments cannot give."""
        of_A, of_B = self.param_groups[position_A], self.param_groups[position_B]
        if of_A is of_B or self.config.mode == "efficient":
            return
        if (*of_A["betas"], of_A["eps"]) != (*of_B["betas"], of_B["eps"]):
            raise ValueError(
                f"{name}: lora_A and lora_B have different betas or eps, but mode {self.config.mode!r} keeps one pair "
                "of moments for both. Give both groups the same, or use mode 'efficient'."
            )

    def _others(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The parameters of no pair, group by group."""
        return [(group, [p for p in group["params"] if id(p) not in self._of_pairs]) for group in self.param_groups]

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor) -> None:
        """What torch.optim.AdamW does, for the parameters of no pair."""
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                    exp_avg_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
                )
        for kind in {(p.device, p.dtype) for p in parameters}:  # on CUDA the kernel takes one dtype at a time
            there, own = skip.to(kind[0]), [p for p in parameters if (p.device, p.dtype) == kind]
            states = [self.state[p] for p in own]
            exp_avgs, exp_avg_sqs, steps = ([state[n] for state in states] for n in ("exp_avg", "exp_avg_sq", "step"))
            torch._foreach_add_(steps, 1 - there)
            gradients = [p.grad for p in own if p.grad is not None]
            fused_adamw(own, gradients, exp_avgs, exp_avg_sqs, steps, group, there)

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim.Optimizer`: tensors by parameter, and the groups."""
        self._settle_skipped()
        return super().state_dict()

    def _settle_skipped(self) -> None:
        self.param_groups[0]["skipped_steps"] = self.skipped_steps
        self._skipped = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, keeping the moments of factors in float32 at least.

        Raises:
            ValueError: the checkpoint is of another mode, rank or model, or of another optimizer. Nothing has been
                changed then.
        """
        check_state_dict(state_dict, self.param_groups, self.pairs, self.config)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        loaded = [parameter for group in self.param_groups for parameter in group["params"]]
        pair_of = {id(factor): pair for pair in self.pairs for factor in (pair.A, pair.B)}
        of_factors = {key for key, parameter in zip(saved, loaded, strict=True) if id(parameter) in pair_of}
        # torch would cast moments to the dtype of the factors, which rounds those of bf16 factors and blows 8-bit codes
        # up to four times their size: it gets the others only.
        others = {key: value for key, value in state_dict["state"].items() if key not in of_factors}
        super().load_state_dict({**state_dict, "state": others})
        self._skipped, self._moments = None, {}
        for key, parameter in zip(saved, loaded, strict=True):
            own = state_dict["state"].get(key, {})
            if key in of_factors:
                pair = pair_of[id(parameter)]
                dtypes = {name: state_dtype(pair, self.config, name) for name in own if name != "step"}
                self.state[parameter] = {n: own[n].to(parameter.device, d, copy=True) for n, d in dtypes.items()}
            if "step" in own:
                step = torch.as_tensor(own["step"], dtype=torch.float32, device=parameter.device)
                self.state[parameter]["step"] = step.clone()

    def __getstate__(self) -> dict[str, Any]:
        self._settle_skipped()
        of_this_run: dict[str, Any] = {"_stacks": [], "_moments": {}, "_signature": [], "_of_pairs": set()}
        of_this_run |= {"last_grad_norm": None, "_skipped": None}
        return {**super().__getstate__(), "pairs": self.pairs, "config": self.config, **of_this_run}


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in any of the tensors; NaN and Inf come through."""
    if tensors[0].device.type == "cpu":  # where norms of infinite order take twenty times as long
        extremes = [x.double() for tensor in tensors if tensor.numel() for x in torch.aminmax(tensor)]
        return torch.stack(extremes).abs().amax() if extremes else torch.zeros(())
    return torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))


def _check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not isinstance(lr, int | float | Tensor) or not 0 <= lr < float("inf"):
        raise ValueError(f"lr={lr!r} must be a finite number of at least 0.")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas={betas!r} must be two numbers in [0, 1).")
    if not eps >= 0:
        raise ValueError(f"eps={eps!r} must be at least 0.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r} must be at least 0.")
