"""What do the parts of `LoRAProTrainerMixin` have in common?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.methods.base import LoRAMethod
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class TrainerPart(_Base):
    """A part of `LoRAProTrainerMixin`, whose methods do what the trainer's do while LoRA-Pro is off."""

    lora_pro_config: LoRAProConfig | None = None
    """The settings of LoRA-Pro; `None` while it is off."""
    loaded_best_checkpoint: str | None = None
    """The checkpoint whose weights the model has since the end of a training; `None` if it has the last step's."""
    optimizer: Any
    _lora_pro_in_checkpoint = False  # which all ranks write together

    @property
    def lora_methods(self) -> list[LoRAMethod]:
        """The methods among the callbacks, in their order."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, LoRAMethod)]

    @property
    def _lora_pro_optimizer(self) -> LoRAProAdamW | None:
        """The optimizer, out of any wrapper; `None` before it exists and if it is another one."""
        optimizer = unwrap_optimizer(self.optimizer)
        return optimizer if isinstance(optimizer, LoRAProAdamW) else None

    @property
    def _bare_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def _is_by_engine(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)
