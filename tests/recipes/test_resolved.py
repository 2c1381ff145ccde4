"""The settings that a script prints and keeps are a recipe that sets the same, without another recipe."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lorapro_hf.recipes.parser import RecipeParser, read_recipe
from lorapro_hf.trainer.arguments import LoRAProTrainingArguments
from script_helpers import CONFIGS, INPUTS, TINY, script

PROGRAMS = {"run_sft.py": "smollm2-135m.yaml", "run_dpo.py": "smollm2-135m-dpo.yaml"}


def printed(capsys: pytest.CaptureFixture[str], program: str, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        script(program).main([*words, "--print_config"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_the_printed_settings_are_the_recipe_and_its_flags(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(CONFIGS / "smoke" / PROGRAMS[program]), "--learning_rate", "3e-4", "--no_lora_pro"]
    words += [
        "--output_dir",
        "a b: c",
        "--lora_target_modules",
        "q_proj",
        ".*v_proj$",
        "--model_init_kwargs",
        '{"a":1}',
    ]
    Path("again.yaml").write_text(printed(capsys, program, *words), encoding="utf-8")
    settings = read_recipe(Path("again.yaml"))
    assert settings["learning_rate"] == 3e-4 and settings["lora_pro"] is False and settings["output_dir"] == "a b: c"
    parse, read = RecipeParser.parse, []

    def parse_only(parser: RecipeParser, argv: list[str]) -> tuple[Any, ...]:
        read.append(parse(parser, argv))
        raise KeyboardInterrupt

    monkeypatch.setattr(RecipeParser, "parse", parse_only)
    for given in (words, ["again.yaml"]):
        with pytest.raises(SystemExit):
            script(program).main(given)
    for first, second in zip(*read, strict=True):
        for each in fields(first):
            before, after = (getattr(part, each.name, None) for part in (first, second))
            assert before == after or repr(before) == repr(after), each.name
    assert not [path for path in tmp_path.iterdir() if path.name != "again.yaml"]


def test_secrets_and_the_checkpoint_of_one_run_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output_dir", "x", "--hub_token", "hf_abc", "--resume_from_checkpoint", "true", "--use_cpu"]
    parser = RecipeParser((LoRAProTrainingArguments,), "run.py")
    parser.parse(words)
    assert "hf_abc" not in parser.resolved
    assert "# hub_token is left out: it is a secret." in parser.resolved
    assert "# resume_from_checkpoint is left out: it is for a single run." in parser.resolved


@pytest.mark.parametrize(("rank", "said"), [("1", False), ("0", True)])
def test_one_process_prints(
    rank: str, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        RecipeParser((LoRAProTrainingArguments,), "run.py").parse(["--output_dir", "x", "--use_cpu", "--print_config"])
    assert bool(capsys.readouterr().out) == said


def test_bad_settings_are_refused_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script("run_sft.py").main(["--print_config", "--model_name_or_path", "x", "--prompt_column", "question"])
    assert end.value.code == 2
    out, errors = capsys.readouterr()
    assert not out and "--prompt_column and --completion_column go together" in errors


def test_the_settings_are_kept_beside_the_adapter_and_named_in_its_card(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    words = ["--model_name_or_path", f"{INPUTS}/models/llama", "--train_file", f"{INPUTS}/data/text.txt"]
    words += [*TINY, "--max_steps", "1", "--block_size", "16", "--do_train", "--output_dir", str(tmp_path / "out")]
    expected = printed(capsys, "run_clm.py", *words)
    assert not (tmp_path / "out").exists()
    script("run_clm.py").main(words)
    assert (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8") == expected
    assert "`lorapro train recipe.yaml`" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
