"""A dry run shows what would be trained, takes two steps and writes nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from lorapro_hf.recipes.dry_run import shown
from script_helpers import INPUTS, TINY, script

LLAMA = f"{INPUTS}/models/llama"


def words(inputs: Path, *more: str) -> list[str]:
    Path("mine.jsonl").write_text("".join(json.dumps({"q": f"Why {i}?", "a": "So."}) + "\n" for i in range(8)))
    model = ["--model_name_or_path", str(inputs / LLAMA), "--train_file", "mine.jsonl", "--do_train"]
    columns = ["--prompt_column", "q", "--completion_column", "a"]
    return [*model, *columns, *TINY, "--max_steps", "7", "--output_dir", "runs/out", "--dry_run", *more]


@pytest.mark.parametrize("more", [[], ["--no_lora_pro"]], ids=["lora_pro", "plain"])
def test_it_shows_the_trained_tokens_steps_memory_and_time(
    more: list[str], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script("run_sft.py").main(words(inputs, *more, "--save_strategy", "steps", "--save_steps", "1"))
    out = capsys.readouterr().out
    assert os.listdir() == ["mine.jsonl"]
    assert out.count("\nexample ") == 3
    for line in re.findall(r"^.*\[\[.*$", out, re.MULTILINE):
        prompt, trained = line.split("[[")
        assert prompt.startswith("Why") and trained.startswith("So.")
    assert "optimizer steps: 7\n" in out
    assert re.search(r"memory of the optimizer: \d", out) and re.search(r"time of one step: \d+\.\d\d s", out)
    assert "Nothing is written" in out


def test_without_a_training_there_is_nothing_to_show(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        script("run_sft.py").main(words(inputs, "--do_train", "false", "--do_eval"))
    assert end.value.code == 2 and "--dry_run shows a training: set --do_train" in capsys.readouterr().err


def test_trained_parts_are_green_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [("Why?", False), ("So\033[1m.", True)]
    assert shown(parts) == "Why?[[So\\033[1m.]]"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(parts) == "Why?\033[32mSo\\033[1m.\033[0m"
