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

from lorapro_hf.commands.common.models import PACKAGED, default_device, packaged_source
from lorapro_hf.commands.common.saved_adapters import has_tokenizer
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.model import ModelArguments, quantization_config


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
        lm = _load(arguments)
    except UsageError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError) as error:  # the last if an adapter is of another model
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


def _load(arguments: argparse.Namespace) -> EvaluatedModel:
    base, gguf_file, adapter = arguments.model_name_or_path, arguments.gguf_file, arguments.adapter
    if adapter is not None:  # looked up before a large model is loaded for it
        named = PeftConfig.from_pretrained(adapter).base_model_name_or_path
        base = base or named
        if not base:
            raise UsageError(f"the adapter {adapter} does not name its base model: add --model_name_or_path.")
    if base == PACKAGED:
        if gguf_file is not None:
            raise UsageError(f"{PACKAGED} has a GGUF file of its own: leave --gguf_file out.")
        base, gguf_file = packaged_source()
    settings = ModelArguments(base, dtype=arguments.dtype, load_in_4bit=arguments.load_in_4bit)
    quantization: Any = quantization_config(settings)
    # unpacking draws a progress bar that cannot be turned off
    quiet: AbstractContextManager[Any] = redirect_stderr(io.StringIO()) if gguf_file else nullcontext()
    if gguf_file is not None:
        if arguments.load_in_4bit:
            raise UsageError("--load_in_4bit and --gguf_file exclude each other: the GGUF file is dequantized.")
        if hasattr(transformers, "GgufConfig"):  # newer versions may keep the weights packed
            quantization = transformers.GgufConfig(dequantize=True)
    with quiet:
        return EvaluatedModel(
            quantization,
            pretrained=base,
            peft=adapter,
            tokenizer=adapter if adapter and has_tokenizer(adapter) else None,
            dtype=arguments.dtype,
            gguf_file=gguf_file,
            trust_remote_code=arguments.trust_remote_code,
            device=arguments.device or default_device(),
            batch_size=arguments.batch_size,
        )
