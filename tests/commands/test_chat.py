"""`lorapro chat` answers as greedy decoding does, keeps the conversation, and says in a line what does not fit."""

from __future__ import annotations

import builtins
import io
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from evaluation_helpers import plain_greedy, tiny_adapter, tiny_model
from lorapro_hf import cli

GREEDY = ("--temperature", "0", "--max_new_tokens", "6", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, adapters of it, and the base without a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    base = tiny_model(folder / "base")
    tiny_adapter(base, folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(folder / "plain")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "plain")
    model.save_pretrained(folder / "silent")
    settings = LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(folder / "pissa")
    return folder


def answer(folder: Path, prompt: str, with_adapter: bool = True) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if with_adapter:
        model = PeftModel.from_pretrained(model, str(folder / "adapter")).eval()
    return plain_greedy(model, AutoTokenizer.from_pretrained(folder / "base"), prompt, 6)


def test_a_prompt_is_answered_by_adapter_and_base(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, base = (answer(folder, "<user>Hello<assistant>", each) for each in (True, False))
    assert ours != base
    adapter = str(folder / "adapter")
    assert cli.main(["chat", adapter, "--prompt", "Hello", *GREEDY]) == 0
    assert capsys.readouterr().out == f"{ours}\n"
    assert cli.main(["chat", adapter, "--prompt", "Hello", "--base", *GREEDY]) == 0
    assert capsys.readouterr().out == f"base: {base}\nadapter: {ours}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert cli.main(["chat", adapter, "--base_only", *GREEDY]) == 0
    assert capsys.readouterr().out == f"{base}\n"


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: Any) -> None:
    """Let someone type lines, or keys as exceptions."""
    typed = iter(lines)

    def next_line(_: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", next_line)


def test_a_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(monkeypatch, "Hello", KeyboardInterrupt(), "", "And?", "x" * 2000, "Hello", EOFError())
    assert cli.main(["chat", str(folder / "adapter"), *GREEDY]) == 0
    first = answer(folder, "<user>Hello<assistant>")
    second = answer(folder, f"<user>Hello<assistant>{first}<user>And?<assistant>")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:5] == [first, "", "(Ctrl-D ends the chat)", second]
    assert lines[5].startswith("(the chat is longer than the 1024 tokens") and "shorten the prompt" in lines[6]
    assert lines[7] == first  # it has started anew


def test_ctrl_c_ends_an_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, calls = TextStreamer.put, []

    def interrupted(self: TextStreamer, value: Any) -> None:
        put(self, value)
        calls.append(None)
        if len(calls) == 3:  # the prompt and two tokens
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    type_in(monkeypatch, "Hello", "And?", EOFError())
    assert cli.main(["chat", str(folder / "adapter"), *GREEDY]) == 0
    whole = answer(folder, "<user>Hello<assistant>")
    lines = capsys.readouterr().out.splitlines()
    assert whole.startswith(lines[1]) and len(lines[1]) < len(whole)
    assert lines[2] == answer(folder, f"<user>Hello<assistant>{lines[1]}<user>And?<assistant>")


def test_without_a_template_texts_are_continued(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(folder / "plain"), "--no_template", "--prompt", "Hello", *GREEDY]) == 0
    assert capsys.readouterr().out == f"{answer(folder, 'Hello', with_adapter=False)}\n"


def test_sampling_depends_on_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", str(folder / "base"), "--prompt", "Hello", "--temperature", "3", "--max_new_tokens", "8"]
    for seed in "001":
        assert cli.main([*words, "--seed", seed]) == 0
    first, again, other = capsys.readouterr().out.splitlines()
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("plain --prompt x", "the tokenizer has no chat template: add --no_template"),
        ("base --base --prompt x", "base is a whole model, no adapter: leave --base out"),
        ("base --model_name_or_path y", "base is a whole model, no adapter: leave --model_name_or_path out"),
        ("pissa --base --prompt x", "the start pissa changed weights of the base model itself"),
        ("silent --prompt x", "silent: save one with the model"),
        ("adapter --temperature 0 --top_k 3", "leave --top_p and --top_k out"),
        ("adapter --prompt  ", "the prompt is empty"),
        ("base --prompt x --max_new_tokens 1024", "shorten the prompt, or lower --max_new_tokens"),
        ("base --prompt x --device nowhere", "the model does not go to --device nowhere"),
        ("none", "there is no folder"),
    ],
)
def test_bad_input_is_one_line(words: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = words.split(" ")
    assert cli.main(["chat", f"{folder}/{first}", *filter(None, others), *([""] if words.endswith(" ") else [])]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
