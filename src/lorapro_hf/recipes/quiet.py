"""Which lines of other libraries are of no use to anybody? Importing this drops them; programs do so first of all.

A traceback after Ctrl-C is among them: Python would print it while a program still imports those libraries.
"""

from __future__ import annotations

import logging
import os
import warnings

from lorapro_hf.recipes.stopped import end_imports_in_one_line

# by logger; each is said at an import, whatever the program is about to do
_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "DeepSpeed": "Setting accelerator to CPU",
}


def _drop(name: str, beginning: str) -> None:
    logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(beginning))


for _name, _beginning in _NOISE.items():
    if _name != "DeepSpeed" or os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        _drop(_name, _beginning)
# newer versions of transformers call it by another name, which older ones do not know
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
end_imports_in_one_line()
