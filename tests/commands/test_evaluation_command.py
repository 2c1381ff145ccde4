"""`lorapro evaluate` before lm-eval is loaded: options, file names and what is missing."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from lorapro_hf.commands.evaluate.command import EVALUATE, EVALUATE_EXAMPLES, add_evaluate, default_output
from lorapro_hf.options import UsageError


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_evaluate(parser)
    return parser.parse_args(options)


def test_default_output_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    folder = Path("runs/evaluation/gsm8k")
    for name in ("runs/mine", "./runs/mine/", str(tmp_path / "runs" / "mine")):
        assert default_output("gsm8k", name, None) == folder / "runs-mine.json"
    assert default_output("gsm8k", None, "meta-llama/Llama-3.1-8B") == folder / "meta-llama-Llama-3.1-8B.json"
    assert (
        default_output("tasks/own.yaml", "runs/mine", "me/base")
        == folder.with_name("own") / "runs-mine-on-me-base.json"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["gsm8k", "--num_fewshot", "-1"], "'-1' is not a whole number"),
        (["gsm8k", "--dataset_split", "test"], "unrecognized arguments: --dataset_split"),
        ([], "required: TASK"),
    ],
)
def test_the_parser_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*options)
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    arguments = parse("word_problems", "--adapter", "runs/mine")
    with pytest.raises(UsageError, match=r"needs lm_eval. Install with `pip install -e '.*\[evaluate\]'`"):
        arguments.run(arguments)


def test_help_loads_neither_torch_nor_lm_eval() -> None:
    code = "import sys, lorapro_hf.commands.evaluate.command as command\n"
    code += "print({'torch', 'transformers', 'lm_eval'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert EVALUATE.strip() and "exit codes" in EVALUATE_EXAMPLES
