"""`lorapro compare`: its YAML, its plan, its store and its processes; nothing is trained in earnest but by the last."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from comparison_helpers import (
    CLASSES,
    CONFIGS,
    CPU,
    TINY,
    command_line,
    content,
    only,
    record_of,
    run_all,
    runs_of,
    settings,
    sweep_of,
)
from lorapro_hf.commands.compare import command
from lorapro_hf.commands.compare import report as report_module
from lorapro_hf.commands.compare import sweep as sweep_module
from lorapro_hf.commands.compare.methods import METHODS, method_of, require_usable
from lorapro_hf.commands.compare.plan import plan
from lorapro_hf.commands.compare.settings import read_settings, settings_of
from lorapro_hf.commands.compare.store import RECORDS, Store
from lorapro_hf.commands.compare.sweep import Sweep
from lorapro_hf.commands.compare.workers import Worker
from lorapro_hf.config import MODES, TRUST_REGION, UPDATES
from lorapro_hf.options import UsageError

LEVELS = {"untrained": 5.0, "frequencies": 4.0}

# The YAML


def test_rates_are_numbers_however_yaml_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seeds: [0, 1]\nmethods: {lora: [1e-2, 3e-3]}\ntasks: {t: {kind: text}}\n")
    assert read_settings(path).methods[0].learning_rates == (3e-3, 1e-2)
    changed = read_settings(path, ["methods.full=[1e-5]", "tasks.t.steps=7", "seeds=[4]"], tmp_path / "out")
    assert [method.name for method in changed.methods] == ["lora", "full"]
    assert (changed.tasks[0].steps, changed.seeds, changed.output_dir) == (7, (4,), tmp_path / "out")


def test_a_single_rate_is_the_centre_of_three(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "seeds: [0]\nmethods: {lora: 1e-2, full: }\ntasks: {t: {kind: text, learning_rates: {full: 1e-4}}}\n"
    )
    chosen = read_settings(path)
    assert chosen.methods[0].learning_rates == (3.16e-3, 1e-2, 3.16e-2)
    assert chosen.methods[1].learning_rates == METHODS["full"].learning_rates
    assert chosen.tasks[0].learning_rates == {"full": (3.16e-5, 1e-4, 3.16e-4)}


def test_shipped_comparisons_are_valid_and_open_with_their_launch_line() -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert plan(read_settings(path))
        assert f"lorapro compare {path.stem}" in path.read_text()


def test_every_mode_and_update_of_lora_pro_is_there() -> None:
    ours = {(m.settings["mode"], m.settings["update"]) for m in METHODS.values() if m.is_lora_pro}
    assert ours == {(mode, update) for mode in MODES for update in UPDATES} - {("rite", "sequential")}
    assert [m.name for m in METHODS.values() if m.is_lora_pro and not m.clips] == ["pro_rite_linear"]


def test_settings_of_other_modes_decide_nothing() -> None:
    decided = {mode: METHODS[f"pro_{mode}_linear"].decides()["settings"] for mode in ("full", "rite", "spectral")}
    own = {mode: {name for name in found if name.startswith(("rite", "spectral"))} for mode, found in decided.items()}
    assert own["full"] == set() and own["spectral"] == {"spectral_iterations"}
    assert own["rite"] == {"rite_clip", "rite_skip", "rite_escape"}


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
        ({"methods": {"lora": "much"}}, "a positive number, or a list of different positive"),
        ({"methods": {"lora": [True]}}, "list of different positive"),
        ({"methods": {"loro": None}}, "choose from lora"),
        ({"methods": {"mine": {"like": ["lora"]}}}, "is unknown; choose from"),
        ({"methods": {"full": {"adapter": {"use_dora": True}}}}, "has no adapter"),
        ({"methods": {"lora": {"rate": 1}}}, r"\['rate'\] is unknown"),
        ({"methods": {"lora": {"title": 3}}}, "lora: title=3 must be a text"),
        ({"methods": {"my method": {"like": "lora"}}}, "'my method' must be named with"),
        ({"methods": ["lora", "lora"]}, "name each method once"),
        ({"methods": {"pro_full_linear": {"optimizer": {"trust_region": -1}}}}, "pro_full_linear: trust_region=-1"),
        ({"methods": {"pro_efficient_linear": {"optimizer": {"rite_clip": 0.1}}}}, "mode 'efficient' does not know it"),
        ({"methods": {"pro_full_linear": {"optimizer": {"limit": 1}}}}, r"\['limit'\], unknown to LoRA-Pro"),
        ({"methods": {"lora": {"optimizer": "sgd"}}}, "optimizer='sgd' must be a mapping"),
        ({"methods": {"lora": {"adapter": {"lora_dropout": "much"}}}}, "lora_dropout='much' must be a number"),
        ({"methods": {"lora": {"adapter": {"use_dora": "yes"}}}}, "use_dora='yes' must be true or false"),
        ({"methods": {"lora": {"adapter": {"r": 4}}}}, r"\['r'\], which LoraConfig does not know or the comparison"),
        ({"seeds": [0, 0]}, "each named once"),
        ({"seeds": "0"}, "list of whole numbers"),
        ({"tasks": {"a/b": TINY}}, "'a/b' must be named with"),
        ({"tasks": {"t": {"kind": "poems"}}}, "questions, text, classification"),
        ({"tasks": {"t": {**TINY, "kind": ["text"]}}}, "questions, text, classification"),
        ({"tasks": {"t": {**TINY, "step": 3}}}, r"\['step'\] unknown"),
        ({"tasks": {"t": {**TINY, "classes": 3}}}, r"\['classes'\] unknown"),
        ({"tasks": {"t": {**TINY, "dataset_config": "main"}}}, "without a `dataset`"),
        ({"tasks": {"t": {**TINY, "steps": 0}}}, r"steps=\[0\] must be different whole numbers"),
        ({"tasks": {"t": {**TINY, "steps": [3, 3]}}}, r"steps=\[3, 3\] must be different"),
        ({"tasks": {"t": {**TINY, "steps": "all"}}}, "steps='all' must be a whole number or a list"),
        ({"tasks": {"t": {**TINY, "methods": ["dora"]}}}, r"has methods \['dora'\], not under methods"),
        ({"seeds": [0, 1], "tuning_seeds": [1, 2]}, r"tuning_seeds=\[1, 2\] must be different and others than seeds"),
        ({"tasks": {"t": {**TINY, "ranks": 8}}}, "must be a list"),
        ({"tasks": {"t": {**TINY, "ranks": [2, 2]}}}, "must be different"),
        ({"tasks": {"t": {**TINY, "generate": 5}}}, "from 0 to test_size"),
        (
            {"tasks": {"t": {**TINY, "learning_rates": {"dora": [1]}}}},
            r"learning rates for \['dora'\], not under methods",
        ),
        ({"tasks": {"t": {**TINY, "learning_rates": {"lora": [0]}}}}, "of lora in task t must be"),
        ({"tasks": {"t": {**TINY, "target_modules": []}}}, "target_modules=.* must be 'all-linear' or a list"),
        ({"tasks": {"t": {**TINY, "target_modules": 3}}}, "target_modules=3 must be a text or a list of texts"),
        ({"tasks": {"t": {**TINY, "model": 7}}}, "model=7 must be a text or null"),
        ({"tasks": {"t": {**TINY, "data_seed": 0.5}}}, "data_seed=0.5 must be a whole number"),
        ({"warmup": "much"}, "must be a number"),
        ({"warmup": math.nan}, "warmup=nan must be a number"),
        ({"scaling": ".inf"}, "scaling='.inf' must be a number"),
        ({"precision": "fp8"}, "fp32, bf16"),
        ({"schedule": "cosin"}, "'cosin' is none of linear, cosine"),
        ({"schedule": "reduce_lr_on_plateau"}, "'reduce_lr_on_plateau' is none of"),
        ({"schedule": 3}, "schedule=3 must be a text"),
        ({"baseline": "loro"}, "baseline='loro' is not under methods"),
        ({"output_dir": 3}, "output_dir=3 must be a text"),
        ({"optimizer": "sgd"}, r"Unknown: \['optimizer'\]"),
    ],
)
def test_useless_entries_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_of(content(**change))


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("lora", {"momentum": 1}),
        ("lora", {"eps": "1e-8"}),
        ("lora", {"betas": [0.9]}),
        ("lora", {"betas": [0.9, math.nan]}),
        ("loraplus", {"ratio": 2}),
        ("lorarite", {"clip": 1}),
        ("pro_full_linear", {"backend": "triton"}),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused_before_training(
    method: str, optimizer: dict[str, Any], tmp_path: Path
) -> None:
    chosen = settings(tmp_path, methods={method: {"optimizer": optimizer, "learning_rates": [1e-3]}})
    with pytest.raises(UsageError, match=f"Method {method}: its optimizer cannot be built"):
        sweep_of(chosen)


def test_a_missing_package_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="lorarite"):
        require_usable(METHODS["lorarite"], CPU)


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


# The plan


def test_a_key_is_of_everything_that_decides() -> None:
    key = only("lora").key
    assert key == only("lora", output_dir="elsewhere").key
    assert key in {run.key for run in runs_of(settings_of(content(methods={"lora": [1e-2], "lorarite": [1e-2]})))}
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


def test_a_default_that_is_spelled_out_is_the_same_run() -> None:
    settings = {"trust_region": TRUST_REGION or 0, "rtol": None}
    spelled = method_of("mine", {"like": "pro_full_linear", "optimizer": settings})
    other = method_of("other", {"like": "pro_full_linear", "optimizer": {"trust_region": 0.015}})
    assert spelled.decides() == METHODS["pro_full_linear"].decides() != other.decides()
    assert METHODS["pro_full_paper"].decides()["settings"]["trust_region"] is None


def test_full_fine_tuning_has_no_rank_and_runs_once() -> None:
    cells = plan(settings_of(content(tasks={"tiny": {**TINY, "ranks": [2, 4]}})))
    assert [(cell.method.name, cell.rank) for cell in cells] == [("lora", 2), ("lora", 4), ("full", None)]


def test_the_longest_cells_come_first_and_a_task_may_have_methods_of_its_own() -> None:
    tasks = {"few": {**TINY, "methods": ["full"]}, "long": {**TINY, "steps": [2, 5]}}
    cells = plan(settings_of(content(tasks=tasks)))
    shown = [(cell.task.name, cell.steps, cell.method.name) for cell in cells]
    long = [[("long", steps, name) for name in ("lora", "full")] for steps in (5, 2)]
    assert shown == [*long[0], ("few", 3, "full"), *long[1]]


def test_horizons_share_the_first_part_of_one_order() -> None:
    """The data of several numbers of steps are those of the longest."""
    tasks = [settings_of(content(tasks={"t": {**TINY, "steps": steps}})).tasks[0] for steps in ([2, 5], 5, 2)]
    assert [task.examples for task in tasks] == [10, 10, 4]
    assert tasks[0].decides() == tasks[1].decides() != tasks[2].decides()
    keys = [
        {(cell.method.name, cell.steps): cell.key for cell in plan(settings_of(content(tasks={"t": entry})))}
        for entry in ({**TINY, "steps": [2, 5]}, {**TINY, "steps": 5})
    ]
    assert keys[1].items() <= keys[0].items() and len(set(keys[0].values())) == 4


# The store and a comparison that is stopped


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the runs that are trained from now on, none of them in earnest."""
    titles: list[str] = []

    def pretend(task: Any, run: Any, *rest: Any) -> Any:
        titles.append(run.title)
        return record_of(run)

    monkeypatch.setattr(sweep_module, "train_run", pretend)
    monkeypatch.setattr(sweep_module, "load_task", lambda task: type("Loaded", (), {"settings": task})())
    monkeypatch.setattr(sweep_module, "reference_losses", lambda *_: LEVELS)
    monkeypatch.setattr(report_module, "draw", lambda summary: {})
    return titles


def compare(folder: Path, *more: str, methods: str = "{lora: [1e-3, 1e-2], full: [1e-3]}") -> int:
    tasks = f"tasks={json.dumps({'tiny': TINY})}"
    arguments = [str(CONFIGS / "smoke.yaml"), "--set", f"methods={methods}", "--set", tasks, "--device", "cpu"]
    return command_line(*arguments, "--output_dir", str(folder), *more)


def test_a_half_written_line_costs_one_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one, two = runs_of(settings(tmp_path))
    store.append(record_of(one, losses=[float("nan")]))
    with (tmp_path / RECORDS).open("a") as file:
        file.write('{"key": "b", "status": "fini')
    assert set(store.records()) == {one.key}
    store.append(record_of(two))
    store.append(record_of(one, status="failed"))
    with (tmp_path / RECORDS).open("a") as file:
        file.write('7\n{"key": "of another version"}\n')
    assert {key: r.status for key, r in store.records().items()} == {one.key: "failed", two.key: "finished"}
    assert "\n\n" not in (tmp_path / RECORDS).read_text()


def test_runs_that_are_done_are_not_done_again(tmp_path: Path, trained: list[str]) -> None:
    run_all(settings(tmp_path))
    lines = (tmp_path / RECORDS).read_text()
    trained.clear()
    run_all(settings(tmp_path))
    assert trained == [] and (tmp_path / RECORDS).read_text() == lines
    run_all(settings(tmp_path, methods={"lora": [1e-2, 2e-2], "full": [1e-2]}))
    assert trained == ["tiny r=2, 3 steps: LoRA (AdamW), lr 0.02, seed 0"]


def test_failed_runs_are_pointed_out_and_tried_again_on_demand(tmp_path: Path, trained: list[str]) -> None:
    for run in runs_of(settings(tmp_path)):
        Store(tmp_path).append(record_of(run, status="failed", scores=None, error="OutOfMemoryError"))
    shown = io.StringIO()
    run_all(settings(tmp_path), console=Console(file=shown, width=200))
    assert trained == [] and "2 of those done before have failed; --retry_failed" in shown.getvalue()
    run_all(settings(tmp_path), retry_failed=True)
    assert len(trained) == 2 and {r.status for r in Store(tmp_path).records().values()} == {"finished"}


def test_two_comparisons_do_not_train_into_one_folder(tmp_path: Path, trained: list[str]) -> None:
    with (
        Store(tmp_path).locked(0, print),
        pytest.raises(UsageError, match="Another process is training"),
    ):
        run_all(settings(tmp_path))
    assert trained == [] and not (tmp_path / "sweep.json").exists()
    run_all(settings(tmp_path))
    assert len(trained) == 2


def test_reference_losses_are_computed_once(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Any] = []
    monkeypatch.setattr(sweep_module, "reference_losses", lambda *each: computed.append(each) or LEVELS)
    for seeds in ([0], [0], [0, 1]):
        run_all(settings(tmp_path, seeds=seeds))
        assert len(computed) == 1 and Store(tmp_path).sweep()["levels"]["tiny"].items() >= LEVELS.items()
    run_all(settings(tmp_path, tasks={"tiny": {**TINY, "steps": 4}}))
    assert len(computed) == 2


def test_a_task_that_cannot_be_loaded_is_told_before_any_run(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sweep_module.load_task

    def gone(task: Any) -> Any:
        if task.name == "second":
            raise UsageError("Task second: no such model")
        return load(task)

    monkeypatch.setattr(sweep_module, "load_task", gone)
    with pytest.raises(UsageError, match="no such model"):
        run_all(settings(tmp_path, tasks={"first": TINY, "second": TINY | {"steps": 4}}))
    assert trained == []


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a YAML"),
        (["--report_only"], "name that folder"),
        (["smoke", "--report_only", "--output_dir", "nowhere"], "leave YAML and --set out"),
        (["--report_only", "--output_dir", "nowhere"], "no comparison to report on"),
        (["nowhere.yaml"], "nowhere.yaml: there is no such file, and nothing of that name in the package"),
        (["smoke", "--set", "seeds"], "KEY=VALUE"),
        (["smoke", "--set", "seeds.a=1"], "KEY=VALUE"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        command_line(*arguments)


def test_the_command_trains_and_reports_again(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, "--json") == 0 and len(trained) == 3
    first = json.loads(capsys.readouterr().out)
    assert [method["method"] for method in first["comparisons"][0]["methods"]] == ["lora", "full"]
    text = (tmp_path / "report.md").read_text()
    assert command_line("--report_only", "--output_dir", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == first and (tmp_path / "report.md").read_text() == text


def test_ctrl_c_leaves_a_report(tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend = sweep_module.train_run

    def interrupted(*arguments: Any) -> Any:
        if len(trained) == 1:
            raise KeyboardInterrupt
        return pretend(*arguments)

    monkeypatch.setattr(sweep_module, "train_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path)
    assert "2 runs are still to come" in (tmp_path / "report.md").read_text()


# Processes


def test_a_worker_is_that_of_accelerate_and_trainer_sees_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Worker.of_environment() == Worker(0, 1)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("CUDA_VISIBLE_DEVICES", "4,6")):
        monkeypatch.setenv(name, value)
    worker = Worker.of_environment()
    assert worker == Worker(5, 8)
    worker.forget_others()
    assert Worker.of_environment() == Worker(0, 1) and os.environ["CUDA_VISIBLE_DEVICES"] == "6"


def test_a_process_leaves_the_cells_that_another_has_claimed(tmp_path: Path, trained: list[str]) -> None:
    chosen = settings(tmp_path, methods={"lora": [1e-3, 1e-2], "dora": [1e-2], "full": [1e-3]})
    sweeps = [Sweep(chosen, Worker(index, 2), CPU, Console(quiet=True)) for index in range(2)]
    first = plan(chosen)[0]
    with sweeps[0].store.claimed(first.key) as ours:
        assert ours
        sweeps[1].run()
    assert len(trained) == 2 and not any("LoRA (AdamW)" in title for title in trained)
    sweeps[0].run()  # the claim has ended, as it does with a killed process
    assert len(trained) == len(set(trained)) == 4


def test_runs_that_another_process_has_trained_meanwhile_are_not_trained_again(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(tmp_path)
    pretend = sweep_module.train_run

    def meanwhile(task: Any, run: Any, *rest: Any) -> Any:
        if len(trained) == 0:  # another process does the other cell
            Store(tmp_path).append(record_of(runs_of(chosen)[1]))
        return pretend(task, run, *rest)

    monkeypatch.setattr(sweep_module, "train_run", meanwhile)
    run_all(chosen)
    assert trained == ["tiny r=2, 3 steps: LoRA (AdamW), lr 0.01, seed 0"]


def test_devices_are_processes_and_their_parent_reports(
    tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(devices: int, kind: str, arguments: list[str]) -> int:
        for index in range(devices):
            monkeypatch.setenv("RANK", str(index))
            monkeypatch.setenv("WORLD_SIZE", str(devices))
            assert command_line(*arguments) == 0 and not capsys.readouterr().out
        return 0

    monkeypatch.setattr(command, "launch", launch)
    assert compare(tmp_path, "--devices", "2") == 0
    assert len(trained) == len(set(trained)) == 3
    assert capsys.readouterr().out.count("Report:") == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_do_each_run_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, "--set", "seeds=[0, 1]", "--devices", "2", methods="{lora: [1e-3], full: [1e-3]}") == 0
    lines = [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines() if line]
    assert len(lines) == len({line["key"] for line in lines}) == 4
    assert {line["status"] for line in lines} == {"finished"}
    assert capfd.readouterr().out.count("Report:") == 1


def started(code: str, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
    helpers = str(Path(__file__).parents[1] / "helpers")
    environment = {**os.environ, "PYTHONPATH": helpers}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, **more)


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, comparison_helpers as t\n"
        "from lorapro_hf.commands.compare.store import Store\n"
        "append = Store.append\n"
        "def die_before_the_third(store, record):\n"
        "    if len(store.records()) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    append(store, record)\n"
        "Store.append = die_before_the_third\n"
        "t.command_line(*sys.argv[1:])\n"
    )
    override = f"tasks={json.dumps({'tiny': CLASSES})}"
    arguments = ["smoke", "--output_dir", str(tmp_path), "--set", "methods=[lora, dora, full]", "--set", override]
    assert started(code, *arguments).wait() == -signal.SIGKILL
    before = Store(tmp_path).records()
    assert len(before) == 2
    assert command_line(*arguments, "--device", "cpu") == 0
    after = Store(tmp_path).records()
    assert before.items() <= after.items()
    assert len(after) == len(runs_of(read_settings(CONFIGS / "smoke.yaml", arguments[4::2])))


@pytest.mark.slow
def test_sigterm_ends_the_processes_too(tmp_path: Path) -> None:
    grid = ", ".join(f"{i}e-4" for i in range(1, 200))
    arguments = ["--devices", "2", "--device", "cpu", "--output_dir", str(tmp_path), "--set", f"methods.lora=[{grid}]"]
    code = "import sys, comparison_helpers as t; sys.exit(t.command_line(*sys.argv[1:]))"
    process = started(code, "smoke", *arguments, stdout=subprocess.PIPE)
    store = Store(tmp_path)
    while not store.records() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    done = store.records()
    assert process.stdout
    process.stdout.read()  # its end is that of the last process that inherited it
    assert done and store.records() == done
