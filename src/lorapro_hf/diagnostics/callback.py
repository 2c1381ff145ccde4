"""How does a `Trainer` measure and log the gradient gap?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState, is_initialized
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorapro_hf.diagnostics.meter import GradientGapMeter
from lorapro_hf.diagnostics.records import FILE, LayerGap, append, keep_until, medians
from lorapro_hf.diagnostics.settings import GAP_MAX_BYTES, check_gap_layers, check_gap_max_bytes
from lorapro_hf.distributed.engines import require_supported_engine
from lorapro_hf.factors.pairs import survey_lora_pairs
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer

_TOLERANCE = 0.05  # of residuals: roundings in bfloat16 are smaller, dropout and DoRA give more
_SECOND = "the trainer has a GradientGapCallback already (--lora_pro_log_gap adds one). Keep one of them."

logger = logging.getLogger(__name__)


class GradientGapCallback(TrainerCallback):
    """Measures how far LoRA's and LoRA-Pro's gradients are from those of full fine-tuning, with any optimizer.

    ```python
    trainer = Trainer(model, args, train_dataset=data)
    GradientGapCallback(every=50).attach(trainer)
    ```

    It measures steps 1, 1 + every, 1 + 2 every, ...; other steps cost nothing. Each measurement adds a line for each
    layer to `lora_pro_gap.jsonl` in the output folder, which `lorapro plot` draws, and logs its medians over the layers
    as `lora_pro_gap/...`. The training itself is the same to the bit.

    A callback alone cannot log: with `Trainer(callbacks=[GradientGapCallback()])` only the file and
    `state.log_history` get the figures.

    Args:
        every: the number of steps from one measurement to the next.
        layers: names of layers, last parts of names, or patterns with `*`; by default all.
        max_bytes: the memory for the gradients of the layers measured at a time. If the gradients of all layers do not
            fit, the layers take turns from one measurement to the next, and a warning says so.

    Raises:
        ValueError: for arguments out of range, and at the start of training if there is no layer to measure, if there
            is a second `GradientGapCallback`, or if a training is resumed with a file that is not text.
        RuntimeError: at the start of training under DeepSpeed, FSDP1, Megatron-LM, `torch.compile` or
            `nn.DataParallel`; at the first step, if a `LoRAProCallback` has rewritten the gradients before.
    """

    def __init__(self, every: int = 50, layers: Sequence[str] | None = None, max_bytes: int = GAP_MAX_BYTES) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r} must be a whole number of steps from 1 on.")
        check_gap_layers(layers)
        check_gap_max_bytes(max_bytes)
        self.every, self.layers, self.max_bytes = every, layers, max_bytes
        self._trainer: Trainer | None = None
        self._meter: GradientGapMeter | None = None
        self._gaps: list[LayerGap] = []
        self._first = True
        self._told: set[str] = set()

    def attach(self, trainer: Trainer) -> GradientGapCallback:
        """Become the first callback of a trainer and log through it, so that reporters get the figures; return self.

        Raises:
            ValueError: the trainer has such a callback already, or its model has LoRA layers, but none to measure.
        """
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(callback, GradientGapCallback) for callback in callbacks):
            raise ValueError(_SECOND)
        if survey_lora_pairs(trainer.model)[0]:  # adapters may still be added until the training begins
            GradientGapMeter(trainer.model, self.layers, self.max_bytes)
        callbacks.insert(0, self)
        self._trainer = trainer
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the layers; refuse engines that hide the gradients."""
        _require_visible_gradients(args, kwargs["model"])
        other: Any = getattr(state, "_lora_pro_gap_callback", self)
        if other is not self and other._meter is not None:
            raise ValueError(_SECOND)
        state._lora_pro_gap_callback = self
        self.stop()
        self._first, self._told = True, set()
        self._meter = GradientGapMeter(kwargs["model"], self.layers, self.max_bytes)
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir) / FILE
        self._write(file, lambda: keep_until(file, state.global_step))
        self._tell_of_turns_and_layers_left_out()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start recording in each step that is measured."""
        if self._meter is not None and state.global_step % self.every == 0:
            self._meter.start(state.global_step // self.every)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the gradients, unless they have been rewritten."""
        if self._meter is None:
            return
        rewriting = getattr(state, "_lora_pro_callback", None)
        if self._first and rewriting is not None and rewriting.last_grad_norm is not None:
            self.stop()
            raise RuntimeError(
                "LoRAProCallback rewrites the gradients before GradientGapCallback can see them. Put "
                "GradientGapCallback first in callbacks=[...], or use its attach(trainer)."
            )
        self._first = False
        self._meter.before_step(kwargs["optimizer"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the step."""
        if self._meter is not None:
            self._gaps = self._meter.after_step(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write and log the figures, as the step has its number now."""
        gaps, self._gaps = self._gaps, []
        self._warn(gaps)
        if not gaps:
            return
        if state.is_world_process_zero:
            file, title = Path(args.output_dir) / FILE, _title(kwargs["optimizer"])
            self._write(file, lambda: append(file, state.global_step, title, gaps))
        metrics = medians(gaps)
        if self._trainer is None:
            state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
            return
        should_log = control.should_log  # our log does not replace the one that is due
        # not the trainer's own `log`: TRL's would empty the metrics that it has gathered for the log that is due
        Trainer.log(self._trainer, metrics)
        control.should_log = should_log

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the model as it was."""
        self.stop()

    def stop(self) -> None:
        """Stop measuring and leave the model as it was, also after an exception has ended the training."""
        if self._meter is not None:
            self._meter.stop()
        self._meter, self._gaps = None, []

    def _tell_of_turns_and_layers_left_out(self) -> None:
        assert self._meter is not None
        if (turns := len(self._meter.turns)) > 1:
            logger.warning(
                "gradient gap: the gradients of all layers do not fit into max_bytes=%s together, so the layers take "
                "turns: there are %d, so that each layer is measured every %d steps. Choose fewer layers "
                "(--lora_pro_gap_layers), or raise max_bytes (--lora_pro_gap_max_bytes).",
                f"{self.max_bytes:,}",
                turns,
                turns * self.every,
            )
        by_reason: dict[str, list[str]] = {}
        for name, reason in self._meter.left_out:
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            logger.warning("gradient gap: %s%s not measured: %s", names[0], more, reason)

    def _write(self, file: Path, write: Callable[[], None]) -> None:
        """Write to the file; a full disk does not end the training."""
        try:
            write()
        except OSError as error:
            self._tell_once(
                "file",
                f"cannot write {file}: {error.strerror}. The figures go to the logs alone until it can be written "
                "again.",
            )

    def _warn(self, gaps: Sequence[LayerGap]) -> None:
        if unseen := self._meter.unseen if self._meter else []:
            self._tell_once(
                "unseen",
                f"{unseen[0]} and {len(unseen) - 1} more have gradients, but no backward pass was seen in them: their "
                "weights are used without calling the layers (fused kernels), or their inputs are overwritten. They "
                "are left out.",
            )
        worst = max(gaps, key=lambda gap: gap.residual, default=None)
        if worst is not None and worst.residual > _TOLERANCE:
            self._tell_once(
                "residual",
                f"the gradients of the factors of {worst.layer} differ by {worst.residual:.0%} from those that the "
                "gradient g of its weight gives them. This is expected with lora_dropout, DoRA, or an embedding of "
                "padded batches: the gaps are those of g, and grad_norm is an estimate. Otherwise the figures are "
                "wrong, as backward passes were recorded that add nothing to .grad (torch.autograd.grad).",
            )

    def _tell_once(self, subject: str, message: str) -> None:
        if subject not in self._told:
            self._told.add(subject)
            logger.warning("gradient gap: %s This is said once.", message)


def _require_visible_gradients(args: TrainingArguments, model: Any) -> None:
    leave_out = "leave out GradientGapCallback (--lora_pro_log_gap)"
    reason = None
    if is_initialized():
        engine = AcceleratorState()
        if engine.distributed_type == DistributedType.DEEPSPEED:
            reason = "under DeepSpeed, which has stepped before any callback sees the gradients. Use DDP or FSDP2"
        else:
            require_supported_engine(engine, leave_out)
    if args.torch_compile or hasattr(model, "_orig_mod"):
        reason = "in a compiled model, whose layers run no hooks. Leave out torch_compile"
    if args.n_gpu > 1:
        reason = (
            "under nn.DataParallel, which runs copies of the layers. Start one process for each GPU (torchrun, "
            "accelerate launch)"
        )
    if reason is not None:
        raise RuntimeError(f"the gradient gap cannot be measured {reason}, or {leave_out}.")


def _title(optimizer: Any) -> str:
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, LoRAProAdamW):
        return type(optimizer).__name__
    return f"LoRA-Pro {optimizer.rule.name} ({optimizer.rule.update})"
