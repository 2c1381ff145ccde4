"""Which methods work beside LoRA-Pro, or without it, on the same LoRA pairs and in the same trainers?"""

from lorapro_hf.methods.base import LoRAMethod, found_inf, require_compatible

__all__ = ["LoRAMethod", "found_inf", "require_compatible"]
