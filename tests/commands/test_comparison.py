"""`lorapro compare`: its YAML, its runs and its store, and a whole comparison on tiny models."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console

from lorapro_hf.commands.compare import sweep as sweep_module
from lorapro_hf.commands.compare import training
from lorapro_hf.commands.compare.adapters import layers_to_adapt
from lorapro_hf.commands.compare.command import add_compare
from lorapro_hf.commands.compare.methods import METHODS, method_of
from lorapro_hf.commands.compare.plan import Run, plan
from lorapro_hf.commands.compare.report import write_report
from lorapro_hf.commands.compare.settings import CompareSettings, read_settings, settings_of
from lorapro_hf.commands.compare.store import RECORDS, Store
from lorapro_hf.commands.compare.sweep import Share, Sweep
from lorapro_hf.commands.compare.tasks import load_task
from lorapro_hf.commands.compare.tasks.base import Task
from lorapro_hf.commands.compare.tasks.models import truncated
from lorapro_hf.commands.compare.tasks.sources import docstrings, library_code, table
from lorapro_hf.config import MODES, TRUST_REGION, UPDATES
from lorapro_hf.options import UsageError

CONFIGS = Path(__file__).parents[2] / "configs" / "compare"
CPU = torch.device("cpu")
TINY = {"kind": "questions", "model": "tiny-random", "steps": 3, "batch_size": 2, "max_length": 512, "ranks": [2]}
TINY = {**TINY, "validation_size": 4, "test_size": 4}


def content(**more: Any) -> dict[str, Any]:
    return {"seeds": [0], "methods": {"lora": [1e-2], "full": [1e-2]}, "tasks": {"tiny": dict(TINY)}, **more}


def settings(folder: Path, **more: Any) -> CompareSettings:
    return settings_of(content(output_dir=str(folder), **more))


def run_all(chosen: CompareSettings, **more: Any) -> Sweep:
    sweep = Sweep(chosen, Share(), CPU, Console(quiet=True), **more)
    sweep.run()
    return sweep


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(settings_of(content()).tasks[0])


def only(method: str, rate: float = 1e-2, **more: Any) -> Run:
    return plan(settings_of(content(methods={method: [rate]}, **more)))[0]


# What a YAML says


def test_rates_are_numbers_however_yaml_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seeds: [0, 1]\nmethods: {lora: [1e-2, 3e-3]}\ntasks: {t: {kind: text}}\n")
    assert read_settings(path).methods[0].learning_rates == (3e-3, 1e-2)
    changed = read_settings(path, ["methods.full=[1e-5]", "tasks.t.steps=7", "seeds=[4]"], tmp_path / "out")
    assert [method.name for method in changed.methods] == ["lora", "full"]
    assert (changed.tasks[0].steps, changed.seeds, changed.output_dir) == (7, (4,), tmp_path / "out")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_comparisons_are_valid_and_open_with_their_launch_line(path: Path) -> None:
    assert plan(read_settings(path))
    assert f"lorapro compare {path.stem}" in path.read_text()


def test_every_mode_and_update_of_lora_pro_is_there() -> None:
    ours = {(m.settings["mode"], m.settings["update"]) for m in METHODS.values() if m.is_lora_pro}
    assert ours == {(mode, update) for mode in MODES for update in UPDATES}


def test_a_variant_adds_to_its_method() -> None:
    entry = {"like": "pro_full_linear", "optimizer": {"x_mode": "zero"}, "adapter": {"use_dora": True}}
    variant = method_of("mine", {**entry, "learning_rates": ["1e-4"]})
    assert variant.settings == {"mode": "full", "update": "linear", "x_mode": "zero"}
    assert (variant.adapter, variant.title, variant.learning_rates) == ({"use_dora": True}, "mine", (1e-4,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {"lora": [0.0]}}, "positive numbers"),
        ({"methods": {"lora": [1e-3, 1e-3]}}, "different positive"),
        ({"methods": {"loro": None}}, "choose from lora"),
        ({"methods": {"full": {"adapter": {"use_dora": True}}}}, "has no adapter"),
        ({"methods": {"lora": {"rate": 1}}}, r"\['rate'\] is unknown"),
        ({"seeds": [0, 0]}, "each named once"),
        ({"seeds": "0"}, "list of whole numbers"),
        ({"tasks": {"t": {"kind": "poems"}}}, "questions, text, classification"),
        ({"tasks": {"t": {**TINY, "step": 3}}}, r"\['step'\] unknown"),
        ({"tasks": {"t": {**TINY, "classes": 3}}}, r"\['classes'\] unknown"),
        ({"tasks": {"t": {**TINY, "dataset_config": "main"}}}, "without a `dataset`"),
        ({"tasks": {"t": {**TINY, "steps": 0}}}, "steps=0"),
        ({"tasks": {"t": {**TINY, "ranks": 8}}}, "must be a list"),
        ({"tasks": {"t": {**TINY, "generate": 5}}}, "from 0 to test_size"),
        ({"tasks": {"t": {**TINY, "generate": 2, "cut_vocabulary": True}}}, "generate: 0"),
        ({"tasks": {"t": {**TINY, "learning_rates": {"dora": [1]}}}}, "not under methods"),
        ({"warmup": "much"}, "must be a number"),
        ({"precision": "fp8"}, "fp32, bf16"),
        ({"schedule": "cosin"}, "'cosin' is none of linear, cosine"),
        ({"baseline": "loro"}, "baseline='loro' is not under methods"),
        ({"methods": {"pro_full_linear": {"optimizer": {"trust_region": -1}}}}, "pro_full_linear: trust_region=-1"),
        ({"methods": {"pro_full_linear": {"optimizer": {"limit": 1}}}}, r"\['limit'\], unknown to LoRA-Pro"),
        ({"methods": {"lora": {"optimizer": {"momentum": 1}}}}, r"lora: optimizer has \['momentum'\]"),
        ({"methods": {"lora": {"optimizer": {"eps": "1e-8"}}}}, "optimizer.eps='1e-8' is text"),
        ({"methods": {"lora": {"optimizer": {"betas": 0.9}}}}, "betas=0.9 must be two numbers in a list"),
        ({"methods": {"lora": {"optimizer": {"betas": [0.9]}}}}, r"betas=\[0.9\] must be two numbers in a list"),
        ({"methods": {"lora": {"optimizer": {"weight_decay": [1]}}}}, r"weight_decay=\[1\] must be one value"),
        ({"methods": {"lora": {"adapter": {"lora_dropout": "1e-1"}}}}, "lora_dropout='1e-1' must be a number"),
        ({"tasks": {"t": {**TINY, "target_modules": []}}}, "target_modules=.* must be 'all-linear' or a list"),
        ({"methods": {"lora": {"optimizer": {"amsgrad": 1}}}}, "amsgrad=1 must be true or false"),
        ({"methods": {"lora": {"optimizer": {"betas": [0.9, math.nan]}}}}, "betas=nan must be a number"),
        ({"methods": {"lora": {"optimizer": "sgd"}}}, "optimizer='sgd' must be a mapping"),
        ({"methods": {"lora": {"adapter": ["use_dora"]}}}, "must be a mapping"),
        ({"methods": {"lora": {"adapter": {"use_dora": "yes"}}}}, "use_dora='yes' must be true or false"),
        ({"methods": {"lora": {"adapter": {"r": 4}}}}, r"\['r'\], which LoraConfig does not know or the comparison"),
        ({"methods": {"lora": {"title": 3}}}, "lora: title=3 must be a text"),
        ({"methods": {"my method": {"like": "lora"}}}, "'my method' must be named with"),
        ({"methods": {"mine": {"like": ["lora"]}}}, "is unknown; choose from"),
        ({"methods": {"lora": {"learning_rates": "13"}}}, "list of different positive"),
        ({"methods": {"lora": [True]}}, "list of different positive"),
        ({"methods": ["lora", "lora"]}, "name each method once"),
        ({"tasks": {"a/b": TINY}}, "'a/b' must be named with"),
        ({"tasks": {"t": {**TINY, "kind": ["text"]}}}, "questions, text, classification"),
        ({"tasks": {"t": {**TINY, "model": 7}}}, "model=7 must be a text or null"),
        ({"tasks": {"t": {**TINY, "cut_vocabulary": "no"}}}, "cut_vocabulary='no' must be true or false"),
        ({"tasks": {"t": {**TINY, "data_seed": 0.5}}}, "data_seed=0.5 must be a whole number"),
        ({"tasks": {"t": {**TINY, "ranks": [2, 2]}}}, "must be different"),
        ({"tasks": {"t": {**TINY, "target_modules": 3}}}, "target_modules=3"),
        ({"tasks": {"t": {**TINY, "learning_rates": {"lora": [0]}}}}, "of lora in task t must be"),
        ({"warmup": math.nan}, "warmup=nan must be a number"),
        ({"scaling": ".inf"}, "scaling='.inf' must be a number"),
        ({"schedule": "reduce_lr_on_plateau"}, "'reduce_lr_on_plateau' cannot be used"),
        ({"schedule": 3}, "schedule=3 must be a text"),
        ({"output_dir": 3}, "must be the path of a folder"),
        ({"optimizer": "sgd"}, r"Unknown: \['optimizer'\]"),
    ],
)
def test_what_is_of_no_use_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_of(content(**change))


def test_a_key_that_is_there_twice_is_refused_and_a_merge_may_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    start = "seeds: [0]\ntasks: {t: {kind: text}}\nmethods:\n  lora: &lora {title: one, learning_rates: [1e-3]}\n"
    path.write_text(f"{start}  full: {{<<: *lora, title: two}}\n")
    assert [method.title for method in read_settings(path).methods] == ["one", "two"]
    path.write_text(f"{start}  lora: [1e-2]\n")
    with pytest.raises(UsageError, match="'lora' is there twice, in lines 4 and 5"):
        read_settings(path)
    with pytest.raises(UsageError, match="'a' is there twice"):
        read_settings(CONFIGS / "smoke.yaml", ["methods={a: 1, a: 2}"])


@pytest.mark.parametrize("method", ["pro_full_8bit_linear", "lorarite"])
def test_what_a_method_needs_is_checked_before_anything_is_trained(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes", "pytorch_optimizer"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=method):
        Sweep(settings(tmp_path, methods={method: [1e-3]}), Share(), CPU, Console(quiet=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "./none.jsonl"}, "Task e: .*check `dataset`"),
        ({"model": "./nowhere"}, "Task e: .*check `model`"),
        ({"max_length": 2}, "Task e: .*`max_length`"),
    ],
)
def test_what_cannot_be_loaded_is_named_by_the_keys_of_the_yaml(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_task(settings_of(content(tasks={"e": {**TINY, **change}})).tasks[0])
    assert "--" not in str(caught.value)


# Runs and their keys


def test_a_key_is_of_everything_that_decides(tmp_path: Path) -> None:
    key = only("lora").key
    assert key == only("lora", output_dir="elsewhere").key
    assert key in {run.key for run in plan(settings_of(content(methods={"lora": [1e-2], "lorarite": [1e-2]})))}
    assert key == only("lora", tasks={"another-name": {**TINY, "ranks": [2, 4]}}).key
    others = [
        only("lora", 2e-2),
        only("rslora"),
        only("lora", seeds=[1]),
        only("lora", warmup=0.2),
        only("lora", scaling=1.0),
        only("lora", tasks={"tiny": {**TINY, "steps": 4}}),
        only("lora", tasks={"tiny": {**TINY, "ranks": [4]}}),
    ]
    assert len({key, *(run.key for run in others)}) == len(others) + 1


def test_full_fine_tuning_has_no_rank_and_runs_once() -> None:
    runs = plan(settings_of(content(tasks={"tiny": {**TINY, "ranks": [2, 4]}})))
    assert [(run.method.name, run.rank) for run in runs] == [("lora", 2), ("lora", 4), ("full", None)]


def test_seeds_are_outermost_so_that_methods_take_turns() -> None:
    runs = plan(settings_of(content(seeds=[3, 1], methods={"lora": [1e-3, 1e-2], "full": [1e-2]})))
    turns = [("lora", 1e-3), ("lora", 1e-2), ("full", 1e-2)]
    assert [(run.seed, run.method.name, run.learning_rate) for run in runs] == [(s, *t) for s in (3, 1) for t in turns]


def test_processes_share_the_runs_out(tmp_path: Path) -> None:
    chosen = settings(tmp_path, seeds=[0, 1, 2], methods={"lora": [1e-3, 1e-2], "dora": [1e-2]})
    shares = [Sweep(chosen, Share(index, 2), CPU, Console(quiet=True)) for index in range(2)]
    keys = [{run.key for run in share.pending} for share in shares]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 9


def test_share_is_that_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Share.of_environment() == Share(0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Share.of_environment() == Share(5, 8, 1)


# Trainings


def test_every_method_trains_on_the_same_data(task: Task, tmp_path: Path) -> None:
    chosen = settings(tmp_path, methods={name: [1e-2] for name in METHODS})
    records = {run.method.name: training.train_run(task, run, chosen, CPU) for run in plan(chosen)}
    assert {name: record.get("error") for name, record in records.items()} == dict.fromkeys(METHODS)
    assert len({record["data"] for record in records.values()}) == 1
    # the same model before the first step, whatever has been done to its weights
    torch.testing.assert_close(
        [r["losses"][0] for r in records.values()], [records["lora"]["losses"][0]] * len(METHODS)
    )
    before = float(task.loss(task.model.eval(), "test"))
    after = {name: record["scores"]["test"]["loss"] for name, record in records.items()}
    assert all(loss < before - 1e-4 for loss in after.values()), (before, after)
    # LoRA-FA trains B alone and DoRA magnitudes besides
    trainable = {name: record["trainable"] for name, record in records.items()}
    assert trainable["lorafa"] < trainable["lora"] == trainable["pissa"] < trainable["dora"] < trainable["full"]
    assert records["full"]["state_bytes"] >= 8 * trainable["full"]


def test_the_task_is_left_as_it_was(task: Task, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    for method in ("pissa", "loraga", "full"):
        training.train_run(task, only(method), settings(tmp_path), CPU)
    after = task.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_repeats_and_its_seed_matters(task: Task, tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    first, again = (training.train_run(task, only("lora"), chosen, CPU) for _ in range(2))
    other = training.train_run(task, only("lora", seeds=[1]), chosen, CPU)
    assert first["losses"] == again["losses"] and first["scores"] == again["scores"]
    assert first["data"] == again["data"] != other["data"]


def test_all_methods_adapt_all_linear_layers_but_the_output(task: Task) -> None:
    layers = layers_to_adapt(task.model, "all-linear", None)
    assert len(layers) == 2 * 7 and "lm_head" not in layers
    assert layers_to_adapt(task.model, ["q_proj"], None) == [name for name in layers if name.endswith("q_proj")]
    for targets in (["q_porj"], ["q_proj", "q_porj"]):
        with pytest.raises(UsageError, match=r"no linear layer q_porj \(did you mean q_proj .*It has q_proj, k_proj"):
            layers_to_adapt(task.model, targets, None)


def test_full_fine_tuning_trains_the_adapted_weights_only(task: Task, tmp_path: Path) -> None:
    record = training.train_run(task, only("full"), settings(tmp_path), CPU)
    sizes = [task.model.get_submodule(name).weight.numel() for name in layers_to_adapt(task.model, "all-linear", None)]
    assert (record["trainable"], record["adapted_layers"]) == (sum(sizes), len(sizes))


@pytest.mark.parametrize("clips", [True, False])
def test_clipping_spares_who_must_not_be_clipped(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clips: bool
) -> None:
    norms: list[float] = []
    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", lambda parameters, norm: norms.append(norm))
    training.train_run(task, only("lora" if clips else "lorarite"), settings(tmp_path, max_grad_norm=0.5), CPU)
    assert norms == [0.5] * 3 * clips


@pytest.mark.parametrize(("method", "parts"), [("lora", 2), ("full", 2), ("lorarite", 1)])
def test_head_and_adapter_are_clipped_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, parts: int
) -> None:
    entry = {"kind": "classification", "model": "tiny-random", "classes": 2, "steps": 1, "batch_size": 4}
    entry |= {"max_length": 16, "validation_size": 4, "test_size": 4, "ranks": [2]}
    chosen = settings(tmp_path, tasks={"t": entry}, methods={method: [1e-3]}, max_grad_norm=0.5)
    clipped: list[list[tuple[int, ...]]] = []
    monkeypatch.setattr(
        training.nn.utils, "clip_grad_norm_", lambda own, norm: clipped.append([tuple(p.shape) for p in own])
    )
    record = training.train_run(load_task(chosen.tasks[0]), plan(chosen)[0], chosen, CPU)
    assert record["status"] == "finished", record.get("error")
    assert len(clipped) == parts and clipped[-1] == [(2, 32), (2,)]
    assert all((2,) not in shapes for shapes in clipped[:-1])


def test_data_are_those_of_all_sets_with_their_targets(task: Task) -> None:
    again = load_task(task.settings)
    assert again.digest == task.digest
    for change in ({"validation": []}, {"test": [{**task.sets["test"][0], "labels": [1]}]}):
        assert dataclasses.replace(task, sets={**task.sets, **change}).digest != task.digest


def test_divergence_is_recorded(task: Task, tmp_path: Path) -> None:
    record = training.train_run(task, only("full", 1e30), settings(tmp_path, warmup=0.0), CPU)
    assert record["status"] == "diverged" and record["scores"] is None
    assert record["diverged_at"] == len(record["losses"]) > 1


def test_an_exception_is_recorded(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(training, "build_optimizer", explode)
    record = training.train_run(task, only("lora"), settings(tmp_path), CPU)
    assert (record["status"], record["error"]) == ("failed", "OutOfMemoryError: no room")


# The store and a comparison that is stopped


def test_a_half_written_line_costs_one_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append({"key": "a", "status": "finished", "loss": float("nan")})
    with (tmp_path / RECORDS).open("a") as file:
        file.write('{"key": "b", "status": "fini')
    assert set(store.records()) == {"a"}
    store.append({"key": "c", "status": "finished"})
    store.append({"key": "a", "status": "failed"})
    assert {key: record["status"] for key, record in store.records().items()} == {"a": "failed", "c": "finished"}
    assert "\n\n" not in (tmp_path / RECORDS).read_text()


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all(settings(tmp_path))
    lines = (tmp_path / RECORDS).read_text()
    trained: list[str] = []
    real = sweep_module.train_run
    monkeypatch.setattr(
        sweep_module, "train_run", lambda task, run, *a: trained.append(run.title) or real(task, run, *a)
    )
    run_all(settings(tmp_path))
    assert trained == [] and (tmp_path / RECORDS).read_text() == lines
    run_all(settings(tmp_path, methods={"lora": [1e-2, 2e-2], "full": [1e-2]}))
    assert trained == ["tiny r=2: LoRA (AdamW), lr 0.02, seed 0"]


def test_failed_runs_are_tried_again_on_demand(tmp_path: Path) -> None:
    run_all(settings(tmp_path))
    store = Store(tmp_path)
    key = next(iter(store.records()))
    store.append({**store.records()[key], "status": "failed"})
    assert run_all(settings(tmp_path)).pending == []
    assert [run.key for run in run_all(settings(tmp_path), retry_failed=True).pending] == [key]
    assert store.records()[key]["status"] == "finished"


def command_line(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_compare(parser)
    parsed = parser.parse_args(list(arguments))
    return int(parsed.run(parsed))


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, test_comparison as t\n"
        "append = t.Store.append\n"
        "def die_before_the_third(store, record):\n"
        "    if len(store.records()) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    append(store, record)\n"
        "t.Store.append = die_before_the_third\n"
        "t.command_line(*sys.argv[1:])\n"
    )
    arguments = [
        str(CONFIGS / "smoke.yaml"),
        "--output_dir",
        str(tmp_path),
        "--set",
        "methods=[lora, dora, pissa, full]",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.DEVNULL)
    store = Store(tmp_path)
    before = store.records()
    assert killed.returncode == -signal.SIGKILL and len(before) == 2
    assert command_line(*arguments, "--device", "cpu") == 0
    after = store.records()
    assert before.items() <= after.items()
    assert len(after) == len(plan(read_settings(Path(arguments[0]), [arguments[-1]])))


@pytest.mark.slow
def test_sigterm_ends_the_processes_too(tmp_path: Path) -> None:
    code = "import sys, test_comparison as t; sys.exit(t.command_line(*sys.argv[1:]))"
    grid = ", ".join(f"{i}e-4" for i in range(1, 200))
    arguments = ["--devices", "2", "--device", "cpu", "--output_dir", str(tmp_path), "--set", f"methods.lora=[{grid}]"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(CONFIGS / "smoke.yaml"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    store = Store(tmp_path)
    while not store.records() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    done = store.records()
    assert process.stdout
    process.stdout.read()  # its end is that of the last process that inherited it
    assert done and store.records() == done


def test_the_command_trains_reports_and_reports_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--set", "methods={lora: [1e-3], full: [1e-3]}", "--set", f"tasks={json.dumps({'tiny': TINY})}"]
    arguments = [str(CONFIGS / "smoke.yaml"), "--output_dir", str(tmp_path / "runs"), "--device", "cpu", "--json"]
    assert command_line(*arguments, *overrides) == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in first["comparisons"][0]["methods"]] == ["lora", "full"]
    shown = ["--report_only", "--output_dir", str(tmp_path / "runs"), "--report_dir", str(tmp_path / "docs"), "--json"]
    assert command_line(*shown) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert command_line(*arguments, *overrides, "--no_report") == 0 and not capsys.readouterr().out
    assert (tmp_path / "docs" / "report.html").read_text() == (tmp_path / "runs" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a YAML"),
        (["--report_only"], "needs --output_dir"),
        (["--report_only", "--no_report", "--output_dir", "nowhere"], "nothing to do"),
        (["--report_only", "--output_dir", "nowhere"], "no comparison to report on"),
        (["nowhere.yaml"], "nowhere.yaml: there is no such file, and nothing of that name in the package"),
        (["nowhere.yaml", "--fresh"], "name that folder, or drop --fresh"),
        ([str(CONFIGS / "smoke.yaml"), "--set", "seeds"], "KEY=VALUE"),
        ([str(CONFIGS / "smoke.yaml"), "--set", "seeds.a=1"], "KEY=VALUE"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        command_line(*arguments)


@pytest.mark.distributed
def test_two_processes_do_each_run_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tasks = json.dumps({"tiny": TINY})
    arguments = ["--set", "methods={lora: [1e-3], full: [1e-3]}", "--set", f"tasks={tasks}", "--set", "seeds=[0, 1]"]
    folder = ["--output_dir", str(tmp_path), "--device", "cpu", "--devices", "2"]
    assert command_line(str(CONFIGS / "smoke.yaml"), *arguments, *folder) == 0
    lines = [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines() if line]
    assert len(lines) == len({line["key"] for line in lines}) == 4
    assert {line["status"] for line in lines} == {"finished"}
    assert capfd.readouterr().out.count("Report:") == 1


# Tasks


def test_code_is_held_out_by_the_package() -> None:
    from lorapro_hf.commands.compare.tasks import sources

    packages = {name: set() for name in ("train", "validation", "test")}
    for package, _ in sources.standard_modules():
        packages[sources._set_of(f"0 {package}")].add(package)
    assert all(packages.values()) and len(packages["train"]) > len(packages["test"])
    assert not packages["train"] & packages["test"] and not packages["train"] & packages["validation"]
    assert all(next(texts) for texts in library_code(0).values())


def test_docstrings_are_balanced_disjoint_and_masked() -> None:
    sets = docstrings(2, seed=0)
    texts = {name: {text for text, _ in part} for name, part in sets.items()}
    assert not texts["train"] & texts["test"] and not texts["validation"] & (texts["train"] | texts["test"])
    for name, part in sets.items():
        assert len(part) > 40, name
        assert {label for _, label in part[:2]} == {"asyncio", "importlib"}
        assert not any(label in text.lower().split() for text, label in part)
    assert docstrings(2, seed=0) == sets


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "text", "max_length": 16},
        {"kind": "text", "max_length": 16, "cut_vocabulary": True},
        {"kind": "classification", "classes": 2, "max_length": 16},
        {"kind": "questions", "max_length": 512, "cut_vocabulary": True, "layers": 1},
        {"kind": "questions", "max_length": 512, "generate": 2},
    ],
    ids=lambda entry: "-".join(str(value) for value in entry.values()),
)
def test_tasks_train(entry: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"model": "tiny-random", "steps": 3, "batch_size": 2, "validation_size": 4, "test_size": 4, "ranks": [2]}
    chosen = settings(tmp_path, tasks={"t": {**sizes, **entry}}, methods={"full": [1e-2]})
    loaded = load_task(chosen.tasks[0])
    record = training.train_run(loaded, plan(chosen)[0], chosen, CPU)
    assert record["status"] == "finished", record.get("error")
    assert set(record["scores"]["test"]) == set(loaded.metrics)
    assert all(len(examples) >= 4 for examples in loaded.sets.values())


@pytest.mark.parametrize("method", ["lora", "lorafa", "full"])
def test_the_head_is_trained_alike(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"kind": "classification", "model": "tiny-random", "classes": 2, "steps": 2, "batch_size": 4}
    entry |= {"max_length": 16, "validation_size": 4, "test_size": 4, "head_learning_rate": 0.05}
    # so low a rate that the method itself moves nothing, and no warm-up
    chosen = settings(tmp_path, tasks={"t": entry}, methods={method: [1e-30]}, warmup=0.0, schedule="constant")
    loaded = load_task(chosen.tasks[0])
    heads = []
    real = Task.score
    monkeypatch.setattr(
        Task, "score", lambda self, model: heads.append(self.head_of(_base(model))) or real(self, model)
    )
    record = training.train_run(loaded, plan(chosen)[0], chosen, CPU)
    assert record["status"] == "finished", record.get("error")
    assert record["adapted_layers"] == 2 * 6  # no pooler, which gets no gradients
    # AdamW's first two steps are of one rate each, wherever the gradients of both agree in sign
    torch.manual_seed(0)
    start = torch.nn.init.normal_(torch.empty_like(heads[0].weight), std=0.02)
    moved = (heads[0].weight.detach() - start).abs()
    assert 0.05 < moved.max() < 0.1001 and moved.median() > 0.01


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def test_a_table_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"words": f"{'good' if i % 2 else 'bad'} thing number {i}", "mood": i % 2} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    entry = {"kind": "classification", "model": "tiny-random", "dataset": str(path), "text_column": "words"}
    entry |= {"label_column": "mood", "steps": 2, "batch_size": 4, "validation_size": 6, "test_size": 6}
    loaded = load_task(settings_of(content(tasks={"t": entry})).tasks[0])
    assert {name: len(part) for name, part in loaded.sets.items()} == {"train": 8, "validation": 6, "test": 6}
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "one")
    sets = table(settings_of(content(tasks={"t": {**entry, "dataset": str(tmp_path / "one")}})).tasks[0], ("words",))
    assert sum(map(len, sets.values())) == len({row["words"] for part in sets.values() for row in part}) == 60
    with pytest.raises(UsageError, match="has the columns"):
        load_task(settings_of(content(tasks={"t": {**entry, "label_column": "label"}})).tasks[0])
    with pytest.raises(UsageError, match="no file or folder"):
        load_task(settings_of(content(tasks={"t": {**entry, "dataset": "./none.csv"}})).tasks[0])


def test_the_cut_vocabulary_gives_the_same_hidden_states(task: Task) -> None:
    loaded = load_task(settings_of(content(tasks={"t": {**TINY, "cut_vocabulary": True}})).tasks[0])
    whole, cut = (next(each.batches("test")) for each in (task, loaded))
    embedded = [each.model.get_input_embeddings()(batch["input_ids"]) for each, batch in ((task, whole), (loaded, cut))]
    mask = whole["attention_mask"].bool()
    assert torch.equal(embedded[0][mask], embedded[1][mask])
    assert loaded.model.config.vocab_size < task.model.config.vocab_size


def test_truncation_keeps_the_first_blocks(task: Task) -> None:
    loaded = load_task(settings_of(content(tasks={"t": {**TINY, "layers": 1}})).tasks[0])
    whole, first = (dict(each.model.model.layers.named_parameters()) for each in (task, loaded))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in first.items())
    assert loaded.model.config.num_hidden_layers == 1
    with pytest.raises(UsageError, match="which has 1"):
        truncated(loaded.model, 2)


def test_a_report_needs_its_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no comparison"):
        write_report(Store(tmp_path), tmp_path)


def test_a_default_that_is_spelled_out_is_the_same_run() -> None:
    spelled = method_of("mine", {"like": "pro_full_linear", "optimizer": {"trust_region": TRUST_REGION, "rtol": None}})
    other = method_of("other", {"like": "pro_full_linear", "optimizer": {"trust_region": TRUST_REGION / 2}})
    assert spelled.decides() == METHODS["pro_full_linear"].decides() != other.decides()
    assert METHODS["pro_full_paper"].decides()["settings"]["trust_region"] is None
