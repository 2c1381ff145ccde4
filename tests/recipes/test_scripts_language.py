"""Conversations, instructions and preferences: what run_sft.py and run_dpo.py make of data, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

import trl
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerState

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.instructions import InstructionArguments, conditions, prepared
from lorapro_hf.recipes.model import AdapterArguments
from lorapro_hf.recipes.parser import RecipeParser, read_recipe
from trl_helpers import saved_chat_model, tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
TEMPLATES = {"plain": "Q: {instruction}\nA:"}
QUESTIONS = ["1+1?", "2+2?", "a longer question, 3+3?"]
ANSWERS = ["Two. ```2``` And so on ```x```", "Sorry, no.", "Six. ```6``` Done."]


@cache
def script(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_chat_model(tmp_path_factory.mktemp("model"))


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def questions(folder: Path, count: int = 8) -> Path:
    rows = [{"query": f"{n}?", "response": f"{n + 1}.", "kind": "odd" if n % 2 else "even"} for n in range(count)]
    return rows_file(folder / "questions.jsonl", rows)


def flags(model: Path, output: Path, data: Path, *more: str) -> list[str]:
    common = "--use_cpu --bf16 false --report_to none --max_length 64 --per_device_train_batch_size 2 --logging_steps 1"
    words = ["--model_name_or_path", str(model), "--output_dir", str(output), "--train_file", str(data)]
    return [*words, *common.split(), "--max_steps", "2", "--save_strategy", "no", *more]


NAMED = ("--prompt_column", "query", "--completion_column", "response")


def refused(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        script(name).main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def rows_of(**settings: Any) -> list[dict[str, Any]]:
    data = Dataset.from_dict({"q": QUESTIONS, "a": ANSWERS, "about": ["", "x", None]})
    arguments = InstructionArguments(train_file="rows.jsonl", prompt_column="q", completion_column="a", **settings)
    return list(prepared(data, "train", arguments, tokenizer(), TEMPLATES))


def test_columns_become_prompts_as_the_template_says():
    assert rows_of() == [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    assert rows_of(prompt_template="plain")[0]["prompt"] == "Q: 1+1?\nA:"
    assert rows_of(prompt_template="{x} {instruction}!")[0]["prompt"] == "{x} 1+1?!"
    assert rows_of(prompt_template="chat")[1] == {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "completion": [{"role": "assistant", "content": "Sorry, no."}],
    }
    assert [row["prompt"] for row in rows_of(input_column="about")] == ["1+1?", "2+2?\n\nx", QUESTIONS[2]]


def test_rows_are_left_out_as_the_conditions_say():
    assert [row["prompt"] for row in rows_of(drop_where=["a=(?i)sorry"])] == [QUESTIONS[0], QUESTIONS[2]]
    assert [row["prompt"] for row in rows_of(keep_where=["q=longer", "a=Six"])] == [QUESTIONS[2]]
    assert [row["prompt"] for row in rows_of(keep_where=["q=longer"], drop_where=["q=no such"])] == [QUESTIONS[2]]
    whole = [len(tokenizer()(q + a)["input_ids"]) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    assert len(rows_of(drop_longer_than=min(whole))) == 1
    assert len(rows_of(drop_longer_than=max(whole))) == 3
    assert len(rows_of(drop_longer_than=max(whole) - 1)) == 2


def test_the_first_block_of_code_ends_an_answer():
    pattern = read_recipe(SCRIPTS.parent / "configs" / "paper" / "llama-2-7b-codefeedback.yaml")["completion_pattern"]
    assert [row["completion"] for row in rows_of(completion_pattern=pattern)] == ["Two. ```2```", "Six. ```6```"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_column": "q"}, "go together"),
        ({"prompt_template": "chat"}, "--prompt_template needs --prompt_column"),
        ({"drop_longer_than": 4}, "--drop_longer_than needs --prompt_column"),
        ({"keep_where": ["type"]}, "COLUMN=PATTERN"),
        ({"drop_where": ["type=("]}, "no regular expression"),
        ({"prompt_column": "q", "completion_column": "a", "completion_pattern": "["}, "no regular expression"),
    ],
)
def test_contradictory_instructions_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        InstructionArguments(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_column": "c"}, "no column c"),
        ({"keep_where": ["c=x"]}, "no column c"),
        ({"keep_where": ["q=nowhere"]}, "no row is left"),
        ({"prompt_template": "alpaka"}, "must be chat, plain or a text with"),
    ],
)
def test_instructions_that_fit_no_rows_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        rows_of(**settings)


def test_a_condition_may_hold_an_equals_sign():
    ((column, pattern),) = conditions(["type=a=b"])
    assert column == "type"
    assert pattern.search("xa=bx")


def test_one_regular_expression_names_layers():
    def targets(*given: str) -> Any:
        return AdapterArguments(lora_target_modules=list(given)).peft_config("CAUSAL_LM").target_modules

    assert targets("all-linear") == "all-linear"
    assert targets(".*language_model.*_proj") == ".*language_model.*_proj"
    assert targets("q_proj") == {"q_proj"}
    assert targets("self_attn.q_proj", "v_proj") == {"self_attn.q_proj", "v_proj"}


def test_of_several_recipes_the_later_ones_go_first(tmp_path: Path):
    (tmp_path / "one.yaml").write_text("a: 1\nb: 1\nc: 1\n")
    (tmp_path / "two.yaml").write_text("b: 2\nc: 2\n")
    (tmp_path / "mine.yaml").write_text("extends: [one.yaml, two.yaml]\nc: 3\n")
    assert read_recipe(tmp_path / "mine.yaml") == {"a": 1, "b": 2, "c": 3}


def test_a_share_of_warm_up_is_understood(tmp_path: Path):
    from transformers import TrainingArguments

    (tmp_path / "r.yaml").write_text(f"warmup_steps: 0.25\nuse_cpu: true\noutput_dir: {tmp_path / 'out'}\n")
    (arguments,) = RecipeParser((TrainingArguments,), "x.py").parse([str(tmp_path / "r.yaml")])
    assert arguments.get_warmup_steps(100) == 25


@pytest.mark.slow
def test_instructions_are_trained_and_resumed(model: Path, tmp_path: Path):
    data, output = questions(tmp_path), tmp_path / "out"
    words = flags(model, output, data, *NAMED, "--keep_where", "kind=even", "--do_eval")
    words += ["--do_train", "--save_strategy", "steps", "--save_steps", "1", "--validation_split_percentage", "25"]
    script("run_sft").main(words)
    whole = load_file(output / "adapter_model.safetensors")
    results = json.loads((output / "all_results.json").read_text())
    assert results["train_samples"] == 3
    assert results["eval_loss"] > 0
    PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model), output)
    with pytest.raises(SystemExit):
        script("run_sft").main(words)  # nobody said whether to go on
    script("run_sft").main([*words, "--resume_from_checkpoint", str(output / "checkpoint-1")])
    resumed = load_file(output / "adapter_model.safetensors")
    assert resumed.keys() == whole.keys()
    for name, factor in whole.items():
        assert torch.equal(factor, resumed[name]), name
    assert any(bool(factor.any()) for name, factor in whole.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--adapter_name_or_path", "sft"), marks=pytest.mark.slow)], ids=["new", "continued"]
)
def test_preferences_are_trained(model: Path, tmp_path: Path, more: tuple[str, ...]):
    if more:
        script("run_sft").main(flags(model, tmp_path / "sft", questions(tmp_path), *NAMED))
        more = (more[0], str(tmp_path / more[1]))
    rows = [{"question": f"{n}?", "good": f"{n}.", "chosen": "x", "bad": f"{n + 5}!"} for n in range(6)]
    data = rows_file(tmp_path / "preferences.jsonl", rows)
    columns = ["--prompt_column", "question", "--chosen_column", "good", "--rejected_column", "bad"]
    script("run_dpo").main(flags(model, tmp_path / "out", data, *columns, *more, "--learning_rate", "1e-3"))
    logged = TrainerState.load_from_json(str(tmp_path / "out" / "trainer_state.json")).log_history
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # model and reference agree before the first step
    assert losses[1] != losses[0]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert saved
    assert not any(".ref." in name for name in saved)


def test_without_do_train_adapters_of_quantized_models_learn_instructions_as_conversations_in_float32(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pytest.importorskip("bitsandbytes")
    words = flags(model, tmp_path / "out", questions(tmp_path), *NAMED, "--load_in_4bit", "--learning_rate", "1e-6")
    words += ["--prompt_template", "chat", "--assistant_only_loss"]
    with caplog.at_level(logging.INFO, logger="lorapro_hf"):
        script("run_sft").main(words)
    assert "--lora_pro_master_factors is set" in caplog.text
    assert '"master_factors": true' in (tmp_path / "out" / "lorapro_config.json").read_text()
    state = TrainerState.load_from_json(str(tmp_path / "out" / "trainer_state.json"))
    assert state.global_step == 2
    assert all("lora_pro_grad_norm" in entry for entry in state.log_history if "loss" in entry)


@pytest.mark.slow
def test_an_adapter_is_evaluated_alone(model: Path, tmp_path: Path):
    data = questions(tmp_path)
    script("run_sft").main(flags(model, tmp_path / "sft", data, *NAMED, "--learning_rate", "1e-2"))
    found = {}
    for name, more in {"base": (), "adapter": ("--adapter_name_or_path", str(tmp_path / "sft"))}.items():
        words = flags(model, tmp_path / name, data, *NAMED, "--do_eval", "--validation_file", str(data), *more)
        script("run_sft").main(words)
        found[name] = json.loads((tmp_path / name / "all_results.json").read_text())
        assert "train_loss" not in found[name]
    assert found["adapter"]["eval_loss"] < found["base"]["eval_loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "hold neither messages, prompt and completion, nor text; name them"),
        (("--prompt_column", "question", "--completion_column", "response"), "there is no column question"),
        (("--do_predict",), "lorapro evaluate"),
        ((*NAMED, "--assistant_only_loss"), "--assistant_only_loss needs conversations"),
        ((*NAMED, "--lora_pro_mod", "full"), "did you mean --lora_pro_mode"),
        ((*NAMED, "--load_in_4bit", "--load_in_8bit"), "exclude each other"),
    ],
)
def test_what_cannot_be_done_is_said(
    model: Path, tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    assert message in refused("run_sft", flags(model, tmp_path / "out", questions(tmp_path), *more), capsys)


@pytest.mark.skipif(trl.__version__ < "1", reason="older versions of TRL keep rows without a completion")
def test_prompts_that_fill_the_length_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = flags(model, tmp_path / "out", questions(tmp_path), *NAMED, "--prompt_template", "alpaca")
    assert "--max_length 64 cuts off every completion" in refused("run_sft", words, capsys)


def test_messages_need_a_chat_template(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(model).save_pretrained(bare)
    silent = type(tokenizer()).from_pretrained(model)
    silent.chat_template = None
    silent.save_pretrained(bare)
    data, output = questions(tmp_path), tmp_path / "out"
    assert "no chat template" in refused(
        "run_sft", flags(bare, output, data, *NAMED, "--prompt_template", "chat"), capsys
    )
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in ("a", "b")]
    pairs = rows_file(tmp_path / "pairs.jsonl", [{"chosen": turns[0], "rejected": turns[1]}] * 4)
    assert "no chat template" in refused("run_dpo", flags(bare, output, pairs), capsys)
    assert "there is no column chosen" in refused("run_dpo", flags(bare, output, data), capsys)


def test_models_that_mark_languages_by_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = script("run_seq2seq")
    marking = type("Marking", (), {"set_src_lang_special_tokens": None})
    monkeypatch.setattr(program, "load_tokenizer", lambda _: marking())
    words = ["--model_name_or_path", "marking", "--train_file", str(questions(tmp_path)), "--do_train", "--use_cpu"]
    assert "marks languages by tokens of its own" in refused("run_seq2seq", words, capsys)
