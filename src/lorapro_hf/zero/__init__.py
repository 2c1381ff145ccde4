"""How do LoRA-Pro's steps reach factors that DeepSpeed's ZeRO has taken apart?"""

from lorapro_hf.zero.access import ZeroAccess
from lorapro_hf.zero.engine import attach_deepspeed

__all__ = ["ZeroAccess", "attach_deepspeed"]
