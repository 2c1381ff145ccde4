"""How do LoRA-Pro's steps reach factors that DeepSpeed's ZeRO has taken apart?"""

from lorapro_hf.zero.access import ZeroAccess
from lorapro_hf.zero.configuration import plugin_in_use, require_configuration, settle_clipping
from lorapro_hf.zero.engine import attach_deepspeed

__all__ = ["ZeroAccess", "attach_deepspeed", "plugin_in_use", "require_configuration", "settle_clipping"]
