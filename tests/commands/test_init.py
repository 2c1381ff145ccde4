"""`lorapro init` writes a recipe that its script accepts, and refuses data, models and files that do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lorapro_hf.cli import main
from lorapro_hf.commands.init.columns import DPO, SEQ2SEQ, SFT, column_settings, task_of
from lorapro_hf.config import MODE
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.parser import read_recipe
from script_helpers import CONFIGS, INPUTS, make_inputs, script

LLAMA = f"{INPUTS}/models/llama"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "build").symlink_to(inputs / "build")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(**columns: Any) -> str:
    """A JSONL file of two equal rows."""
    Path("mine.jsonl").write_text(f"{json.dumps(columns)}\n" * 2, encoding="utf-8")
    return "mine.jsonl"


@pytest.mark.parametrize(
    ("columns", "task", "settings"),
    [
        (["id", "messages"], SFT, {}),
        (["prompt", "completion"], SFT, {"prompt_column": "prompt", "completion_column": "completion"}),
        (["answer", "question"], SFT, {"prompt_column": "question", "completion_column": "answer"}),
        (
            ["instruction", "input", "output"],
            SFT,
            {"prompt_column": "instruction", "completion_column": "output", "input_column": "input"},
        ),
        (["text", "source"], SFT, {}),
        (["prompt", "chosen", "rejected"], DPO, {}),
    ],
)
def test_columns_are_found_by_their_names(columns: list[str], task: str, settings: dict[str, str]) -> None:
    assert task_of(columns) == task
    assert column_settings(task, None, columns, "x") == settings


@pytest.mark.parametrize(
    ("task", "named", "said"),
    [
        (SFT, None, r"sft needs messages, .* but its columns are a, b\. Name them by --columns PROMPT COMPLETION"),
        (DPO, None, "dpo needs chosen and rejected, but its columns are a, b"),
        (SEQ2SEQ, ["a"], r"--columns READ WRITTEN"),
        (SFT, ["a", "c"], r"x has no column c; its columns are a, b\."),
    ],
)
def test_columns_that_do_not_fit_are_named_with_those_there_are(task: str, named: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        column_settings(task, named, ["a", "b"], "x")


@pytest.mark.parametrize(
    ("columns", "words", "program"),
    [
        ({"question": "Why?", "answer": "So."}, [], "run_sft.py"),
        ({"a": "Why?", "b": "So."}, ["--columns", "a", "b"], "run_sft.py"),
        ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, [], "run_dpo.py"),
        ({"document": "Why?", "summary": "So."}, ["--task", "seq2seq"], "run_seq2seq.py"),
    ],
)
def test_its_script_accepts_the_recipe(
    columns: dict[str, str], words: list[str], program: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--model", LLAMA, "--data", data(**columns), *words, "--output", "mine.yaml"]) == 0
    out = capsys.readouterr().out
    assert f"2 rows with the columns {', '.join(columns)}" in out and "lorapro train mine.yaml" in out
    settings = read_recipe(Path("mine.yaml"))
    assert settings["script"] == program and settings["lora_pro_mode"] == MODE
    assert settings["train_file"] == "mine.jsonl" and settings["output_dir"] == "runs/mine"
    with pytest.raises(SystemExit) as end:
        script(program).main(["mine.yaml", "--print_config"])
    assert end.value.code == 0


def test_the_recipe_trains(folder: Path) -> None:
    rows = {"question": "Why?", "answer": "So."}
    assert main(["init", "--model", LLAMA, "--data", data(**rows), "--output", "mine.yaml"]) == 0
    settings = read_recipe(Path("mine.yaml"))
    assert settings["learning_rate"] == read_recipe(CONFIGS / "smollm2-135m.yaml")["learning_rate"]
    script("run_sft.py").main(["mine.yaml", "--max_steps", "1", "--disable_tqdm", "true", "--use_cpu", "--bf16", "0"])
    assert (folder / "runs" / "mine" / "adapter_model.safetensors").is_file()


def test_a_recipe_that_exists_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("mine: 1\n")
    words = ["init", "--model", LLAMA, "--data", data(text="So.")]
    assert main(words) == 2
    assert Path("recipe.yaml").read_text() == "mine: 1\n"
    assert "recipe.yaml exists: give another --output, or --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert read_recipe(Path("recipe.yaml"))["script"] == "run_sft.py"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "mine.jsonl"], "name it by --model"),
        (["--model", "./nowhere", "--data", "mine.jsonl"], "--model ./nowhere: there is no such folder"),
        (["--model", ".", "--data", "mine.jsonl"], "has no config.json and 0 GGUF files"),
        (["--model", LLAMA, "--data", "absent.jsonl"], "there is no such file"),
        (["--model", LLAMA, "--data", "mine.jsonl"], "its columns are a, b"),
        (["--model", LLAMA, "--data", "mine.jsonl", "--output", "x.txt"], "must end with .yaml"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    words: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    data(a="Why?", b="So.")
    assert main(["init", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("lorapro init: error: ") and said in line
    assert not list(folder.glob("*.yaml"))


def test_messages_need_a_chat_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.chat_template = None
    tokenizer.save_pretrained("plain")
    Path("plain", "config.json").write_text(Path(LLAMA, "config.json").read_text())
    turns = data(messages=[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    assert main(["init", "--model", "plain", "--data", turns]) == 2
    assert "plain has no chat template for messages" in capsys.readouterr().err
    assert main(["init", "--model", "plain", "--data", data(question="Why?", answer="So.")]) == 0
    assert read_recipe(Path("recipe.yaml"))["prompt_template"] == "alpaca"


def test_a_terminal_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([LLAMA, data(text="So.")])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert main(["init"]) == 0
    assert read_recipe(Path("recipe.yaml"))["train_file"] == "mine.jsonl"
