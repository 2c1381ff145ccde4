"""How is a problem put to the model?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorapro_hf.options import UsageError, require_packages
from lorapro_hf.recipes.instructions import ALPACA

STYLES = ("plain", "alpaca", "chat")

_COMPLETE_CODE = """\
Complete the Python function below. Reply with the whole function, its signature included, and with nothing else. Use \
the standard library only.

```python
{prompt}
```"""
_FENCE = "```"


def check_style(style: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a style that is unknown or that the tokenizer cannot follow.

    Raises:
        UsageError: with the remedy.
    """
    if style not in STYLES:
        raise UsageError(f"prompt_style={style!r} is none of {', '.join(STYLES)}.")
    if style == "chat":
        if tokenizer.chat_template is None:
            raise UsageError("the tokenizer has no chat template: use --prompt_style plain or alpaca.")
        require_packages("a chat template", "jinja2", extra="demo")


def question_prompt(
    question: str, style: str, examples: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase
) -> str:
    """A word problem, after examples with their answers.

    Args:
        question: the problem.
        style: one of `STYLES`.
        examples: rows with `question` and `answer`.
        tokenizer: for its chat template.
    """
    if style == "alpaca":
        return ALPACA.format(instruction=question)
    turns = [(f"Question: {row['question']}\nAnswer:", row["answer"]) for row in examples]
    last = f"Question: {question}\nAnswer:"
    if style == "plain":
        return "".join(f"{asked} {answer}\n\n" for asked, answer in turns) + last
    messages = [
        message
        for asked, answer in turns
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
    return _chat([*messages, {"role": "user", "content": last}], tokenizer, add_generation_prompt=True)


def question_stops(style: str) -> tuple[str, ...]:
    """What ends an answer to a word problem."""
    return ("### Instruction:",) if style == "alpaca" else ("Question:", "</s>", "<|im_end|>")


def code_prompt(prompt: str, style: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The head of a function that the model is to complete.

    Args:
        prompt: imports, signature and docstring.
        style: one of `STYLES`.
        tokenizer: for its chat template.
    """
    if style == "plain":
        return prompt
    prompt = prompt.rstrip()  # an empty line would look like the function's end
    if style == "alpaca":
        return f"{ALPACA.format(instruction=_COMPLETE_CODE.format(prompt=prompt))}{_FENCE}python\n"
    # the reply is begun for the model, so that it goes on with the function's body
    messages = [
        {"role": "user", "content": _COMPLETE_CODE.format(prompt=prompt)},
        {"role": "assistant", "content": f"The complete function:\n{_FENCE}python\n{prompt}"},
    ]
    return _chat(messages, tokenizer, continue_final_message=True)


def code_stops(style: str) -> tuple[str, ...]:
    """What ends a function."""
    after = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # what begins after a body
    return {"plain": after, "alpaca": (_FENCE,), "chat": (*after, _FENCE)}[style]


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
