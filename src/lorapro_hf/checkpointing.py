"""How does a `Trainer` write its checkpoints, and examine and load the one that it resumes from?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from lorapro_hf.adapter_files import require_pairs_in_checkpoint
from lorapro_hf.loading import LoadingMixin
from lorapro_hf.optimizer import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.resume import (
    OPTIMIZER,
    SCHEDULER,
    STATE,
    require_complete,
    require_same_training,
    require_without_lora_pro,
)

logger = logging.getLogger(__name__)


class CheckpointMixin(LoadingMixin):
    """The part of `LoRAProTrainerMixin` that writes and resumes checkpoints; while LoRA-Pro is off it is the parent."""

    optimizer: Any
    _lora_pro_announces = True

    def _examine(self, resume_from_checkpoint: str | bool) -> None:
        """Raise if the checkpoint that `train` is to resume from is not complete, or of another training."""
        given = resume_from_checkpoint
        folder = get_last_checkpoint(self.args.output_dir) if given is True else given
        if not folder:
            return
        if self.lora_pro_config is None:
            require_without_lora_pro(Path(folder))
        else:
            self._check_checkpoint(Path(folder))

    def _check_checkpoint(self, folder: Path) -> None:
        by_engine = self._is_by_engine
        require_complete(folder, by_engine)
        if by_engine:
            require_pairs_in_checkpoint(folder, self.accelerator.unwrap_model(self.model))
            return
        # The parent builds the optimizer after it has loaded the weights; this one is thrown away.
        before, self._lora_pro_announces = self.optimizer, False
        try:
            optimizer = unwrap_optimizer(self.create_optimizer())
        finally:
            self.optimizer, self._lora_pro_announces = before, True
        if not isinstance(optimizer, LoRAProAdamW):  # the first log says so
            optimizer = None
        if not require_same_training(folder, optimizer, self.accelerator.unwrap_model(self.model)):
            logger.warning(
                "%s holds no optimizer state (save_only_model=True): moments and learning rate schedule start anew, so "
                "that the training does not go on as it would have.",
                folder,
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> None:
        """As the parent, which would put the state of all ranks onto the device of each of them first."""
        parents = super()._load_optimizer_and_scheduler
        by_engine = self._is_by_engine
        files = [Path(checkpoint, name) for name in (OPTIMIZER, SCHEDULER)] if checkpoint else []
        is_ours = isinstance(unwrap_optimizer(self.optimizer), LoRAProAdamW) and all(file.is_file() for file in files)
        # a parent that overrides it may load more than these two
        if by_engine or not files or not is_ours or parents.__func__ is not Trainer._load_optimizer_and_scheduler:
            parents(checkpoint, *args, **kwargs)
            return
        for target, file in zip((self.optimizer, self.lr_scheduler), files, strict=True):
            target.load_state_dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """As the parent; an older checkpoint in the same folder counts as unfinished from the first file on."""
        if self.lora_pro_config is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / STATE).unlink(missing_ok=True)
            # FSDP writes nothing before the parent looks for the best folder, which only some ranks would find
            folder.mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial, *args, **kwargs)

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        """As the parent; what marks a checkpoint as finished comes after the files of all ranks."""
        super()._save_rng_state(*args, **kwargs)
        if self.lora_pro_config is not None:
            self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        """As the parent, which asks rank 0 alone for a state that the ranks may share out."""
        optimizer = unwrap_optimizer(self.optimizer)
        if isinstance(optimizer, LoRAProAdamW) and optimizer.engine_step is None:
            optimizer.consolidate_state_dict()
        super()._save_optimizer_and_scheduler(*args, **kwargs)
