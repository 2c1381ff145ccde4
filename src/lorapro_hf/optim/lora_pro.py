"""LoRA-Pro's AdamW: factor pairs step towards full fine-tuning, every other parameter gets `torch.optim.AdamW`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import Access, local
from lorapro_hf.distributed.ownership import PairOwnership
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Gradient, Stack, exact_arithmetic, global_norm, read_natively, read_stacks
from lorapro_hf.functional.bases import Bases, row_bases
from lorapro_hf.kernels.dense import fused_adamw
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.base import UpdateRule
from lorapro_hf.optim.saving import SavedPairs

Others = list[tuple[dict[str, Any], list[Tensor]]]  # param groups with their parameters that belong to no pair


class LoRAProAdamW(SavedPairs):
    r"""AdamW whose steps on LoRA factors move the adapted weight as full fine-tuning would (arXiv 2407.18242).

    For a pair with gradients `g_A`, `g_B` and projected gradients `h_A`, `h_B` (see `project_lora_gradients`):

    * `mode="full"`: Adam's moments M, V are those of the equivalent gradient `s (B h_A + h_B A)`. Their direction
      `u = M̂ / (√V̂ + ε)` moves the factors. With `update="linear"` it is projected once more, from `s Bᵀ u` and
      `s u Aᵀ`, and both factors step along the result. With `update="sequential"` B steps first, and A then takes the
      rest through the new B, so that the weight moves as intended and not only to first order. `trust_region` shortens
      steps that are large beside the frozen weight, in every mode; without it the linear step is the paper's.
      Weight decay multiplies both factors by `√(1 − lr·λ)`, so that `s B A` decays by `1 − lr·λ`; the frozen weight
      does not decay. Learning rates are those of full fine-tuning or higher. State: 8 bytes for each element of an
      adapted weight, 4 with `moments_dtype="bfloat16"`.
    * `mode="full_8bit"`: the same with moments in 8 bits, about 2 bytes for each element.
    * `mode="factored"`: the same with moments that are products of factor-size tensors; about half of AdamW's state.
    * `mode="spectral"`: along the orthogonalised first moment of the equivalent gradient, the only moment it keeps.
      The default. It has no use for `eps` and the second beta. Learning rates are those of LoRA.
    * `mode="rite"`: LoRA-RITE, with moments of the size of the factors and of r x r. Learning rates are those of LoRA.
    * `mode="efficient"`: AdamW on the factors, along `h_A`, `h_B`. Learning rates are those of LoRA.

    Parameters of no pair (biases, `modules_to_save`, DoRA magnitudes) get the steps of `torch.optim.AdamW(fused=True)`,
    to the bit. Moments of a pair are in float32 (float64 for float64 factors) unless the mode says otherwise, also for
    bf16 factors and after `load_state_dict`. If any gradient holds NaN or Inf, or is so long that second moments would
    overflow (1e19 in float32, 1e15 in mode factored), the whole step is skipped and counted in `skipped_steps`; no
    parameter and no state changes. Steps that a `GradScaler` skips do not reach the optimizer and are not counted. A
    pair without a gradient does not take part in the step.

    NaN or Inf in a factor, another parameter, a moment or a learning rate is an error that names it. It is raised
    before the first step, at saves, and after skipped steps: on the CPU at once, on CUDA when their number is read (at
    the tenth step and, in `LoRAProTrainer`, with each log). After the first ten steps one warning names the pairs that
    had no gradient in any of them, and one the number of skipped steps if it is half or more. A resumed training counts
    from zero.

    Pairs of one shape are stepped together. On CUDA only the first and the tenth step wait for the device, for these
    checks; each step waits without Triton, and if r is beyond the limit of `lorapro_hf.kernels.triton_eigh` (in mode
    spectral beyond half of it). Other steps can be recorded in a CUDA graph, with a learning rate that is a tensor.

    An engine that keeps its own copies of parameters and gradients (DeepSpeed) calls `attach_engine` once. In each step
    it enters `engine_step()` and calls within it, in any order, `step_pairs()` when the gradients of all pairs are
    known, and `step_others(groups)` for its own tensors. `pair_state()` and `load_pair_state(read)` give and take the
    state of the pairs; `state_dict()` and `load_state_dict()` hold the groups and the state of the engine's tensors.

    Args:
        params: as for any optimizer, preferably named: `model.named_parameters()` or groups of them. They must hold
            all factors of `pairs`.
        pairs: from `find_lora_pairs(model)`.
        lr: learning rate; groups may have their own, also A and B of one pair.
        betas: decay rates of the moments; both factors of a pair need the same, except in mode efficient.
        eps: added to the denominator; both factors of a pair need the same, except in mode efficient.
        weight_decay: decoupled weight decay.
        config: mode and projection settings, a `LoRAProConfig` or a dictionary; default `LoRAProConfig()`.
        **settings: the settings one by one in the place of `config`: `mode="full"`.

    Raises:
        ValueError: no pairs, factors missing from `params`, hyperparameters out of range, or settings that have no
            meaning in the mode.
        RuntimeError: the backend cannot serve the device of the factors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Sequence[LoRAPair],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        config: LoRAProConfig | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        config = LoRAProConfig.of(config, **settings)
        rule = rule_of(config)
        for device in {pair.A.device for pair in pairs}:
            rule.check_device(device)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, pairs, defaults, config)

    def _forget_run(self) -> None:
        super()._forget_run()
        self.last_grad_norm: Tensor | None = None
        self._pairs_are_due = False
        self._found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, or none if a gradient is not finite.

        Args:
            closure: computes the loss and its gradients; called once, before any gradient is read. PyTorch Lightning
                passes its own.

        Returns:
            The closure's result, `None` without one.

        Raises:
            ValueError: a scaling is 0, a factor or learning rate is not finite, or a factor lost its place in
                `param_groups`.
            RuntimeError: no pair has a gradient, or one is missing for one factor of a pair, or sparse; another rank
                has met an error (known at once on CPUs alone); or a closure is given under DeepSpeed. In all of these
                cases the step has changed nothing, on any rank that shares the state.
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
            self._step_together(with_others=True)
        return loss

    @contextmanager
    def rewriting(self) -> Iterator[None]:
        """A context in which something else may write values into the factors, between two steps.

        Moments in coordinates of the factors are carried over to the new ones: those of modes `"factored"`,
        `"spectral"` and `"rite"`. Other moments stay. Where there are master copies, write both a copy and its factor;
        ranks that share the state then get the factors from the rank that has the copy.

        Raises:
            RuntimeError: DeepSpeed drives the optimizer.
        """
        if self.has_engine:
            raise RuntimeError("DeepSpeed keeps the factors itself, so that nothing else can write them.")
        ownership = self._current_ownership()
        stacks = [] if type(self.rule).follow is UpdateRule.follow else self._stacks
        with torch.no_grad(), exact_arithmetic(stacks):
            before = self._bases_of(stacks)
            yield
            for stack, old, new in zip(stacks, before, self._bases_of(stacks), strict=True):
                self.rule.follow(self._moments_of(stack), old, new)
            if self.config.master_factors and ownership.group is not None:
                ownership.publish()

    def _bases_of(self, stacks: Sequence[Stack]) -> list[Bases]:
        factors: list[Tensor] = []
        for stack in stacks:
            state = self._moments_of(stack)
            state.refresh_masters()
            factors += state.factors(stack.read())
        bases = row_bases(factors, self.config.rtol)
        return list(map(Bases, bases[::2], bases[1::2]))

    # ---- the seam for engines ----

    def attach_engine(self, access: Access, on_step: Callable[[], None]) -> None:
        """Leave the parameters, the gradients and the time of each step to an engine.

        From now on `access` reads and writes whole factors, and `step()` calls `on_step`. The groups may then hold
        tensors of the engine in the place of the parameters.
        """
        self.access, self._on_step = access, on_step

    @contextmanager
    def engine_step(self) -> Iterator[None]:
        """One step of an engine, which may call `step_pairs` and `step_others` within, or neither.

        `param_groups` must be whole on entry, and may be cut down within.

        Raises:
            ValueError: a parameter or its state is not finite at the first step of a training.
        """
        self._require_finite_start()  # before the engine can skip all steps by itself
        self._groups_in_step, self._pairs_are_due, self._found_inf = self.param_groups, True, None
        try:
            yield
        finally:
            self._groups_in_step, self._pairs_are_due = None, False

    @torch.no_grad()
    def step_pairs(self) -> None:
        """Step all pairs at the first call within an `engine_step`; do nothing at further calls.

        Raises:
            RuntimeError: there is no `engine_step`; otherwise as `step`.
        """
        if self._groups_in_step is None:
            raise RuntimeError("step_pairs() was called outside a step. Call it within `with engine_step():`.")
        if self._pairs_are_due:
            self._pairs_are_due = False
            self._step_together(with_others=False)

    @torch.no_grad()
    def step_others(self, groups: Iterable[dict[str, Any]]) -> None:
        """Step all tensors with a gradient in some groups by AdamW, unless `step_pairs` has skipped this step."""
        found_inf = torch.zeros(()) if self._found_inf is None else self._found_inf
        for group in groups:
            step_adamw([p for p in group["params"] if p.grad is not None], self.state, group, found_inf)

    # ---- the step ----

    def _step_together(self, with_others: bool) -> None:
        """Take a step on all ranks or, if it raises on one of them, on none: they would wait for it, or step alone."""
        try:
            ownership = self._current_ownership()
            self._step(ownership, self._others() if with_others else [])
        except Exception as error:
            if self._ownership is not None:
                self._ownership.fail(error)
            raise

    def _step(self, ownership: PairOwnership, others: Others) -> None:
        """Step the pairs of this rank and other parameters."""
        has_gradient = ownership.fetch()
        if not any(has_gradient):
            raise RuntimeError(
                f"none of the {len(self.pairs)} LoRA pairs has a gradient. Call loss.backward() before step(), and "
                "build the optimizer from the model that is trained, with the adapter active that it was built for."
            )
        require_finite_rates(self._whole_groups)
        self._consolidated = None
        self._give_edges()
        with exact_arithmetic(self._stacks):
            self._step_all(ownership, self._read(), others)
        ownership.publish()
        if ownership.size > 1:  # distributed checkpoints take an optimizer that has no state for one that has not begun
            for pair in self.pairs:
                self.state[pair.A].setdefault("step", torch.zeros((), dtype=torch.float32))
        assert self.last_grad_norm is not None
        is_time = self.first_steps.count(has_gradient, self.last_grad_norm)
        if is_time and not self._is_being_captured():
            self.first_steps.warn(self.checked_skipped_steps())

    def _read(self) -> list[Gradient]:
        return list((read_natively if self.rule.steps_natively else read_stacks)(self._stacks, self.config))

    def _step_all(self, ownership: PairOwnership, read: list[Gradient], others: Others) -> None:
        others = [(group, [p for p in own if p.grad is not None]) for group, own in others]
        gradients = [local(p.grad) for _, parameters in others for p in parameters if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise RuntimeError("a parameter has a sparse gradient, which AdamW does not take; use sparse=False.")
        norms, found_inf = self._measure(read, [gradient for gradient in gradients if gradient.numel()])
        # Allocated before anything is stepped: where memory does not suffice, no rank has changed anything.
        states = [self._moments_of(each.stack) for each in read]
        norms, found_inf = ownership.agree(norms, found_inf)
        self.last_grad_norm, shared_norm = norms
        if not self._starts_finite and not self._is_being_captured():
            self._require_finite_start()
        if can_be_read(found_inf) and found_inf:
            self.require_finite(state=False)
        self._found_inf = found_inf
        if self._skipped is None:
            self._skipped = found_inf.clone()
        else:
            self._skipped.add_(found_inf.to(self._skipped.device))
        for group, parameters in others:
            step_adamw(parameters, self.state, group, found_inf)
        rule = self.rule
        while read:  # frees the buffers of each stack as soon as it has been stepped
            each, state = read.pop(), states.pop()
            groups = (self._whole_groups[each.stack.groups[0]], self._whole_groups[each.stack.groups[1]])
            rule.take_step(each, state, groups, found_inf.to(each.stack.device), shared_norm)

    def _measure(self, read: Sequence[Gradient], gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The norms to share with other ranks `(2,)`, and 1 if this rank must skip the step, else 0, 0-dim float32.

        The norms are those of the equivalent gradients and of `UpdateRule.shared_norm`. All three lie on the device of
        the first pair. `gradients` are those of the parameters of no pair.
        """
        rule = self.rule
        norm = global_norm(read).to(self.pairs[0].A.device)
        shared = rule.shared_norm(read)
        # A norm tells whether all that it was taken of is finite, without another pass over it.
        lengths = [norm, *rule.more_norms(read, norm)]
        if gradients:
            lengths.append(_largest(gradients))
        dtype = torch.float64 if any(length.dtype == torch.float64 for length in lengths) else torch.float32
        longest = torch.stack([length.to(norm.device, dtype) for length in lengths]).amax()
        limit = min(rule.largest_norm(dtype) for dtype in {each.stack.dtype for each in read} or {torch.float32})
        shared = torch.zeros_like(norm) if shared is None else shared.to(norm)
        return torch.stack([norm, shared]), (~(longest <= limit)).float()  # NaN is not less than anything

    def _is_being_captured(self) -> bool:
        """Whether a CUDA graph is being recorded, which forbids to wait for the device."""
        return self.pairs[0].A.is_cuda and torch.cuda.is_current_stream_capturing()


def step_adamw(
    parameters: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Any]],
    group: Mapping[str, Any],
    found_inf: Tensor,
) -> None:
    """Take one AdamW step of parameters with gradients; change nothing, not even a count, if `found_inf` is 1.

    The parameters are plain tensors or DTensors, whose state is then sharded as they are. Missing state is created.
    """
    for p in parameters:
        if "exp_avg" not in state[p]:
            state[p].update(
                step=torch.zeros((), dtype=torch.float32, device=p.device),
                exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                exp_avg_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
            )
    for kind in {(p.device, p.dtype) for p in parameters}:  # on CUDA the kernel takes one dtype at a time
        skips, alike = found_inf.to(kind[0]), [p for p in parameters if (p.device, p.dtype) == kind]
        torch._foreach_add_([state[p]["step"] for p in alike], 1 - skips)
        alike = [p for p in alike if local(p).numel()]  # a rank may hold nothing of a short tensor
        if alike:
            exp_avgs, exp_avg_sqs = ([local(state[p][name]) for p in alike] for name in ("exp_avg", "exp_avg_sq"))
            gradients = [local(p.grad) for p in alike if p.grad is not None]
            steps = [state[p]["step"] for p in alike]
            fused_adamw([local(p) for p in alike], gradients, exp_avgs, exp_avg_sqs, steps, group, skips)


def require_finite_rates(groups: Iterable[dict[str, Any]]) -> None:
    """Raise a `ValueError` if a learning rate is NaN or Inf; a rate on a device is not read."""
    for index, group in enumerate(groups):
        rate = group["lr"]
        if (not isinstance(rate, Tensor) or can_be_read(rate)) and not math.isfinite(rate):
            raise ValueError(
                f"the learning rate of param group {index} is {float(rate)}, which would make its parameters NaN. Look "
                f"at the scheduler, or set optimizer.param_groups[{index}]['lr']."
            )


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host can read a value without waiting for a device."""
    return tensor.device.type == "cpu"


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and of the engines it drives."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude in any of the tensors; NaN and Inf come through."""
    if tensors[0].device.type == "cpu":  # norms of infinite order take twenty times as long there
        return torch.stack([x.double() for tensor in tensors for x in torch.aminmax(tensor)]).abs().amax()
    return torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))
