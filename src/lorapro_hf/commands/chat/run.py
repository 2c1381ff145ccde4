"""Who talks in a chat, and where do the prompts come from?"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

import torch
import transformers

from lorapro_hf.commands.chat.answers import Speaker, Voice, sampling
from lorapro_hf.commands.common.adapted import (
    Source,
    add_end_of_answer,
    attach,
    find_source,
    load_base,
    load_tokenizer,
    quiet,
)
from lorapro_hf.commands.common.models import default_device
from lorapro_hf.options import UsageError

_SAMPLING = ("temperature", "top_p", "top_k")
_CHANGED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # whose adapters stand on other base weights


def run_chat(arguments: argparse.Namespace) -> int:
    """Answer prompts until there are no more, and return the exit code 0.

    Raises:
        UsageError: arguments that cannot be followed.
    """
    source = find_source(
        arguments.model, arguments.model_name_or_path, "--model_name_or_path", arguments.trust_remote_code
    )
    _require_voices(source, arguments)
    if arguments.temperature == 0 and (arguments.top_p or arguments.top_k):
        raise UsageError("--temperature 0 takes the likeliest token each time: leave --top_p and --top_k out.")
    prompts = _given_prompts(arguments)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise UsageError(f"there is no tokenizer in {source.base}: save one with the model.")
    if not arguments.no_template and tokenizer.chat_template is None:
        raise UsageError(
            "the tokenizer has no chat template: add --no_template, by which the model continues each text as it is."
        )
    speaker, voices = _prepared(source, tokenizer, arguments)
    if arguments.seed is not None:
        transformers.set_seed(arguments.seed)
    with quiet():
        for prompt in prompts or _typed_prompts():
            for voice in voices:
                if voice.title:
                    print(f"{voice.title}: ", end="", flush=True)
                try:
                    speaker.answer(voice, prompt)
                except UsageError as error:
                    if prompts:
                        raise
                    voice.messages.clear()
                    print(error)
    return 0


def _require_voices(source: Source, arguments: argparse.Namespace) -> None:
    """Refuse a model that writes no text, and a base that cannot be told from its adapter."""
    if source.task != "causal-lm":
        raise UsageError(f"{source.name} is for the task {source.task}, but a chat needs a causal language model.")
    if not (arguments.base or arguments.base_only):
        return
    if source.adapter is None:
        option = "--base" if arguments.base else "--base_only"
        raise UsageError(f"{source.name} is a whole model, no adapter: leave {option} out.")
    start = str(source.adapter.init_lora_weights).lower()
    changes = f"the start {start}" if start.startswith(_CHANGED_STARTS) else "trained biases"
    if arguments.base and (start.startswith(_CHANGED_STARTS) or source.adapter.bias != "none"):
        raise UsageError(
            f"{changes} changed weights of the base model itself, so that one model in memory cannot show both: talk "
            "to the base by --base_only."
        )


def _prepared(source: Source, tokenizer: object, arguments: argparse.Namespace) -> tuple[Speaker, list[Voice]]:
    """The model on its device, and who talks."""
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = load_base(source, dtype)
    if source.adapter is not None and not arguments.base_only:
        model = attach(model, source)
    if not getattr(model, "hf_device_map", None) or arguments.device:
        try:
            model.to(arguments.device or default_device())
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UsageError(f"the model does not go to --device {arguments.device}: {error}") from error
    add_end_of_answer(model, tokenizer)
    asked = {name: value for name in (*_SAMPLING, "max_new_tokens") if (value := getattr(arguments, name)) is not None}
    speaker = Speaker(model, tokenizer, sampling(model, tokenizer, asked), not arguments.no_template)
    if arguments.base:
        return speaker, [Voice("base", model.disable_adapter), Voice("adapter")]
    return speaker, [Voice("")]


def _given_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompt of the command line or of a pipe; none where someone types."""
    if arguments.prompt is not None:
        text = arguments.prompt
    elif sys.stdin.isatty():
        return []
    else:
        text = sys.stdin.read()
    if not text.strip():
        raise UsageError("the prompt is empty: give it by --prompt or by a pipe, or type in a terminal.")
    return [text.strip()]


def _typed_prompts() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited, and the arrows go through earlier ones)
    print("Ctrl-C ends an answer, Ctrl-D the chat.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the chat)")
            continue
        if text:
            yield text
