"""Which useless lines do other libraries print? Programs import this module first, which drops these lines.

It also drops the traceback of Ctrl-C during the imports.
"""

from __future__ import annotations

import logging
import os
import warnings

from lorapro_hf.recipes.stopped import end_imports_in_one_line


def _drop(logger: str, beginning: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(beginning))


_drop("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
    _drop("DeepSpeed", "Setting accelerator to CPU")
# old and new name in transformers
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
end_imports_in_one_line()
