"""When do the pairs step within a step of DeepSpeed's engine?

`DeepSpeedEngine.step` calls the step of its ZeRO optimizer once the gradients of a step have been reduced. ZeRO checks
for overflow and computes the norm, then skips the step or calls our optimizer: once for each group (stages 1 and 2),
once for each sub-group (stage 3), or once (stage 1 with bf16 parameters and float32 accumulation). After each call it
copies the group's float32 masters to the parameters.

ZeRO frees or scales the raw gradients before these calls, so this rank's parts are copied before its step. All pairs
step at the first call for a group of factors: their new masters are stored before DeepSpeed copies any.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.deepspeed.checkpoint import load_with_moments, save_with_moments
from lorapro_hf.deepspeed.refusals import require_supported
from lorapro_hf.distributed.zero import ZeroAccess
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.utils.private_names import private, tested, warn_if_newer

_ATTACHED = "_lora_pro_attached"


def attach_deepspeed(engine: Any, optimizer: Any) -> None:
    """Make a DeepSpeed engine with ZeRO 1, 2 or 3 train with LoRA-Pro. Call it once, before the first step.

    ```python
    optimizer = create_lorapro_optimizer(model, lr=2e-4)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attach_deepspeed(engine, optimizer)
    ```

    With accelerate: `model, optimizer, loader = accelerator.prepare(model, optimizer, loader)`, then
    `attach_deepspeed(model, optimizer)`. `LoRAProTrainer` does it by itself.

    The configuration names no optimizer, and sets `"zero_allow_untested_optimizer": true` where neither accelerate nor
    `Trainer` reads it. Its `gradient_clipping` acts on the raw gradients of all trainable parameters together, before
    the projection. Steps that DeepSpeed skips, because gradients overflow or their norm is not finite, change nothing
    and are counted in `engine.skipped_steps`.

    `engine.save_checkpoint` then writes the moments of the pairs into `lora_pro_rank<n>.safetensors` in the folder of
    the tag, and `engine.load_checkpoint` reads them. On another number of processes it also restores masters, AdamW's
    moments of the other parameters and learning rates, which DeepSpeed does not.

    Args:
        engine: the object that `deepspeed.initialize` or `accelerator.prepare` returned in the model's place.
        optimizer: the `LoRAProAdamW` that the engine was given, or its wrapper.

    Raises:
        TypeError: `engine` is no DeepSpeed engine.
        RuntimeError: the engine runs another optimizer, or has settings that LoRA-Pro does not support: no ZeRO,
            offloading, pipeline, tensor, sequence or expert parallelism and others. The message names the remedy.
    """
    optimizer = unwrap_optimizer(optimizer)
    if getattr(engine, "__dict__", {}).get(_ATTACHED) is optimizer is not None:
        return
    require_supported(engine, optimizer)
    access = ZeroAccess(engine.optimizer, engine.zero_optimization_stage(), private(engine, "param_names"))
    steps = _ZeroSteps(engine.optimizer, optimizer, access)
    optimizer.attach_engine(access, steps.step_shown_groups)
    # docs/support.md lists these three methods.
    engine.optimizer.step = steps.around(engine.optimizer.step)
    engine.save_checkpoint = save_with_moments(engine, optimizer, access)
    engine.load_checkpoint = load_with_moments(engine, optimizer, access)
    engine.__dict__[_ATTACHED] = optimizer
    if access.group.rank() == 0:
        warn_if_newer("deepspeed")


class _ZeroSteps:
    """The steps of DeepSpeed's ZeRO optimizer, with ours within them."""

    def __init__(self, zero: Any, optimizer: LoRAProAdamW, access: ZeroAccess) -> None:
        self.zero, self.optimizer, self.access = zero, optimizer, access
        self._factors: list[Tensor] = [factor for pair in optimizer.pairs for factor in (pair.A, pair.B)]
        # DeepSpeed has zeros or an earlier step's gradient for a factor that no backward pass has reached.
        self._reached = [False] * len(self._factors)
        for index, factor in enumerate(self._factors):
            factor.register_post_accumulate_grad_hook(partial(self._note, index))
        # Stage 3 never clears its sums: a factor that the next step does not reach would get this gradient again.
        self._sums = private(zero, "grad_partitions_flat_buffer") if access.partitions_parameters else None
        self._scales_the_loss = type(zero).__name__ != "BF16_Optimizer"
        self._loss_scale = self._present_loss_scale()
        access.scale = self._scale

    def _note(self, index: int, factor: Tensor) -> None:
        self._reached[index] = True

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ZeRO's `step`: copy the raw gradients before it and release them after it."""

        @wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.access.hold_gradients(self._reached_factors())
            try:
                with self.optimizer.engine_step():
                    self._loss_scale = self._present_loss_scale()
                    self.zero._global_grad_norm = None  # forget the norm of an earlier step
                    return step(*args, **kwargs)
            finally:
                self._reached = [False] * len(self._factors)
                self.access.release_gradients()
                if self._sums is not None:
                    self._sums.zero_()

        return stepped

    def _reached_factors(self) -> list[Tensor]:
        """The factors that a backward pass has reached on any rank."""
        reached = torch.tensor(self._reached, dtype=torch.float32, device=self._factors[0].device)
        dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=self.access.group)
        factors = [factor for factor, flag in zip(self._factors, reached.tolist(), strict=True) if flag]
        if not factors:
            raise RuntimeError(
                f"none of the {len(self.optimizer.pairs)} LoRA pairs has a gradient. Call engine.backward(loss) before "
                "engine.step(), and build the optimizer from the model that is trained, with the adapter active that "
                "it was built for."
            )
        return factors

    def _present_loss_scale(self) -> float:
        return float(private(self.zero, "loss_scale")) if self._scales_the_loss else 1.0

    def _scale(self) -> float | Tensor:
        """The factor that takes the loss scale out of the gradients and clips them to `gradient_clipping`."""
        limit = private(self.zero, "clip_grad")
        if not limit:
            return 1 / self._loss_scale
        norm = private(self.zero, "_global_grad_norm")
        if norm is None:
            raise RuntimeError(
                "DeepSpeed steps its optimizer before it computes the norm of the gradients, by which LoRA-Pro clips "
                f"them. It was tested with {tested('deepspeed')}: install such a release, or report it."
            )
        if self.access.partitions_parameters:  # divided by a loss scale that may have grown since the backward pass
            norm = norm * (self._present_loss_scale() / self._loss_scale)
        excess = torch.as_tensor((norm + 1e-6) / limit)
        return 1 / (self._loss_scale * excess.clamp(min=1.0))

    def step_shown_groups(self) -> None:
        """Step the groups that DeepSpeed shows our optimizer: all pairs at the first group of factors."""
        shown = [group for group in self.optimizer.param_groups if group["params"]]
        others = [group for group in shown if not group.get("lora_pro_factors")]
        if len(others) < len(shown):
            self.optimizer.step_pairs()
        self.optimizer.step_others(others)
