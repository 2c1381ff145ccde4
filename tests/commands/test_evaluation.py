"""Generation in batches, answers as lm-evaluation-harness reads them, prompts, samples, and what the tasks report."""

from __future__ import annotations

import gzip
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_helpers import GSM8K, answer_with, read_rows, tiny_adapter, tiny_model, write_rows
from lorapro_hf.commands.common.generation import complete, cut_at
from lorapro_hf.commands.evaluate.answers import FinalAnswer, flexible_answer, judge, normalized, strict_answer
from lorapro_hf.commands.evaluate.gsm8k import evaluate_gsm8k, evaluate_word_problems
from lorapro_hf.commands.evaluate.humaneval import evaluate_humaneval
from lorapro_hf.commands.evaluate.sandbox import Limits, Sandbox
from lorapro_hf.commands.evaluate.solving import Solving, fingerprint
from lorapro_hf.options import UsageError

PROMPTS = ["a", "Question: how much?\nAnswer:", "def f(x):\n", "1, 2, 3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


# Generation


def plain_greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        best = model(ids, use_cache=False).logits[0, -1].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@torch.no_grad()
def test_a_batch_is_answered_as_single_prompts_are_without_cache_and_padding(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)  # which greedy answers know nothing of
    expected = [plain_greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)  # the prompts matter
    assert [each.text for each in complete(model, tokenizer, PROMPTS, 12)] == expected


def test_a_text_ends_at_the_first_stop_string_and_says_so(model: Any, tokenizer: Any) -> None:
    whole = [each.text for each in complete(model, tokenizer, PROMPTS, 24)]
    stop = whole[1][10:13]
    stopped = complete(model, tokenizer, PROMPTS, 24, stop=[stop, "never written"])
    assert [each.text for each in stopped] == [text.split(stop)[0] for text in whole]
    assert [each.finished for each in stopped] == [stop in text for text in whole]
    assert stopped[1].finished and not all(each.finished for each in stopped)
    assert cut_at("a\nb\nc", ["\nc", "\nb"]) == "a"


def test_a_stop_string_that_reaches_into_the_prompt_does_not_count(model: Any, tokenizer: Any) -> None:
    first = complete(model, tokenizer, ["def f(x):\n"], 8)[0].text
    assert complete(model, tokenizer, ["def f(x):\n"], 8, stop=["\n" + first[0]])[0].text == first


def test_end_tokens_of_the_generation_settings_count(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = complete(model, tokenizer, ["a"], 8)[0]
    assert not whole.finished
    ids = tokenizer(whole.text)["input_ids"]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, ids[3]])
    ended = complete(model, tokenizer, ["a"], 8)[0]
    assert ended.finished and len(ended.text) <= 4 < len(whole.text)


def test_a_stop_string_that_is_a_token_of_its_own_ends_a_text(model: Any, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = complete(model, tokenizer, ["a"], 8)[0].text
    tokenizer.add_special_tokens({"additional_special_tokens": [whole[3]]})  # it leaves no text behind
    ended = complete(model, tokenizer, ["a"], 8, stop=[whole[3]])[0]
    assert ended.finished and ended.text == whole.split(whole[3])[0]


# Answers


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("1+1=2\n#### 2", True, True),
        ("#### 2.\nQuestion", True, True),  # one full stop at the end does not count
        ("#### $2", False, True),
        ("####2", False, True),
        ("The answer is 2.", False, True),
        ("#### 2\nThe answer is: 3", True, False),  # first mark, last number
        ("#### 3\n#### 2", False, True),
        ("#### 2.0", False, False),
        ("2 apples, 5 pears", False, False),
        ("", False, False),
    ],
)
def test_answers_are_read_as_the_harness_reads_them(text: str, strict: bool, flexible: bool) -> None:
    assert judge(text, "1+1=2\n#### 2") == {"strict_match": strict, "flexible_extract": flexible}


def test_thousands_signs_and_missing_answers() -> None:
    assert judge("#### 1,200", "3*400\n#### 1200") == {"strict_match": True, "flexible_extract": True}
    assert judge("It is $1,200.", "#### 1,200") == {"strict_match": False, "flexible_extract": True}
    assert judge("#### -3", "#### 3") == {"strict_match": False, "flexible_extract": False}
    assert strict_answer("none") == flexible_answer("none") == "[invalid]"
    assert normalized("a\n#### 1,200.") == "1200"
    assert judge("#### 2", "1+1=2\n#### 2\n")["strict_match"]


def test_metric_counts_both_ways() -> None:
    metric = FinalAnswer(keep_in_memory=True)
    texts = ["#### 2", "2", "3", "no"]
    assert metric.compute(predictions=texts, references=["#### 2"] * 4) == {
        "strict_match": 0.25,
        "flexible_extract": 0.5,
    }


# GSM8K


def test_figures_and_samples(tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = {"1 + 1": " 1+1=2\n#### 2", "3 cars": " They cost $1,200.", "2 - 5": " 3"}
    batches = answer_with(monkeypatch, lambda prompt: next(text for key, text in replies.items() if key in prompt))
    data = write_rows(tmp_path / "rows.jsonl", GSM8K)
    samples_file = tmp_path / "out" / "samples.jsonl"
    found = evaluate_gsm8k(model, tokenizer, data, solving=Solving(batch_size=2, samples_file=samples_file))
    assert found.pop("flexible_extract_stderr") == pytest.approx(math.sqrt(2 / 9 / 2))
    assert found.pop("strict_match_stderr") == pytest.approx(math.sqrt(2 / 9 / 2))
    assert found == {
        "task": "gsm8k",
        "problems": 3,
        "strict_match": pytest.approx(1 / 3),
        "flexible_extract": pytest.approx(2 / 3),
        "unfinished": 0.0,
    }
    assert [len(batch) for batch in batches] == [2, 1]
    assert "3 cars" in batches[0][0]  # the longest first
    samples = {row["id"]: row for row in read_rows(samples_file)}
    assert samples["1"]["prompt"] == "Question: What do 3 cars for $400 cost together?\nAnswer:"
    assert samples["1"]["text"] == " They cost $1,200." and samples["1"]["answer"] == GSM8K[1]["answer"]
    assert not samples["1"]["strict_match"] and samples["1"]["flexible_extract"] and samples["1"]["finished"]


def test_prompts_of_the_styles(tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = answer_with(monkeypatch, lambda prompt: "")
    data, few = write_rows(tmp_path / "a.jsonl", GSM8K[:1]), write_rows(tmp_path / "b.jsonl", GSM8K[1:])
    for style, shots in (("plain", 1), ("chat", 1), ("alpaca", 0)):
        more = {"num_fewshot": shots, "fewshot_dataset": few} if shots else {}
        evaluate_gsm8k(model, tokenizer, data, prompt_style=style, **more)
    example = "Question: What do 3 cars for $400 cost together?\nAnswer:"
    asked = "Question: What is 1 + 1?\nAnswer:"
    answer = GSM8K[1]["answer"]
    assert [batch[0] for batch in batches[:2]] == [
        f"{example} {answer}\n\n{asked}",
        f"<user>{example}<assistant>{answer}<user>{asked}<assistant>",
    ]
    assert batches[2][0].endswith("\n\n### Instruction:\nWhat is 1 + 1?\n\n### Response:\n")


def test_no_problem_is_its_own_example(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = answer_with(monkeypatch, lambda prompt: "")
    data = write_rows(tmp_path / "rows.jsonl", GSM8K)
    evaluate_gsm8k(model, tokenizer, data, num_fewshot=2, fewshot_dataset=data)
    assert all(prompt.count("Question:") == 3 for prompt in batches[0])
    assert all(prompt.count(prompt.rpartition("Question:")[2]) == 1 for prompt in batches[0])


def test_word_problems_are_those_that_the_demo_holds_out(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorapro_hf.commands.demo.problems import load_problems
    from lorapro_hf.commands.demo.settings import DemoSettings

    batches = answer_with(monkeypatch, lambda prompt: "")
    assert evaluate_word_problems(model, tokenizer, solving=Solving(batch_size=64))["problems"] == 64
    held_out = load_problems(DemoSettings())[1]["question"]
    assert sorted(batches[0]) == sorted(f"Question: {question}\nAnswer:" for question in held_out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "{tmp}/none.jsonl"}, "none.jsonl: there is no such file"),
        ({"dataset": "no/such_data"}, "cannot load the data set 'no/such_data'"),
        ({"dataset": "{tmp}/columns.jsonl"}, "lacks ['answer']"),
        ({"dataset": "{tmp}/empty.jsonl"}, "is empty"),
        ({"dataset": "{tmp}/answers.jsonl"}, "does not end with '#### '"),
        ({"dataset": "{tmp}/numbers.jsonl"}, "the answer '2' does not end with '#### '"),
        ({"dataset_split": "test"}, "neither configuration nor split"),
        ({"num_fewshot": 1}, "by --fewshot_dataset"),
        ({"num_fewshot": 9, "fewshot_dataset": "{tmp}/rows.jsonl"}, "only 3 examples"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"fewshot_dataset": "{tmp}/rows.jsonl"}, "goes with num_fewshot"),
        ({"num_fewshot": 1, "prompt_style": "alpaca"}, "no room for examples"),
        ({"prompt_style": "poem"}, "none of plain, alpaca, chat"),
        ({"limit": 0}, "limit=0 at least 1"),
        ({"solving": Solving(max_new_tokens=2000)}, "lower --max_new_tokens"),
    ],
)
def test_gsm8k_refuses(settings: dict[str, Any], message: str, tmp_path: Path, model: Any, tokenizer: Any) -> None:
    write_rows(tmp_path / "rows.jsonl", GSM8K)
    write_rows(tmp_path / "columns.jsonl", [{"question": "a"}])
    write_rows(tmp_path / "answers.jsonl", [{"question": "a", "answer": "two"}])
    write_rows(tmp_path / "numbers.jsonl", [{"question": "a", "answer": 2}])
    (tmp_path / "empty.jsonl").touch()
    settings = {
        key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
        for key, value in {"dataset": "{tmp}/rows.jsonl", **settings}.items()
    }
    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate_gsm8k(model, tokenizer, **settings)


def test_other_settings_that_are_refused(model: Any, folder: Path) -> None:
    with pytest.raises(UsageError, match="batch_size=0 must be at least 1"):
        Solving(batch_size=0)
    with pytest.raises(UsageError, match="resume needs the samples_file"):
        Solving(resume=True)
    without = AutoTokenizer.from_pretrained(folder)
    without.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        evaluate_gsm8k(model, without, prompt_style="chat")
    with pytest.raises(UsageError, match="Lower --limit"):
        evaluate_word_problems(model, without, limit=10**6)


# Interrupted evaluations


def test_an_interrupted_evaluation_goes_on(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def write(prompt: str) -> str:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(prompt)
        return "\u2028\x85#### 2"  # what some call ends of lines

    answer_with(monkeypatch, write)
    data, path = write_rows(tmp_path / "rows.jsonl", GSM8K), tmp_path / "samples.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_gsm8k(model, tokenizer, data, solving=Solving(batch_size=1, samples_file=path))
    whole = path.read_text()
    assert whole.count("\n") == 2
    path.write_text(whole + whole[:30])  # cut off while it was written
    with pytest.raises(UsageError, match="go on with it by --resume"):
        evaluate_gsm8k(model, tokenizer, data, solving=Solving(samples_file=path))
    for style, tokens in (("plain", 7), ("alpaca", 512)):
        solving = Solving(max_new_tokens=tokens, samples_file=path, resume=True)
        with pytest.raises(UsageError, match="another model, adapter or other settings"):
            evaluate_gsm8k(model, tokenizer, data, prompt_style=style, solving=solving)
    left: list[int] = []
    batches = answer_with(monkeypatch, lambda prompt: "#### 2")
    solving = Solving(samples_file=path, resume=True, start=left.append)
    assert evaluate_gsm8k(model, tokenizer, data, solving=solving)["strict_match"] == pytest.approx(1 / 3)
    assert left == [1] and not set(batches[0]) & set(asked)
    assert sorted(row["id"] for row in read_rows(path)) == ["0", "1", "2"]


def test_fingerprint_tells_models_adapters_and_settings_apart(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"max_new_tokens": 4}
    marks = [fingerprint(base, settings), fingerprint(base, {"max_new_tokens": 5})]
    adapted = PeftModel.from_pretrained(base, tiny_adapter(folder, tmp_path))
    marks.append(fingerprint(adapted, settings))
    assert fingerprint(adapted, settings) == marks[-1]
    next(p for name, p in adapted.named_parameters() if "lora_B" in name).data[0, 0] += 1
    marks.append(fingerprint(adapted, settings))
    assert len(set(marks)) == 4


# HumanEval

CODE = [
    {
        "task_id": f"Own/{name}",
        "prompt": f'def {name}(x: int) -> int:\n    """ Return x plus {number}. """\n',
        "test": f"def check(candidate):\n    assert candidate(2) == {2 + number}\n",
        "entry_point": name,
    }
    for number, name in enumerate(("same", "more", "most"))
]


@pytest.mark.parametrize("style", ["plain", "alpaca", "chat"])
def test_functions_are_judged_by_their_tests(
    style: str, tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(prompt: str) -> str:
        if "most" in prompt:
            return "    raise ValueError"
        head = "def same(x):\n" if style == "alpaca" and "same" in prompt else "def more(x):\n"
        body = "    return x" if style != "chat" else "\n    return x"
        return (head if style == "alpaca" else "") + body

    batches = answer_with(monkeypatch, write)
    path, samples_file = tmp_path / "code.jsonl.gz", tmp_path / "samples.jsonl"
    path.write_bytes(gzip.compress(Path(write_rows(tmp_path / "code.jsonl", CODE)).read_bytes()))
    found = evaluate_humaneval(
        model,
        tokenizer,
        str(path),
        prompt_style=style,
        allow_code_execution=True,
        sandbox=Sandbox(Limits(seconds=60)),
        solving=Solving(samples_file=samples_file),
    )
    assert found["pass@1"] == pytest.approx(1 / 3) and found["problems"] == 3
    assert found["pass@1_stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))
    outcomes = {row["id"]: (row["passed"], row["outcome"]) for row in read_rows(samples_file)}
    assert outcomes["Own/same"] == (True, "passed") and outcomes["Own/more"] == (False, "AssertionError: ")
    assert not outcomes["Own/most"][0]
    solving = Solving(samples_file=samples_file, resume=True)
    with pytest.raises(UsageError, match="other settings"):  # with more time a verdict might be another
        evaluate_humaneval(model, tokenizer, str(path), prompt_style=style, allow_code_execution=True, solving=solving)
    prompt = next(prompt for prompt in batches[0] if "same" in prompt)
    assert {"plain": prompt == CODE[0]["prompt"], "alpaca": prompt.endswith("### Response:\n```python\n")}.get(
        style, prompt.endswith('```python\ndef same(x: int) -> int:\n    """ Return x plus 0. """')
    )


def test_nothing_runs_without_leave(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = answer_with(monkeypatch, lambda prompt: "")
    with pytest.raises(UsageError, match="--allow_code_execution"):
        evaluate_humaneval(model, tokenizer, "nowhere.jsonl")
    assert batches == []


def test_a_task_that_is_there_twice_is_refused(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    data = write_rows(tmp_path / "code.jsonl", [CODE[0], CODE[0]])
    with pytest.raises(UsageError, match="task_id twice"):
        evaluate_humaneval(model, tokenizer, data, allow_code_execution=True)
