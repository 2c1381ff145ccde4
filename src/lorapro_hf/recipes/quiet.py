"""Which useless lines do other libraries print? Programs import this module first, which drops these lines.

It also drops the traceback of Ctrl-C, which often comes while the other imports take their seconds.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from types import TracebackType

from lorapro_hf.options import STOPPED, say_stopped


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _hook_before(kind, error, trace)
        return
    say_stopped()
    raise SystemExit(STOPPED)


def _drop(logger: str, beginning: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(beginning))


_drop("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
for _kind in ("csv", "json", "parquet"):  # the exception describes the broken file
    _drop(f"datasets.packaged_modules.{_kind}.{_kind}", "Failed to ")
if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
    _drop("DeepSpeed", "Setting accelerator to CPU")
# old and new name in transformers
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
# PEFT saves the adapter of a model from a GGUF file, whose folder has no config.json
warnings.filterwarnings("ignore", "Could not find a config file in ", UserWarning)
_hook_before, sys.excepthook = sys.excepthook, _hook
