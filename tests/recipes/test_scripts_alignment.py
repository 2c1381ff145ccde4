"""Judged answers, rewards and models of rewards: which rows their scripts take, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from datasets import Dataset

from lorapro_hf.options import UsageError
from script_helpers import INPUTS, QUIET, script

LLAMA, DATA = f"{INPUTS}/models/llama", f"{INPUTS}/data"
PROBLEMS = ["--train_file", f"{DATA}/problems.jsonl"]


@pytest.fixture
def refusal(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """The last line of a program on stderr, before it ends with exit code 2."""
    monkeypatch.chdir(inputs)

    def run(program: str, *words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            script(program).main(
                ["--model_name_or_path", LLAMA, *words, "--output_dir", str(tmp_path / "out"), *QUIET, "--bf16=false"]
            )
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (
            "run_kto.py",
            ["--train_file", f"{DATA}/preferences.jsonl"],
            "there is no column completion; the columns are ['prompt', 'chosen', 'rejected']. Name them by",
        ),
        ("run_kto.py", ["--train_file", f"{DATA}/judged.jsonl", "--do_predict"], "have nothing to predict"),
        (
            "run_kto.py",
            ["--train_file", f"{DATA}/judged.jsonl", "--per_device_train_batch_size", "1"],
            "--per_device_train_batch_size 1: KTO compares the rows of a batch",
        ),
        ("run_grpo.py", PROBLEMS, "name a reward by --reward_funcs: number, FILE.py:FUNCTION or MODULE:FUNCTION"),
        (
            "run_grpo.py",
            [*PROBLEMS, "--reward_funcs", "number"],
            "there is no column prompt; the columns are ['question', 'answer']. Name the prompt's by --prompt_column",
        ),
        (
            "run_grpo.py",
            ["--train_file", f"{DATA}/preferences.jsonl", "--reward_funcs", "number"],
            "there is no column answer; the columns are ['prompt', 'chosen', 'rejected']. The reward number needs it",
        ),
        ("run_grpo.py", [*PROBLEMS, "--reward_funcs", "brevity"], "must be number, FILE.py:FUNCTION or MODULE:FUNCTI"),
        ("run_grpo.py", [*PROBLEMS, "--reward_funcs", "no.py:f"], "--reward_funcs no.py:f: cannot read no.py"),
        ("run_grpo.py", [*PROBLEMS, "--reward_funcs", "no_such:f"], "cannot read no_such: No module named 'no_such'"),
        ("run_grpo.py", [*PROBLEMS, "--reward_funcs", f"{DATA}/rewards.py:f"], "rewards.py has no function f"),
        (
            "run_grpo.py",
            [*PROBLEMS, "--reward_funcs", "number", "--num_generations", "3"],
            "must be divisible by num_generations (3)",
        ),
        (
            "run_reward.py",
            PROBLEMS,
            "there is no column chosen; the columns are ['question', 'answer']. Name them by --prompt_column",
        ),
        (
            "run_reward.py",
            ["--train_file", f"{DATA}/preferences.jsonl", "--max_length", "4"],
            "every answer has more than --max_length 4 tokens; raise it",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(
    program: str, words: list[str], message: str, refusal: Callable[..., str]
) -> None:
    assert message in refusal(program, *words)


def judged(labels: list[Any], **settings: Any) -> Dataset:
    texts = [f"{n}" for n in range(len(labels))]
    module = script("run_kto.py")
    data = module.JudgedArguments(train_file="x.jsonl", completion_column="answer", **settings)
    return module.judged(Dataset.from_dict({"prompt": texts, "answer": texts, "label": labels}), "train", data)


@pytest.mark.parametrize("labels", [[True, False, None], [1, 0, None], [1.0, 0.0, float("nan")]])
def test_judgements_are_true_and_false_or_numbers(labels: list[Any]) -> None:
    rows = judged(labels)
    assert list(rows["label"]) == [True, False] and list(rows["completion"]) == ["0", "1"]


def test_other_judgements_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the column label of the train set must hold true and false.*has 'bad'"):
        judged(["good", "bad"])
    with pytest.raises(UsageError, match="and has 2"):
        judged([1, 2])


def test_messages_need_a_chat_template(inputs: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    module = script("make_smoke_inputs.py")
    silent = module.byte_tokenizer()
    silent.chat_template = None
    silent.save_pretrained(tmp_path / "silent")
    turns = [{"role": "user", "content": "?"}]
    said = [{"role": "assistant", "content": "!"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": turns, "completion": said, "label": True}))
    words = ["--train_file", str(tmp_path / "rows.jsonl"), "--tokenizer_name", str(tmp_path / "silent")]
    assert "has no chat template for messages" in refusal("run_kto.py", *words)


def test_the_right_number_is_rewarded() -> None:
    number = script("run_grpo.py").number
    said = ["It is 1,200.", "First 1200, then 7", "none", "-3.50", "3"]
    right = ["so #### 1200", "1200", "4", "-3.5", "no number"]
    assert number(completions=said, answer=right, prompts=said) == [1.0, 0.0, 0.0, 1.0, 0.0]
    turns = [[{"role": "assistant", "content": text}] for text in said]
    assert number(completions=turns, answer=right) == [1.0, 0.0, 0.0, 1.0, 0.0]


def prompts(template: str | None, **columns: list[Any]) -> list[dict[str, Any]]:
    module = script("run_grpo.py")
    data = module.RewardedArguments(
        train_file="x.jsonl", prompt_column="q", prompt_template=template, reward_funcs=["number"]
    )
    return list(module.prompts(Dataset.from_dict({"answer": ["1", "2"], **columns}), "train", data, [module.number]))


def test_prompts_become_what_the_template_says_and_other_columns_stay() -> None:
    given: dict[str, list[Any]] = {"q": ["1+0?", None], "prompt": ["x", "y"]}
    assert prompts(None, **given) == [{"answer": "1", "prompt": "1+0?"}]
    assert prompts("Q: {instruction}", **given)[0]["prompt"] == "Q: 1+0?"
    assert prompts("chat", **given)[0]["prompt"] == [{"role": "user", "content": "1+0?"}]
    turns = [[{"role": "user", "content": "?"}]] * 2
    assert prompts(None, q=turns)[1] == {"answer": "2", "prompt": turns[1]}
    with pytest.raises(UsageError, match="holds messages: leave out --prompt_template"):
        prompts("chat", q=turns)
    with pytest.raises(UsageError, match=r"must be chat or a text with \{instruction\}"):
        prompts("alpaka", **given)
