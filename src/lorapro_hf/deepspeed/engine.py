"""Where in a step of DeepSpeed's engine do the pairs step?

`DeepSpeedEngine.step` calls the step of its ZeRO optimizer once the gradients of all backward passes of a step have
been reduced, and never otherwise. That looks for overflow and takes the norm, then leaves the step out or calls our
optimizer: for one group at a time (stages 1 and 2), for one sub-group at a time (stage 3), or once (stage 1 with bf16
parameters and float32 accumulation). After each call it copies the group's float32 masters to the parameters. So what
this rank holds of the raw gradients is kept before; all pairs are stepped at the first call for a group of factors, and
their new masters are in place before DeepSpeed copies any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.deepspeed.checkpoint import (
    load_partitions_state_dict,
    load_with_moments,
    partitions_state_dict,
    save_with_moments,
)
from lorapro_hf.deepspeed.refusals import require_supported
from lorapro_hf.distributed.zero import ZeroAccess
from lorapro_hf.optim.lora_pro import LoRAProAdamW
from lorapro_hf.utils.private_names import private, tested, warn_if_newer

_ATTACHED = "_lora_pro_attached"


def attach_deepspeed(engine: Any, optimizer: Any) -> None:
    """Make a DeepSpeed engine with ZeRO 1, 2 or 3 train with LoRA-Pro. Call it once, before the first step.

    ```python
    optimizer = create_lorapro_optimizer(model, lr=2e-5)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attach_deepspeed(engine, optimizer)
    ```

    With accelerate: `model, optimizer, loader = accelerator.prepare(model, optimizer, loader)`, then
    `attach_deepspeed(model, optimizer)`. `LoRAProTrainer` does it by itself.

    The configuration names no optimizer and, where neither accelerate nor `Trainer` reads it, sets
    `"zero_allow_untested_optimizer": true`. Its `gradient_clipping` acts on the raw gradients of all trainable
    parameters together, before the projection. Steps that DeepSpeed leaves out, because of overflow or because the norm
    of the gradients is not finite, change nothing and are counted in `engine.skipped_steps`.

    `engine.save_checkpoint` then writes the moments of the pairs into `lora_pro_rank<n>.safetensors` in the folder of
    the tag, and `engine.load_checkpoint` reads them. On another number of processes than have saved it also restores
    what DeepSpeed itself does not: masters, AdamW's moments of the other parameters and learning rates.

    Args:
        engine: what `deepspeed.initialize` or `accelerator.prepare` returned in the model's place.
        optimizer: the `LoRAProAdamW` that the engine was given, or what was returned in its place.

    Raises:
        TypeError: `engine` is no DeepSpeed engine.
        RuntimeError: the engine runs another optimizer, or has settings under which LoRA-Pro would not be right: no
            ZeRO, offloading, pipeline, tensor, sequence or expert parallelism and others. The message names the remedy.
    """
    optimizer = _innermost(optimizer)
    if getattr(engine, "__dict__", {}).get(_ATTACHED) is optimizer is not None:
        return
    require_supported(engine, optimizer)
    access = ZeroAccess(engine.optimizer, engine.zero_optimization_stage(), private(engine, "param_names"))
    step = _EngineStep(engine.optimizer, optimizer, access)
    optimizer.access, optimizer.engine_step = access, step.on_groups
    # DeepSpeed asks for the state of what it has put into the groups: flat partitions in the factors' places.
    optimizer.state_dict = partial(partitions_state_dict, optimizer)
    optimizer.load_state_dict = partial(load_partitions_state_dict, optimizer)
    engine.optimizer.step = step.around(engine.optimizer.step)
    engine.save_checkpoint = save_with_moments(engine, optimizer, access)
    engine.load_checkpoint = load_with_moments(engine, optimizer, access)
    engine.__dict__[_ATTACHED] = optimizer
    if access.group.rank() == 0:
        warn_if_newer("deepspeed")


def _innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate and DeepSpeed."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer


class _EngineStep:
    """What happens before, within and after the step of DeepSpeed's optimizer."""

    def __init__(self, zero: Any, optimizer: LoRAProAdamW, access: ZeroAccess) -> None:
        self.zero, self.optimizer, self.access = zero, optimizer, access
        self._factors = [factor for pair in optimizer.pairs for factor in (pair.A, pair.B)]
        # Where no backward pass has been, DeepSpeed has zeros or an earlier step's gradient.
        self._reached = [False] * len(self._factors)
        for index, factor in enumerate(self._factors):
            factor.register_post_accumulate_grad_hook(partial(self._note, index))
        self._groups: list[dict[str, Any]] = []
        self._pairs_are_due = False
        # Stage 3 never clears the sums of its gradients, so that a parameter which the next step does not reach would
        # get this step's gradient once more.
        self._sums = private(zero, "grad_partitions_flat_buffer") if access.partitions_parameters else None
        self._scales_the_loss = type(zero).__name__ != "BF16_Optimizer"
        self._loss_scale = self._present_loss_scale()
        access.scale = self._scale

    def _note(self, index: int, factor: Tensor) -> None:
        self._reached[index] = True

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed's step with ours in it."""

        @wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            try:
                return step(*args, **kwargs)
            finally:
                self._end()

        return stepped

    def _begin(self) -> None:
        reached = torch.tensor(self._reached, dtype=torch.float32, device=self._factors[0].device)
        dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=self.access.group)
        live = [factor for factor, flag in zip(self._factors, reached.tolist(), strict=True) if flag]
        if not live:
            raise RuntimeError(
                f"none of the {len(self.optimizer.pairs)} LoRA pairs has a gradient. Call engine.backward(loss) before "
                "engine.step(), and build the optimizer from the model that is trained, with the adapter active that "
                "it was built for."
            )
        self.access.hold_gradients(live)
        self.optimizer.begin_engine_step()
        self._groups = self.optimizer.param_groups  # while DeepSpeed steps, these are cut down to one
        self._loss_scale = self._present_loss_scale()
        self.zero._global_grad_norm = None  # not that of an earlier step
        self._pairs_are_due = True

    def _end(self) -> None:
        self._pairs_are_due = False
        self._reached = [False] * len(self._factors)
        self.access.release_gradients()
        if self._sums is not None:
            self._sums.zero_()

    def _present_loss_scale(self) -> float:
        return float(private(self.zero, "loss_scale")) if self._scales_the_loss else 1.0

    def _scale(self) -> float | Tensor:
        """Take the loss scale out of the gradients and cut their norm to `gradient_clipping`."""
        limit = private(self.zero, "clip_grad")
        if not limit:
            return 1 / self._loss_scale
        norm = private(self.zero, "_global_grad_norm")
        if norm is None:
            raise RuntimeError(
                "DeepSpeed steps its optimizer before it has taken the norm of the gradients, by which LoRA-Pro clips "
                f"them. It was tested with {tested('deepspeed')}: install such a release, or report it."
            )
        if self.access.partitions_parameters:  # divided by a loss scale that may have grown since the backward pass
            norm = norm * (self._present_loss_scale() / self._loss_scale)
        excess = torch.as_tensor((norm + 1e-6) / limit)
        return 1 / (self._loss_scale * excess.clamp(min=1.0))

    def on_groups(self) -> None:
        """Step what DeepSpeed shows our optimizer: all pairs at the first group of factors, others as they are."""
        shown = [group for group in self.optimizer.param_groups if group["params"]]
        if self._pairs_are_due and any(group.get("lora_pro_factors") for group in shown):
            self._pairs_are_due = False
            cut, self.optimizer.param_groups = self.optimizer.param_groups, self._groups
            try:
                self.optimizer.step_pairs()
            finally:
                self.optimizer.param_groups = cut
        self.optimizer.step_ordinary([group for group in shown if not group.get("lora_pro_factors")])
