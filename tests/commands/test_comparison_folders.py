"""`lorapro compare` and its folders: results that a report has, locks, and what a task can be read by."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_comparison import CONFIGS, CPU, TINY, command_line, content, run_all, settings

from lorapro_hf.commands.compare import sweep as sweep_module
from lorapro_hf.commands.compare.folders import locked
from lorapro_hf.commands.compare.levels import levels_of
from lorapro_hf.commands.compare.plan import plan, source_hash
from lorapro_hf.commands.compare.settings import CompareSettings, settings_of
from lorapro_hf.commands.compare.store import Store
from lorapro_hf.commands.compare.sweep import Share, Sweep
from lorapro_hf.commands.compare.tasks import load_task
from lorapro_hf.options import UsageError

LEVELS = {"untrained": 5.0, "frequencies": 4.0}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the runs that are trained from now on, none of them in earnest."""
    titles: list[str] = []

    def pretend(task: Any, run: Any, chosen: CompareSettings, *rest: Any) -> dict[str, Any]:
        titles.append(run.title)
        return record_of(run)

    monkeypatch.setattr(sweep_module, "train_run", pretend)
    monkeypatch.setattr(sweep_module, "load_task", lambda task: type("Loaded", (), {"settings": task})())
    monkeypatch.setattr(sweep_module, "levels_of", lambda *_: LEVELS)
    monkeypatch.setattr("lorapro_hf.commands.compare.report.draw", lambda comparison, ours: {})
    return titles


def record_of(run: Any, **more: Any) -> dict[str, Any]:
    scores = {"validation": {"loss": 1.0}, "test": {"loss": 1.0}}
    shown = {"scores": scores, "losses": [2.0, 1.0], "wall_s": 1.0, "environment": {"device": "cpu"}}
    return {**run.entry(), "status": "finished", **shown, **more}


def compare(folder: Path, *more: str, methods: str = "{lora: [1e-3, 1e-2], full: [1e-3]}") -> int:
    tasks = f"tasks={json.dumps({'tiny': TINY})}"
    arguments = [str(CONFIGS / "smoke.yaml"), "--set", f"methods={methods}", "--set", tasks, "--device", "cpu"]
    return command_line(*arguments, "--output_dir", str(folder), *more)


# The folder of the report


def test_a_fresh_clone_starts_from_the_report(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = str(tmp_path / "docs")
    assert compare(tmp_path / "one", "--report_dir", report) == 0 and len(trained) == 3
    committed = Store(tmp_path / "docs").records()
    trained.clear()
    assert compare(tmp_path / "two", "--report_dir", report) == 0 and trained == []
    assert f"0 runs to do, 3 done before, 3 of them in {report}" in " ".join(capsys.readouterr().err.split())
    assert Store(tmp_path / "two").records() == committed == Store(tmp_path / "docs").records()
    assert compare(tmp_path / "three", "--report_dir", report, "--fresh") == 0 and len(trained) == 3


def test_ctrl_c_leaves_the_report_that_fresh_is_to_replace(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "docs"
    assert compare(tmp_path / "one", "--report_dir", str(report)) == 0
    committed = {file.name: file.read_bytes() for file in report.iterdir() if file.is_file()}
    pretend = sweep_module.train_run

    def interrupted(*arguments: Any) -> dict[str, Any]:
        if len(trained) == 4:
            raise KeyboardInterrupt
        return pretend(*arguments)

    monkeypatch.setattr(sweep_module, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "two", "--report_dir", str(report), "--fresh")
    assert {file.name: file.read_bytes() for file in report.iterdir() if file.is_file()} == committed
    assert len(Store(tmp_path / "two").records()) == 1 and (tmp_path / "two" / "report.md").exists()


def test_several_processes_start_from_the_report_too(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tmp_path / "one", "--report_dir", str(tmp_path / "docs"))
    found: list[int] = []

    def launch(devices: int, kind: str, arguments: list[str]) -> int:
        found.append(len(Store(tmp_path / "two").records()))
        assert "--no_report" in arguments and "--report_dir" not in arguments
        Store(tmp_path / "two").folder.joinpath("sweep.json").write_text((tmp_path / "one" / "sweep.json").read_text())
        return 0

    monkeypatch.setattr("lorapro_hf.commands.compare.launch.launch", launch)
    compare(tmp_path / "two", "--report_dir", str(tmp_path / "docs"), "--devices", "2")
    assert found == [3]


def test_results_of_the_report_fill_up_an_unfinished_comparison(tmp_path: Path, trained: list[str]) -> None:
    compare(tmp_path / "one", "--report_dir", str(tmp_path / "docs"))
    Store(tmp_path / "two").folder.mkdir()
    first, second, third = Store(tmp_path / "docs").records().values()
    Store(tmp_path / "two").append({**first, "wall_s": 7.0})  # its own stays
    Store(tmp_path / "two").append({**second, "status": "failed"})
    (tmp_path / "docs" / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (first, second)))
    trained.clear()
    compare(tmp_path / "two", "--report_dir", str(tmp_path / "docs"))
    records = Store(tmp_path / "docs").records()
    assert [title.split(",")[0] for title in trained] == ["tiny: full fine-tuning"]
    assert records[first["key"]]["wall_s"] == 7.0 and {each["status"] for each in records.values()} == {"finished"}


def test_the_report_of_another_comparison_is_not_replaced(tmp_path: Path, trained: list[str]) -> None:
    compare(tmp_path / "one", "--report_dir", str(tmp_path / "docs"))
    before = (tmp_path / "docs" / "runs.jsonl").read_text()
    trained.clear()
    with pytest.raises(UsageError, match=r"holds 1 results .of 3. that are not of this comparison.*--fresh"):
        compare(tmp_path / "two", "--report_dir", str(tmp_path / "docs"), methods="{lora: [1e-3], full: [1e-3]}")
    assert trained == [] and (tmp_path / "docs" / "runs.jsonl").read_text() == before
    shown = ["--report_only", "--output_dir", str(tmp_path / "two"), "--report_dir", str(tmp_path / "docs")]
    compare(tmp_path / "two", methods="{dora: [1e-3]}")
    with pytest.raises(UsageError, match="not of this comparison"):
        command_line(*shown)
    assert command_line(*shown, "--fresh") == 0


def test_a_report_on_less_does_not_replace_one_on_more(tmp_path: Path, trained: list[str]) -> None:
    compare(tmp_path / "one", "--report_dir", str(tmp_path / "docs"))
    lines = (tmp_path / "one" / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one" / "runs.jsonl").write_text(lines[0])
    with pytest.raises(UsageError, match=r"has 2 results that .* lacks.*without --report_only"):
        command_line("--report_only", "--output_dir", str(tmp_path / "one"), "--report_dir", str(tmp_path / "docs"))


def test_a_report_that_cannot_be_written_is_told_before_training(tmp_path: Path, trained: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Cannot write to --report_dir"):
        compare(tmp_path / "one", "--report_dir", str(tmp_path / "file" / "docs"))
    assert trained == []


def test_a_report_on_another_plan_is_refused(tmp_path: Path, trained: list[str]) -> None:
    compare(tmp_path / "one")
    assert compare(tmp_path / "one", "--report_only") == 0
    with pytest.raises(UsageError, match=r"other settings than these: seeds, methods.lora differ"):
        compare(tmp_path / "one", "--report_only", "--set", "seeds=[1]", methods="{lora: [1], full: [1e-3]}")
    with pytest.raises(UsageError, match="--set changes a YAML"):
        command_line("--report_only", "--output_dir", str(tmp_path / "one"), "--set", "seeds=[1]")


def test_a_shared_run_is_copied_under_the_names_of_the_sweep(tmp_path: Path) -> None:
    again = {"like": "lora", "learning_rates": [1e-2]}
    chosen = settings(tmp_path / "runs", methods={"first": again, "second": again, "full": [1e-2]})
    store = Store(tmp_path / "runs")
    store.folder.mkdir()
    store.write_sweep(chosen, plan(chosen))
    for run in plan(chosen):
        store.append({**record_of(run), "method": "of another sweep", "task": "elsewhere"})
    (tmp_path / "copy").mkdir()
    store.copy_to(tmp_path / "copy")
    copied = [json.loads(line) for line in (tmp_path / "copy" / "runs.jsonl").read_text().splitlines()]
    assert [(each["task"], each["method"]) for each in copied] == [("tiny", "first"), ("tiny", "full")]


# Processes


def test_two_comparisons_do_not_train_into_one_folder(tmp_path: Path, trained: list[str]) -> None:
    tmp_path.mkdir(exist_ok=True)
    with locked(tmp_path, 0, print), pytest.raises(UsageError, match=r"Another process .pid \d+. is training"):
        run_all(settings(tmp_path))
    assert trained == [] and not (tmp_path / "sweep.json").exists()
    run_all(settings(tmp_path))
    assert len(trained) == 2


def test_failed_runs_are_pointed_out(tmp_path: Path, trained: list[str]) -> None:
    chosen = settings(tmp_path)
    for run in plan(chosen):
        Store(tmp_path).append(record_of(run, status="failed", scores=None, error="OutOfMemoryError"))
    shown = io.StringIO()
    Sweep(chosen, Share(), CPU, Console(file=shown, width=200)).run()
    assert trained == [] and "2 of those done before have failed; --retry_failed" in shown.getvalue()


# Levels


def test_levels_are_noted_whether_or_not_there_is_a_run_to_do(tmp_path: Path, trained: list[str]) -> None:
    chosen = settings(tmp_path)
    run_all(chosen)
    assert Store(tmp_path).sweep()["levels"]["tiny"].items() >= LEVELS.items()
    assert Store(tmp_path).sweep()["source"] == source_hash()
    Store(tmp_path).write_sweep(chosen, plan(chosen))  # as from before levels were noted
    trained.clear()
    run_all(chosen)
    assert trained == [] and Store(tmp_path).sweep()["levels"]["tiny"].items() >= LEVELS.items()


def test_levels_once_noted_are_not_computed_again(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all(settings(tmp_path))
    computed: list[Any] = []
    monkeypatch.setattr(sweep_module, "levels_of", lambda *each: computed.append(each) or LEVELS)
    run_all(settings(tmp_path))
    assert computed == [] and "tiny" in Store(tmp_path).sweep()["levels"]
    run_all(settings(tmp_path, tasks={"tiny": {**TINY, "steps": 4}}))
    assert len(computed) == 1


def test_a_model_that_is_gone_costs_the_levels_alone(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(task: Any) -> None:
        raise UsageError("Task tiny: no such model")

    chosen = settings(tmp_path)
    run_all(chosen)
    Store(tmp_path).write_sweep(chosen, plan(chosen))
    monkeypatch.setattr(sweep_module, "load_task", gone)
    shown = io.StringIO()
    Sweep(chosen, Share(), CPU, Console(file=shown, width=200)).run()
    assert "The untrained loss of task tiny stays unknown: Task tiny: no such model" in shown.getvalue()
    with pytest.raises(UsageError, match="no such model"):
        run_all(settings(tmp_path, seeds=[5]))


def test_token_frequencies_are_those_of_the_answers() -> None:
    task = load_task(settings_of(content(tasks={"t": {**TINY, "cut_vocabulary": True}})).tasks[0])
    levels = levels_of(task, 0, CPU)
    targets = {
        which: [token for each in task.sets[which] for token in each["labels"][1:] if token != -100]
        for which in ("train", "test")
    }
    counts, size = Counter(targets["train"]), task.model.config.vocab_size
    chances = [(counts[token] + 1) / (len(targets["train"]) + size) for token in targets["test"]]
    assert levels["frequencies"] == pytest.approx(-sum(map(math.log, chances)) / len(chances))
    assert levels["untrained"] == pytest.approx(task.loss(task.model.eval(), "test"))


def test_class_frequencies_are_those_of_the_training_set() -> None:
    entry = {"kind": "classification", "model": "tiny-random", "classes": 2, "steps": 3, "batch_size": 3}
    entry |= {"max_length": 16, "validation_size": 4, "test_size": 4}
    task = load_task(settings_of(content(tasks={"t": entry})).tasks[0])
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    levels = levels_of(task, 0, CPU)
    counts = Counter(each["labels"] for each in task.sets["train"])
    losses = [-math.log(counts[each["labels"]] / 9) for each in task.sets["test"]]
    assert levels["frequencies"] == pytest.approx(sum(losses) / 4)
    assert levels["untrained"] == pytest.approx(math.log(2), abs=0.3)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
