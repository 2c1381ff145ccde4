"""How does a `Trainer` write its checkpoints, and examine the checkpoint that it resumes from?"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from lorapro_hf.checkpoints.adapters import require_pairs_in_checkpoint, saving_error
from lorapro_hf.checkpoints.agreement import check_together, first_of_ranks, raise_on_all_ranks
from lorapro_hf.checkpoints.engines import describe_engine, require_same_engine
from lorapro_hf.checkpoints.files import OPTIMIZER, SCHEDULER, steps_behind
from lorapro_hf.checkpoints.manifest import MANIFEST, clear, write_manifest
from lorapro_hf.checkpoints.resume import (
    checkpoints_in,
    find_flaw,
    newest_complete,
    require_complete,
    require_same_training,
    require_without_lora_pro,
)
from lorapro_hf.trainer.loading import LoadingMixin
from lorapro_hf.trainer.method_calls import MethodsMixin

logger = logging.getLogger(__name__)


class CheckpointMixin(MethodsMixin, LoadingMixin):
    """Writes checkpoints and resumes from them."""

    _lora_pro_announces = True

    def _examine(self, asked: str | Literal[True]) -> str | bool:
        """The checkpoint that the parent resumes from, examined on all ranks together; `False` to start anew.

        Raises:
            ValueError: the checkpoint is not complete, or of another training.
        """
        if self.lora_pro_config is None:
            folder = get_last_checkpoint(self.args.output_dir) if asked is True else asked
            if folder:
                require_without_lora_pro(Path(folder))
                self._examine_methods(Path(folder))
            return asked
        checkpoint = self._newest_complete() if asked is True else Path(asked)
        if checkpoint is None:
            return False
        check_together(lambda: self._require_complete(checkpoint))
        self._examine_methods(checkpoint)
        check_together(lambda: self._require_same_training(checkpoint))
        return str(checkpoint)

    def _newest_complete(self) -> Path | None:
        output = Path(self.args.output_dir)

        def find(folder: Path) -> str | None:
            flaw = None
            if self.args.should_save:
                try:
                    flaw = find_flaw(folder)
                except Exception as error:  # the other ranks wait for an answer
                    flaw = f"its files cannot be examined ({type(error).__name__}: {error})"
            return first_of_ranks(flaw)

        found, flaws = newest_complete(output, gather_object([checkpoints_in(output)])[0], find)
        way_on = "starts anew" if found is None else f"goes on from {found}"
        if self.is_world_process_zero():
            for folder, flaw in flaws.items():
                logger.warning("%s is passed over: %s. The training %s.", folder, flaw, way_on)
        return found

    def _require_complete(self, folder: Path) -> None:
        if self.args.should_save:  # as when it was written: other ranks may not see all files
            require_complete(folder)
            require_same_engine(folder, describe_engine(self.accelerator))
            if self._is_by_engine:
                require_pairs_in_checkpoint(folder, self._bare_model)

    def _require_same_training(self, folder: Path) -> None:
        # DeepSpeed's engine compares mode and pairs before it loads anything
        has_state = self.is_deepspeed_enabled or self._has_fitting_state(folder)
        if not self.is_world_process_zero():
            return
        if not has_state:
            logger.warning(
                "%s holds no optimizer state (save_only_model=True): moments, schedule and methods start anew, so the "
                "training does not go on as it would have.",
                folder,
            )
        elif not (folder / MANIFEST).is_file():
            logger.warning(
                "%s has no %s, which ends a save and lists its files: a plain Trainer or an earlier version has "
                "written it, or the save was cut short just before. Only the kinds of the files and counts of steps "
                "were compared%s.",
                folder,
                MANIFEST,
                f"; its {behind}" if (behind := steps_behind(folder)) else "",
            )

    def _has_fitting_state(self, folder: Path) -> bool:
        """Whether a checkpoint has an optimizer's state; raise if the state or the adapter is of another training."""
        # The parent builds its optimizer after it has loaded the weights, so this optimizer is thrown away.
        before, self._lora_pro_announces = self.optimizer, False
        try:
            self.create_optimizer()
            optimizer = self._lora_pro_optimizer  # if there is another one, the first log says so
        finally:
            self.optimizer, self._lora_pro_announces = before, True
        return require_same_training(folder, optimizer, self._bare_model, not self._exports)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> None:
        """Like the parent, but each rank keeps only its own pairs' state on its device; the methods get theirs."""
        parents = super()._load_optimizer_and_scheduler
        files = [Path(checkpoint, name) for name in (OPTIMIZER, SCHEDULER)] if checkpoint else []
        is_ours = self._lora_pro_optimizer is not None and all(file.is_file() for file in files)
        # a parent that overrides it may load more than these two
        is_plain = parents.__func__ is Trainer._load_optimizer_and_scheduler
        if files and is_ours and is_plain and not self._is_by_engine:
            for target, file in zip((self.optimizer, self.lr_scheduler), files, strict=True):
                target.load_state_dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        else:
            parents(checkpoint, *args, **kwargs)
        if checkpoint:
            self._load_methods(Path(checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Like the parent, with a manifest; an older checkpoint in the same folder counts as unfinished from now on.

        Raises:
            ValueError: a parameter or its state holds NaN or Inf. Nothing has been written then.
        """
        if self.lora_pro_config is None:
            super()._save_checkpoint(model, trial, *args, **kwargs)
            return
        optimizer = self._lora_pro_optimizer
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with optimizer.saving_finite() if optimizer is not None else contextlib.nullcontext():
            if self.args.should_save:
                clear(folder)
                # or under FSDP only some ranks find the folder when the parent looks for the best checkpoint
                folder.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()  # or a rank's new file might be cleared
            self._lora_pro_in_checkpoint = True
            try:
                super()._save_checkpoint(model, trial, *args, **kwargs)
            finally:
                self._lora_pro_in_checkpoint = False
            self._write_manifest(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str, *args: Any, **kwargs: Any) -> None:
        """Like the parent, which runs once all files are written, but push the manifest with them."""
        self._write_manifest(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder, *args, **kwargs)

    def _write_manifest(self, folder: Path) -> None:
        is_due = self.args.should_save and folder.is_dir() and not (folder / MANIFEST).exists()
        if self.lora_pro_config is None or not is_due:
            return
        engine = describe_engine(self.accelerator)
        try:
            write_manifest(folder, self.state.global_step, self.accelerator.num_processes, engine)
        except OSError as error:
            logger.warning(
                "%s could not be written into %s (%s). The checkpoint is complete, but a change in its files will not "
                "be noticed.",
                MANIFEST,
                folder,
                error,
            )

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        """Like the parent, but wait for all ranks: the file that marks a checkpoint as finished comes last."""
        super()._save_rng_state(*args, **kwargs)
        if self.lora_pro_config is not None:
            self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str, *args: Any, **kwargs: Any) -> None:
        """Like the parent, which asks only rank 0 for the state, but collect the state of all ranks first.

        Raises:
            ValueError: the adapter is not in the model that FSDP writes here.
        """
        optimizer = self._lora_pro_optimizer
        if optimizer is not None and not optimizer.has_engine:
            optimizer.consolidate_state_dict()
        super()._save_optimizer_and_scheduler(output_dir, *args, **kwargs)
        if self.lora_pro_config is not None and self.is_fsdp_enabled:
            is_first = self.is_world_process_zero()
            raise_on_all_ranks(saving_error(Path(output_dir), self._bare_model) if is_first else None)
