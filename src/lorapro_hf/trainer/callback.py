"""How does LoRA-Pro reach the optimizers that it did not build?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lorapro_hf.checkpoints.adapters import saving_error
from lorapro_hf.checkpoints.agreement import raise_on_all_ranks
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import access_to
from lorapro_hf.distributed.engines import require_supported_engine
from lorapro_hf.factors.pairs import LoRAPair, find_lora_pairs
from lorapro_hf.factors.wrappers import require_plain_modules
from lorapro_hf.optim.finite import of_factors, require_finite
from lorapro_hf.optim.first_steps import FirstSteps
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.optim.projected_gradients import project_pair_gradients_
from lorapro_hf.optim.rules import OF_ANY_OPTIMIZER, rule_of

logger = logging.getLogger(__name__)


class LoRAProCallback(TrainerCallback):
    """Rewrites the gradients of `lora_A` and `lora_B` before any optimizer's step: AdamW, SGD, Lion, 8-bit Adam, ...

    ```python
    args = TrainingArguments("out", optim="lion_32bit")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[LoRAProCallback()])
    ```

    The optimizer and its moments then see the projected gradients: with AdamW this is the mode efficient
    of the paper, `LoRAProConfig(mode="efficient", efficient_projected=True)`.
    `Trainer` clips the raw gradients to `max_grad_norm` before; the projected gradients are not clipped again.
    Gradients that are not finite reach the optimizer: it or the gradient scaler decides whether to skip the step. A
    factor that is not finite is an error at the next step, log or save. A warning names the pairs that had no gradient
    in the first ten steps. Optimizers that step during the backward pass (LOMO, layer-wise GaLore) leave no gradients
    to rewrite and are refused at the first step.

    In a loop of your own, call `project_pair_gradients_(pairs, config)` between `backward()` and `optimizer.step()`
    instead, from `lorapro_hf.optim.projected_gradients`, with `pairs = find_lora_pairs(model)`.

    Args:
        config: The settings, also as a dictionary; by default `LoRAProConfig(mode="efficient")`, of which the
            callback always takes the projected gradients. Other modes are refused, because their moments live in
            `LoRAProAdamW`.

    Attributes:
        last_grad_norm: Global norm of the last step's equivalent gradients, a 0-dim tensor; `None` before it.

    Raises:
        ValueError: for settings other than the linear update of mode efficient; at the start of training for a model
            without trainable LoRA pairs, or with parts in wrappers; at a checkpoint that lacks the adapter.
        RuntimeError: at the start of training, if the optimizer is a `LoRAProAdamW` or the run is under DeepSpeed,
            FSDP1, FSDP's activation checkpointing or Megatron-LM; at a step, if no pair has a gradient.
    """

    def __init__(self, config: LoRAProConfig | Mapping[str, Any] | None = None) -> None:
        if config is None or isinstance(config, Mapping):
            config = {"mode": OF_ANY_OPTIMIZER, **(config or {})}
        config = LoRAProConfig.of(config)
        if config.mode == OF_ANY_OPTIMIZER:
            config = replace(config, efficient_projected=True)
        refusal = None
        rule = rule_of(config)
        if not rule.projects_gradients:
            remedy = f'Use LoRAProConfig(mode="{OF_ANY_OPTIMIZER}")'
            refusal = f"run mode={config.mode!r}: its moments live in LoRAProAdamW. {remedy}"
        elif rule.is_sequential:
            refusal = "run update='sequential': your optimizer steps the factors. Use update='linear'"
        elif rule.trust_region is not None:
            refusal = f"keep trust_region={rule.trust_region:g}: your optimizer steps the factors. Leave it out"
        elif config.master_factors:
            refusal = "keep master_factors: your optimizer steps the factors. Leave them out"
        if refusal is not None:
            raise ValueError(f"LoRAProCallback cannot {refusal}, or train with LoRAProTrainer or LoRAProAdamW.")
        self.config = config
        self.last_grad_norm: torch.Tensor | None = None
        self._pairs: list[LoRAPair] = []
        self._first_steps = FirstSteps([])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the pairs; refuse settings that would project the gradients twice or not at all."""
        if isinstance(unwrap_optimizer(kwargs.get("optimizer")), LoRAProAdamW):
            raise RuntimeError(
                "LoRAProCallback and LoRAProAdamW are both active and would project the gradients twice. "
                "Drop the callback, or train with another optimizer (--no_lora_pro for LoRAProTrainer)."
            )
        # every callback is handed the same state, which is new in every training
        if getattr(state, "_lora_pro_callback", self) is not self:
            raise RuntimeError(
                "Two LoRAProCallbacks are active and would project the gradients twice. Keep one of them."
            )
        state._lora_pro_callback = self
        if is_initialized():
            engine = AcceleratorState()
            if engine.distributed_type == DistributedType.DEEPSPEED:
                raise RuntimeError(
                    "LoRAProCallback cannot work under DeepSpeed, which has stepped before any callback can see the "
                    "gradients. Use LoRAProTrainer, or create_lorapro_optimizer with attach_deepspeed."
                )
            require_supported_engine(engine, "drop LoRAProCallback")
        require_plain_modules(_unwrapped(kwargs["model"]))
        self._pairs = find_lora_pairs(kwargs["model"])
        self._first_steps = FirstSteps(self._pairs)
        self.last_grad_norm = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Replace the gradients of every pair by the projected gradients."""
        if not self._pairs:
            raise RuntimeError(
                "LoRAProCallback has seen no start of training. Call its on_train_begin(args, state, control, "
                "model=model, optimizer=optimizer) first, or use project_pair_gradients_ in a loop of your own."
            )
        has_gradient = [pair.has_gradient for pair in self._pairs]
        if not any(has_gradient):
            raise RuntimeError(
                f"None of the {len(self._pairs)} LoRA pairs has a gradient before the optimizer's step: the engine "
                "(DeepSpeed) keeps them to itself, the optimizer steps during the backward pass (LOMO, layer-wise "
                "optimizers), or the loss does not depend on the active adapter. Use an optimizer that steps after "
                "the backward pass and no DeepSpeed, or drop LoRAProCallback."
            )
        self.last_grad_norm = project_pair_gradients_(self._pairs, self.config)
        if self._first_steps.count(has_gradient, self.last_grad_norm):
            self._first_steps.warn()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise if a factor is not finite and therefore no gradient is."""
        if self.last_grad_norm is not None and not self.last_grad_norm.isfinite():
            self._require_finite_factors()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise a `ValueError` on all ranks if the checkpoint lacks the adapter, or a factor is not finite."""
        folder, error = _checkpoint(Path(args.output_dir), state), None
        if args.should_save and "model" in kwargs:
            if folder.is_dir():
                error = saving_error(folder, _unwrapped(kwargs["model"]))
            else:
                logger.warning("There is no %s: LoRAProCallback cannot see whether the adapter was saved.", folder)
        if is_initialized():
            raise_on_all_ranks(error)
        elif error is not None:
            raise error
        self._require_finite_factors()

    def _require_finite_factors(self) -> None:
        if self._pairs:
            access = access_to(self._pairs)
            require_finite(of_factors(self._pairs, access), access.group)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of pairs without gradients, if the training was too short for a warning before."""
        self._first_steps.warn()


def _checkpoint(output: Path, state: TrainerState) -> Path:
    """The newest checkpoint; a hyperparameter search has a folder for each run."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if not state.is_hyper_param_search:
        return output / name
    return max(
        output.glob(f"{state.trial_name or '*'}/{name}"), key=lambda it: it.stat().st_mtime, default=output / name
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)
