"""How does a command write its results as JSON, with the versions they were made with?"""

from __future__ import annotations

import json
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lorapro_hf
from lorapro_hf.utils.text_files import write_text

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate")


def package_version(name: str) -> str | None:
    """The version of an installed package, or `None`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions and machine, for comparing the figures with others."""
    return {
        "lorapro_hf": lorapro_hf.__version__,
        **{name: package_version(name) for name in _PACKAGES},
        "torch": torch.__version__,  # with its build, such as `+cpu`
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def as_json(content: Any, indent: int | None = None) -> str:
    """JSON with `null` for NaN and infinities."""
    return json.dumps(_without_nan(content), indent=indent, allow_nan=False)


def write_json(path: Path, content: Any) -> None:
    """Replace a file atomically by JSON with `null` for NaN and infinities."""
    write_text(path, as_json(content, indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
