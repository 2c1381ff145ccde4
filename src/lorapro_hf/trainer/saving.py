"""How does a `Trainer` make sure that every save holds the adapter that is trained?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorapro_hf.checkpoints.adapters import adapter_files, saving_error
from lorapro_hf.checkpoints.agreement import raise_on_all_ranks
from lorapro_hf.trainer.parents import handed
from lorapro_hf.trainer.parts import TrainerPart


class SavingMixin(TrainerPart):
    """Examines saved files.

    All ranks write a checkpoint together, so an error of one rank is raised on each of them. Any other save may be of
    rank 0 alone, which then raises alone, even during a checkpoint.
    """

    _lora_pro_saves_together = False
    _lora_pro_unsaved: ValueError | None = None

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Like the parent, but under FSDP2 with sharded checkpoints save a whole model as well.

        Raises:
            ValueError: the adapter is not in the files that were written.
        """
        if self.lora_pro_config is None:
            super().save_model(*args, **kwargs)
            return
        given = handed(type(self), SavingMixin, "save_model", args, kwargs)
        if not (self._lora_pro_in_checkpoint and given.get("_internal_call")):
            with self._whole_state():
                super().save_model(*args, **kwargs)
            return
        self._lora_pro_unsaved, self._lora_pro_saves_together = None, True
        try:
            super().save_model(*args, **kwargs)
        finally:
            self._lora_pro_saves_together = False
        raise_on_all_ranks(self._lora_pro_unsaved)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Like the parent, but raise unless the adapter is in the files."""
        super()._save(*args, **kwargs)
        given = handed(type(self), SavingMixin, "_save", args, kwargs)
        if self.lora_pro_config is None or not self.args.should_save:
            return
        # a parent may have another name for its first argument
        folder = Path(given.get("output_dir", args[0] if args else None) or self.args.output_dir)
        model = self._bare_model
        if given.get("state_dict") == {}:  # the parent's way to say that DeepSpeed's files hold the weights
            for file in adapter_files(folder, model).values():
                file.unlink()
            return
        error = saving_error(folder, model)
        if error is not None and not self._lora_pro_saves_together:
            raise error
        self._lora_pro_unsaved = error

    @contextlib.contextmanager
    def _whole_state(self) -> Iterator[None]:
        """Have FSDP gather the whole model."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            yield
            return
        from torch.distributed.fsdp import StateDictType

        before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            yield
        finally:
            plugin.state_dict_type = before
