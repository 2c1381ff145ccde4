"""How does a `Trainer` load the weights of a checkpoint?"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer

from lorapro_hf.checkpoints.adapters import holds_weights
from lorapro_hf.checkpoints.loading import holds_adapters, load_adapters
from lorapro_hf.trainer.parts import TrainerPart

logger = logging.getLogger(__name__)


class LoadingMixin(TrainerPart):
    """Loads weights into the parameters that the model has."""

    @property
    def _exports(self) -> bool:
        """Whether checkpoints hold another form of the adapter than the one that is trained."""
        return False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Like the parent, but load all adapters into the existing parameters."""
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint, *args, **kwargs)
        if self._loads_adapters(resume_from_checkpoint):
            self._load_adapters(resume_from_checkpoint, load)
        else:
            load()

    def _load_best_model(self) -> None:
        """Like the parent, but load all adapters into the existing parameters; a failure is a warning."""
        folder, parent = self.state.best_model_checkpoint, super()._load_best_model
        if not self._loads_adapters(folder):
            parent()
            self.loaded_best_checkpoint = folder if self._is_by_engine or holds_weights(Path(folder)) else None
            return
        try:
            self._load_adapters(folder, partial(parent))
        except Exception as error:  # no error may fail a training that has come to its end
            logger.warning(
                "The best checkpoint could not be loaded: %s\nThe model keeps the weights of its last step, and the "
                "model card describes these.",
                error,
            )
            return
        self.model.eval()  # as the parent leaves it
        self.loaded_best_checkpoint = folder

    def _loads_adapters(self, folder: str) -> bool:
        is_ours = (self.lora_pro_config is not None or self._exports) and not self._is_by_engine
        return is_ours and holds_adapters(Path(folder), self.model)

    def _load_adapters(self, folder: str, parent: partial[None]) -> None:
        """Load the adapters into the existing parameters, and have a parent of another library load the rest."""
        method: Any = parent.func
        if getattr(method, "__func__", None) is not getattr(Trainer, method.__name__):
            model: Any = self.model
            model.load_adapter = model.set_adapter = lambda *_, **__: None
            try:
                parent()
            finally:
                del model.load_adapter, model.set_adapter
        load_adapters(Path(folder), self.model, factors=not self._exports)
