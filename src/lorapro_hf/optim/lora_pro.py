"""LoRA-Pro's AdamW: factor pairs step towards full fine-tuning, every other parameter gets `torch.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import local
from lorapro_hf.distributed.ownership import PairOwnership
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import StackGradient, exact_arithmetic, global_norm, read_stacks
from lorapro_hf.kernels.dense import require_backend
from lorapro_hf.optim.adamw import step_adamw
from lorapro_hf.optim.finite import can_be_read, require_finite_rates
from lorapro_hf.optim.pair_optimizer import PairOptimizer
from lorapro_hf.optim.rules.base import (
    adjusted_gradients_,
    efficient_step,
    factored_mode_step,
    full_step,
    longest_adjusted,
)
from lorapro_hf.optim.state import state_dtype

# Mode factored sums squares of what it reads; beyond this they overflow in float32.
_LARGEST = 1e15


class LoRAProAdamW(PairOptimizer):
    r"""AdamW whose steps on LoRA factors move the adapted weight as full fine-tuning would (arXiv 2407.18242).

    For a pair with gradients `g_A`, `g_B` and adjusted gradients `h_A`, `h_B` (see `project_lora_gradients`):

    * `mode="full"`: Adam's moments M, V are those of the equivalent gradient `s (B h_A + h_B A)`. Their direction
      `u = M̂ / (√V̂ + ε)` is spent on the factors: with `update="linear"` it is projected once more, from `s Bᵀ u` and
      `s u Aᵀ`, and both step along the result; with `update="sequential"` B steps first and A then makes up for the
      rest, so that the weight moves as meant. `trust_region` limits the product of both changes, which shortens
      steps while B is small; without it the linear step is the paper's. Weight decay multiplies both factors by
      `√(1 − lr·λ)`, so that `s B A` decays by `1 − lr·λ`; the frozen weight is not touched. Learning rates are those
      of full fine-tuning, and upwards. State: 8 bytes per adapted weight element, 4 with `moments_dtype="bfloat16"`.
    * `mode="full_8bit"`: the same with moments in 8 bits, about 2 bytes per element.
    * `mode="factored"`: the same with moments that are products of factor-size tensors; about half of AdamW's state.
    * `mode="efficient"`: plain AdamW on the factors, fed with `h_A`, `h_B`. Learning rates are those of LoRA.

    Parameters of no pair (biases, `modules_to_save`, DoRA magnitudes) get what `torch.optim.AdamW(fused=True)` gives
    them, to the bit. Moments of a pair are kept in float32 (float64 for float64 factors) unless the mode says
    otherwise, also for bf16 factors and through `load_state_dict`. If any gradient holds NaN or Inf, or is so long that
    second moments would overflow (1e19 in float32, 1e15 in mode factored), the whole step is left out and counted in
    `skipped_steps`; no parameter and no state changes. (Steps that a `GradScaler` leaves out do not reach the
    optimizer, nor its count.) A pair that no backward reached is left out of the step.

    NaN or Inf in a factor, another parameter, a moment or a learning rate is an error that names it: before the first
    step, at saves, and where steps have been left out (on the CPU at once; on CUDA where their number is read: at the
    tenth step and, in `LoRAProTrainer`, with each log).

    After the first ten steps one warning names the pairs that had no gradient in any of them, and one the number of
    steps left out if that is half or more. A training that goes on from a checkpoint counts anew.

    Pairs of one shape are stepped together, and on CUDA no step waits for the device but the first and the tenth, for
    these checks (with r beyond what the Triton kernel of `lorapro_hf.kernels.triton_eigh` takes, or without Triton,
    each step waits once).

    Args:
        params: as for any optimizer, best as named parameters: `model.named_parameters()` or groups of them. It must
            hold all factors of `pairs`.
        pairs: from `find_lora_pairs(model)`.
        lr: learning rate; groups may have their own, also A and B of one pair.
        betas: decay rates of the moments; both factors of a pair need the same, except in mode efficient.
        eps: added to the denominator; both factors of a pair need the same, except in mode efficient.
        weight_decay: decoupled weight decay.
        config: mode and projection settings, a `LoRAProConfig` or a dictionary; default `LoRAProConfig()`.
        **settings: the settings one by one in the place of `config`: `mode="factored"`.

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
        **settings: Any,
    ) -> None:
        config = LoRAProConfig.of(config, **settings)
        if config.keeps_dense_moments:
            for pair in pairs:
                require_backend(config.backend, pair.A.device, state_dtype(pair, config, "exp_avg"))
        self.last_grad_norm: Tensor | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, pairs, defaults, config)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or none if a gradient is not finite.

        Args:
            closure: computes the loss and its gradients; called once, before any gradient is read. PyTorch Lightning
                hands in its own.

        Returns:
            The closure's result, `None` without one.

        Raises:
            ValueError: a scaling is 0, a factor or learning rate is not finite, or a factor lost its place in
                `param_groups`.
            RuntimeError: no pair has a gradient, or one is missing for one factor of a pair, or sparse; another rank
                has met an error (known at once on CPUs alone); or a closure is given under DeepSpeed. The step has
                changed nothing in any of these cases, on any rank that shares the state.
        """
        if closure is not None and self.has_engine:
            raise RuntimeError(
                "LoRAProAdamW takes no closure under DeepSpeed, whose engine runs the backward pass and the step. Call "
                "engine.backward(loss) and engine.step()."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._on_step is not None:
            self._on_step()
        else:
            with self._together():
                self._step(self._current_ownership(), self._others())
        return loss

    def _step(self, ownership: PairOwnership, others: list[tuple[dict[str, Any], list[Tensor]]]) -> None:
        has_gradient = ownership.fetch()
        if not any(has_gradient):
            raise RuntimeError(
                f"none of the {len(self.pairs)} LoRA pairs has a gradient. Call loss.backward() before step(), and "
                "build the optimizer from the model that is trained, with the adapter active that it was built for."
            )
        require_finite_rates(self._whole_groups)
        self._consolidated = None
        with exact_arithmetic(self._stacks):
            self._step_all(ownership, read_stacks(self._stacks, self.config), others)
        ownership.publish()
        if ownership.size > 1:  # distributed checkpoints take an optimizer that has no state for one that has not begun
            for pair in self.pairs:
                self.state[pair.A].setdefault("step", torch.zeros((), dtype=torch.float32))
        assert self.last_grad_norm is not None
        is_time = self.first_steps.count(has_gradient, self.last_grad_norm)
        if is_time and not self._is_being_captured():
            self.first_steps.warn(self.checked_skipped_steps())

    def _step_all(
        self, ownership: PairOwnership, read: list[StackGradient], others: list[tuple[dict[str, Any], list[Tensor]]]
    ) -> None:
        others = [(group, [p for p in own if p.grad is not None]) for group, own in others]
        gradients = [local(p.grad) for _, parameters in others for p in parameters if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise RuntimeError("a parameter has a sparse gradient, which AdamW does not take; use sparse=False.")
        norm, found_inf = self._measure(read, [gradient for gradient in gradients if gradient.numel()])
        adjusted = []
        if self.config.mode == "efficient":
            adjusted = [adjusted_gradients_(each, self.config.x_mode) for each in read]
        # Allocated before anything is stepped: where memory does not suffice, no rank has changed anything.
        moments_of = [self._moments_of(each.stack) for each in read]
        self.last_grad_norm, found_inf = ownership.agree(norm, found_inf)
        if not self._is_being_captured():
            self._require_finite_start()
        if can_be_read(found_inf) and found_inf:
            self.require_finite(state=False)
        self._found_inf = found_inf
        self._skipped = (
            found_inf.clone() if self._skipped is None else self._skipped.add_(found_inf.to(self._skipped.device))
        )
        for group, parameters in others:
            step_adamw(parameters, self.state, group, found_inf)
        while read:  # what a stack was read into is let go once it is stepped
            each, moments = read.pop(), moments_of.pop()
            there = found_inf.to(each.stack.device)
            groups = (self._whole_groups[each.stack.groups[0]], self._whole_groups[each.stack.groups[1]])
            moments.count_step(each.live, there)
            if self.config.mode == "efficient":
                efficient_step(each, adjusted.pop(), moments, groups, there, self.config)
            elif self.config.mode == "factored":
                factored_mode_step(each, moments, groups, there, self.config)
            else:
                full_step(each, moments, groups, there, self.config)

    def _measure(self, read: list[StackGradient], gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The norm of this rank's pairs, and 1 if it must skip the step, else 0: float32 on the first pair's device."""
        norm = global_norm(read).to(self.pairs[0].A.device)
        # A norm tells whether all that it was taken of is finite, without another pass over it.
        lengths = [norm]
        if self.config.mode == "efficient":
            lengths += [longest_adjusted(each, norm) for each in read]
        if gradients:
            lengths.append(_largest(gradients))
        dtype = torch.float64 if any(length.dtype == torch.float64 for length in lengths) else torch.float32
        longest = torch.stack([length.to(norm.device, dtype) for length in lengths]).amax()
        exact = {each.stack.dtype for each in read} or {torch.float32}
        limit = min(torch.finfo(dtype).max ** 0.5 for dtype in exact)  # beyond it second moments overflow
        if self.config.mode == "factored":
            limit = _LARGEST
        return norm, (~(longest <= limit)).float()  # NaN is not less than anything

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last_grad_norm": None}


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and of the engines it drives."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in any of the tensors; NaN and Inf come through."""
    if tensors[0].device.type == "cpu":  # where norms of infinite order take twenty times as long
        return torch.stack([x.double() for tensor in tensors for x in torch.aminmax(tensor)]).abs().amax()
    return torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))
