"""The benchmark: its probes against known allocations and operators, its methods, its arithmetic, and a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorapro_hf import cli, find_lora_pairs
from lorapro_hf.commands.bench import peers, ratios, run
from lorapro_hf.commands.bench.growth import exponents, fitted_exponent, series
from lorapro_hf.commands.bench.measure import Contender, turns
from lorapro_hf.commands.bench.peers import build_optimizer, missing
from lorapro_hf.commands.bench.probes import kernels_of, memory_of
from lorapro_hf.commands.bench.ratios import Forecasts, Ratios
from lorapro_hf.commands.bench.report import ratio_sections, slug
from lorapro_hf.commands.bench.results import GrowthPoint, Machine, Outcome, Result, Roofline, Share
from lorapro_hf.commands.bench.roofline import roofline
from lorapro_hf.commands.bench.settings import BASELINE, METHODS, MODELS, BenchSettings
from lorapro_hf.commands.bench.targets import targets_of
from lorapro_hf.commands.bench.training import computes_bf16
from lorapro_hf.commands.bench.workloads import Task, Workload
from lorapro_hf.commands.common.meters import kept_bytes, state_bytes
from lorapro_hf.config import MODES
from lorapro_hf.options import UsageError

CPU = torch.device("cpu")
TINY = Workload.of(MODELS["tiny"], 4, "fp32")
KEY = ("smollm2-135m", 8, "fp32")


# What a step allocates and launches


def test_memory_of_known_allocations() -> None:
    def step() -> None:
        first = torch.empty(1000, 1000)  # 4 MB
        second = torch.empty(500, 1000)  # 2 MB beside it
        del first
        third = torch.empty(300, 1000)  # 1.2 MB, after 4 MB are free again
        del second, third

    used = memory_of(step, CPU)
    assert used.peak == 6_000_000
    assert used.largest == 4_000_000
    assert used.shape == (1000, 1000)
    assert used.shapes == {(1000, 1000), (500, 1000), (300, 1000)}


def test_memory_of_a_step_that_replaces_what_it_keeps() -> None:
    kept = {"state": torch.zeros(1000, 1000)}

    def step() -> None:
        kept["state"] = kept["state"] + 1.0

    # both states are there for a moment, one of them was there before
    assert memory_of(step, CPU).peak == pytest.approx(4_000_000, abs=100)


def test_memory_of_a_step_in_place_counts_views_as_nothing() -> None:
    kept = torch.zeros(1000, 1000)
    used = memory_of(lambda: kept.view(-1)[:500_000].zero_(), CPU)
    assert (used.peak, used.shape) == (0, None)


def test_memory_inside_an_operator_is_seen() -> None:
    kept = torch.zeros(500, 500).T  # `sort` of a transposed matrix works on copies
    used = memory_of(lambda: torch.linalg.eigvalsh(kept), CPU)
    assert used.peak >= 1_000_000


def test_kernels_of_known_operators() -> None:
    x, many = torch.ones(4, 4), [torch.ones(3) for _ in range(5)]

    def step() -> None:
        x.mul_(0.5)
        x.view(-1).add_(1)
        x.reshape(2, 8).T.neg_()
        torch.matmul(x, x)
        x.to(torch.float64)
        torch.empty(7)

    assert kernels_of(step, CPU).kernels == 5
    foreach = kernels_of(lambda: torch._foreach_add_(many, 1.0), CPU)
    assert (foreach.kernels, foreach.calls) == (1, 1)


# Workloads and methods


def test_task_is_the_model_it_says() -> None:
    task = Task(Workload.of(MODELS["smollm2-135m"], 8, "bf16", 2), CPU)
    pairs = find_lora_pairs(task.model)
    assert len(pairs) == 14 == task.workload.pairs
    assert [tuple(pair.B.shape[:1]) + tuple(pair.A.shape[1:]) for pair in pairs[:7]] == [
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
    ]
    assert all(a is b for a, b in zip(task.factors, (f for pair in pairs for f in (pair.A, pair.B)), strict=True))
    assert all(f.dtype == torch.bfloat16 and f.abs().min() < f.abs().max() for f in task.factors)
    assert all(f.grad is not None and f.grad.abs().max() > 0 for f in task.factors)
    assert task.base_is_small


def test_elements_of_smollm2() -> None:
    model = Workload.of(MODELS["smollm2-135m"], 8, "fp32")
    assert model.pairs == 210
    assert model.elements == 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)
    assert model.factor_elements == 30 * 8 * (2 * 1152 + 2 * 768 + 3 * 2112)


@pytest.mark.parametrize("name", METHODS)
def test_step_changes_the_factors(name: str) -> None:
    if (reason := missing(METHODS[name])) is not None:
        pytest.skip(reason)
    task = Task(TINY, CPU)
    before = [factor.detach().clone() for factor in task.factors]
    optimizer = build_optimizer(name, task)
    for _ in range(2):
        task.restore_gradients()
        optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, task.factors, strict=True)]
    assert all(changed[1::2]), "every B moves"
    assert all(changed[0::2]) or name == "lorafa", "every A moves, but for LoRA-FA's"
    assert all(factor.isfinite().all() for factor in task.factors)


def test_gradients_are_restored() -> None:
    task = Task(TINY, CPU)
    before = [factor.grad.clone() for factor in task.factors if factor.grad is not None]
    build_optimizer("riemannian", task).step()
    now = [factor.grad for factor in task.factors if factor.grad is not None]
    assert not torch.equal(before[0], now[0])  # it writes over them
    task.restore_gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_state_and_kept_bytes() -> None:
    steps = 4 * 2 * TINY.pairs
    for name, moments in ((BASELINE, 8 * TINY.factor_elements + steps), ("adamw_full", 8 * TINY.elements)):
        if missing(METHODS[name]) is None:
            contender = Contender(name, TINY, CPU)
            assert state_bytes(contender.optimizer) == moments
            assert kept_bytes(contender.optimizer, contender.task.model) == moments
    contender = Contender("efficient", TINY, CPU)
    assert state_bytes(contender.optimizer) >= 8 * TINY.factor_elements
    assert kept_bytes(contender.optimizer, contender.task.model) >= state_bytes(contender.optimizer)


def test_buffers_beside_the_state_count_as_kept() -> None:
    contender = Contender(BASELINE, TINY, CPU)
    before = kept_bytes(contender.optimizer, contender.task.model)
    contender.optimizer.workspace = {"buffers": [torch.zeros(100), contender.task.factors[0].detach().view(-1)]}
    assert kept_bytes(contender.optimizer, contender.task.model) == before + 400
    assert state_bytes(contender.optimizer) == before


def test_every_mode_is_a_method() -> None:
    assert [method.mode for method in METHODS.values() if method.mode is not None] == list(MODES)


# What is measured where


@pytest.mark.parametrize(
    ("estimates_ms", "wanted"),
    [([1.0], [15]), ([1000.0, 400.0], [3, 7]), ([60_000.0], [2])],
)
def test_turns_keep_the_time(estimates_ms: list[float], wanted: list[int]) -> None:
    plan = turns(estimates_ms, rounds=5, repeats=3, seconds=3.0)
    assert [sum(steps) for steps in plan] == wanted
    assert all(len(steps) == 5 and max(steps) - min(steps) <= 1 for steps in plan)


def test_forecast_grows_with_the_work_and_never_shrinks() -> None:
    forecasts, full = Forecasts(), METHODS["adamw_full"]
    small, large = (Workload.of(MODELS[name], 8, "fp32", 1) for name in ("smollm2-135m", "llama-2-7b"))
    assert forecasts.expected_ms(full, small) is None
    forecasts.note(full, large, 900.0)
    assert forecasts.expected_ms(full, small) == 900.0
    forecasts.note(full, small, 10.0)
    assert 400 < (forecasts.expected_ms(full, large) or 0) < 900  # m (m + n) is 57 times larger


def measured(methods: tuple[str, ...], **settings: Any) -> Outcome:
    outcome = Outcome()
    chosen = BenchSettings(workloads=("tiny",), ranks=(4,), dtypes=("fp32",), methods=methods, rounds=1, **settings)
    Ratios(chosen, outcome, CPU, lambda text: None).measure(MODELS["tiny"], 4, "fp32", float("inf"))
    return outcome


def test_missing_peer_is_named_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    outcome = measured(("adamw_full", "lorarite"), repeats=1)
    notes = {result.method: result.note for result in outcome.results}
    assert notes == {
        BASELINE: None,
        "adamw_full": "not installed: pip install 'lora-pro-adamw==0.2.1'",
        "lorarite": "not installed: pip install 'pytorch_optimizer>=4.1'",
    }
    (section,) = ratio_sections(outcome)
    assert "not installed: pip install 'lora-pro-adamw==0.2.1'" in [row[-1] for row in section.rows]


def test_failing_peer_is_recorded_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(task: Task) -> Any:
        raise NotImplementedError("geqrf is not implemented for BFloat16\nat some line")

    monkeypatch.setitem(peers._BUILDERS, "riemannian", fail)
    outcome = measured(("riemannian", "efficient"), repeats=1)
    by_method = {result.method: result for result in outcome.results}
    assert by_method["riemannian"].note == "NotImplementedError: geqrf is not implemented for BFloat16"
    assert by_method["riemannian"].ratio is None
    assert by_method["efficient"].ratio is not None and by_method["efficient"].ratio > 0
    assert by_method["efficient"].baseline_ms == by_method[BASELINE].samples_ms


def test_one_block_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([10**9] + [1000] * 20)
    monkeypatch.setattr(ratios, "available_bytes", lambda device: next(sizes))
    outcome = measured(("efficient",), repeats=1)
    efficient = next(result for result in outcome.results if result.method == "efficient")
    assert (efficient.whole, efficient.layers) == (False, 1)
    assert efficient.note is not None and efficient.note.startswith("one block: the model would need")
    assert len(efficient.baseline_ms) == 1  # of one block as well
    assert {(r.method, r.whole) for r in outcome.results} == {(BASELINE, True), (BASELINE, False), ("efficient", False)}


# Arithmetic


def test_fitted_exponent_of_a_power_law() -> None:
    sizes = [30, 60, 120]
    assert fitted_exponent(sizes, [0.3 * size**1.7 for size in sizes]) == pytest.approx(1.7, abs=1e-9)
    assert fitted_exponent(sizes, [5.0] * 3) == pytest.approx(0, abs=1e-9)


def test_exponents_take_medians_and_leave_out_what_was_not_measured() -> None:
    points = [GrowthPoint("full", "m", size, [size, size * 2.0, size * 30.0], kernels=7) for size in (10, 20, 40)]
    points += [GrowthPoint("full", "n", 10, [1.0], kernels=7), GrowthPoint("full", "n", 20)]
    assert exponents(points) == {("full", "m"): (pytest.approx(1), pytest.approx(0))}


def test_layers_grow_through_the_model_itself() -> None:
    for mode in MODES:
        sizes = [size for size, _ in series(MODELS["smollm2-135m"], METHODS[mode], "layers")]
        assert {30, 60} <= set(sizes), "the target compares these two"


def test_roofline_of_known_rates() -> None:
    workload = Workload("x", (("proj", 1000, 500),), 2, 8, "fp32")  # 1e6 elements
    result = Result("full", "x", 8, "fp32", state_bytes=8_000_000)
    found = roofline(result, workload, Machine([10.0, 8.0, 12.0], [64.0]))
    assert found is not None
    assert found.memory_ms == pytest.approx(16e6 / 10e9 * 1e3)
    assert found.compute_ms == pytest.approx(64e6 / 64e9 * 1e3)
    assert found.bound_ms == found.memory_ms and found.sum_ms == pytest.approx(2.6)
    assert roofline(Result("efficient", "x", 8, "fp32", state_bytes=10**9), workload, Machine([1.0], [1.0])) is None


def target_results(adamw: float, whole: bool = True) -> Outcome:
    outcome = Outcome()
    for method, ms in ((BASELINE, adamw), ("efficient", 12.0), ("adamw_efficient", 144.0), ("full", 150.0)):
        result = Result(method, *KEY, samples_ms=[ms], baseline_ms=[adamw], whole=whole)
        result.peak_bytes = 10_000_000
        outcome.results.append(result)
    outcome.results[-1].roofline = Roofline(100.0, 90.0)
    return outcome


def test_targets_met_and_not_met() -> None:
    outcome = target_results(adamw=3.0)
    outcome.shares = [Share("efficient", KEY[0], "fp32", [970.0], [30.0]), Share("full", "tiny", "fp32", [1.0], [9.0])]
    outcome.growth = [GrowthPoint("full", "layers", size, [1.0], 50, 40) for size in (30, 60)]
    verdicts = {target.name: (target.measured, target.verdict) for target in targets_of(outcome)}
    assert verdicts["efficient vs lora-pro-adamw efficient"] == ("12.0 times faster", "met")
    assert verdicts["efficient vs fused AdamW"] == ("4.00 times", "met")
    assert verdicts["full vs the roofline of the same run"] == ("1.50 times", "met")
    assert verdicts["factored vs fused AdamW"] == ("not measured", "–")
    assert verdicts["extra peak memory of a step"] == ("10.0 MB (efficient), none", "met")
    assert verdicts["kernels of a step, 30 → 60 layers"][1] == "met"
    shares = [target for target in targets_of(outcome) if target.name.startswith("share")]
    assert [target.verdict for target in shares] == ["not met", "–"]  # that of another model does not count
    slower = {target.name: target.verdict for target in targets_of(target_results(adamw=2.9))}
    assert slower["efficient vs fused AdamW"] == "not met"


def test_targets_see_dense_temporaries_and_more_kernels() -> None:
    outcome = target_results(adamw=3.0)
    outcome.results[1].dense_shapes = [(30, 576, 1536)]
    outcome.growth = [GrowthPoint("full", "layers", size, [1.0], size, 40) for size in (30, 60)]
    verdicts = {target.name: target for target in targets_of(outcome)}
    assert verdicts["extra peak memory of a step"].measured == "10.0 MB (efficient), but efficient (30, 576, 1536)"
    assert verdicts["extra peak memory of a step"].met is False
    assert verdicts["kernels of a step, 30 → 60 layers"].met is False


def test_targets_hold_for_the_whole_model_only() -> None:
    assert {target.met for target in targets_of(target_results(adamw=3.0, whole=False))} == {None}


def test_dense_shapes_of_a_step_are_noticed() -> None:
    contender, result = Contender(BASELINE, TINY, CPU), Result(BASELINE, "tiny", 4, "fp32")
    step = contender.optimizer.step

    def wasteful() -> None:
        torch.zeros(2, 48, 32)
        step()

    contender.optimizer.step = wasteful
    contender.probe(result)
    assert result.dense_shapes == [(2, 48, 32)]
    assert result.largest_shape == (2, 48, 32)
    assert result.peak_bytes == 4 * 2 * 48 * 32


@pytest.mark.parametrize(("flags", "native"), [("avx2 avx512_bf16", True), ("fp asimd bf16", True), ("avx2", False)])
def test_bf16_instructions_are_read_from_the_processor(flags: str, native: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name : x\nflags\t\t: sse2 {flags}\n", encoding="utf-8")
    assert computes_bf16(CPU, tmp_path / "cpuinfo") is native


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a whole run on the tiny model leaves behind."""
    folder = tmp_path_factory.mktemp("bench") / "made"
    arguments = ["--workloads", "tiny", "--ranks", "4", "--dtypes", "fp32", "--rounds", "1", "--repeats", "2"]
    arguments += ["--methods", "efficient", "adamw_efficient", "riemannian", "full", "--output_dir", str(folder)]
    assert cli.main(["bench", *arguments]) == 0
    return folder


def undisturbed(notes: list[str]) -> list[str]:
    return [note for note in notes if not note.startswith("Other processes")]


def test_other_processes_are_noticed() -> None:
    assert run.disturbance(foreign=1.0, seconds=100.0) is None
    assert "used 50% of a core" in (run.disturbance(foreign=50.0, seconds=100.0) or "")
    before = run.foreign_seconds()
    subprocess.run([sys.executable, "-c", "sum(i * i for i in range(3_000_000))"], check=True)
    assert run.foreign_seconds() - before > 0.02


def test_run_writes_tables_and_plots(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["growth.png", "ratios.png", "results.json", "results.md", "roofline.png"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    text = (folder / "results.md").read_text(encoding="utf-8")
    for title in ("tiny, r = 4, fp32 factors", "Growth of a step", "Share of a training step", "Targets"):
        assert f"## {title}" in text
    assert "| LoRA-Pro efficient |" in text


def test_results_json(folder: Path) -> None:
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert set(content) == {
        *("settings", "environment", "targets", "results", "machine", "growth", "exponents", "training"),
        *("notes", "stopped"),
    }
    assert content["stopped"] is False and undisturbed(content["notes"]) == []
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert content["environment"]["versions"]["torch"] == torch.__version__
    by_method = {result["method"]: result for result in content["results"]}
    assert list(by_method) == [BASELINE, "full", "efficient", "adamw_efficient", "riemannian"]
    for result in (r for r in by_method.values() if not str(r["note"]).startswith("not installed")):
        assert len(result["samples_ms"]) == 2 and min(result["samples_ms"]) > 0, result
        assert result["note"] is None and result["whole"] and result["kernels"] > 0, result
        assert result["ratio"] == pytest.approx(sum(result["samples_ms"]) / sum(result["baseline_ms"]))
        assert result["kept_bytes"] >= result["state_bytes"] > 0
    assert by_method["full"]["roofline"]["memory_ms"] > 0
    assert by_method["efficient"]["roofline"] is None
    axes = {(row["method"], row["axis"]) for row in content["exponents"]}
    assert axes == {(method, axis) for method in (BASELINE, "full", "efficient") for axis in ("layers", "m", "n", "r")}
    assert all(0 < share["share"] < 1 and len(share["step_ms"]) == 4 for share in content["training"])
    assert all(target["wanted"] for target in content["targets"])


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_growth", interrupt)
    settings = BenchSettings(
        workloads=("tiny",), ranks=(4,), dtypes=("fp32",), methods=("efficient",), rounds=1, output_dir=tmp_path
    )
    assert run.run_bench(settings, Console(quiet=True)) == 130
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["stopped"] is True
    assert [result["method"] for result in content["results"]] == [BASELINE, "efficient"]


def test_time_limit_is_told(tmp_path: Path) -> None:
    settings = BenchSettings(workloads=("tiny",), ranks=(4,), minutes=1e-9, output_dir=tmp_path)
    assert run.run_bench(settings, Console(quiet=True)) == 0
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (note,) = undisturbed(content["notes"])
    assert note.startswith("Not measured within --minutes 1e-09: tiny r=4 fp32, growth, training step, tiny r=4 bf16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "4", "4"], "names one twice"),
        pytest.param(
            ["--device", "cuda"],
            "sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_settings_refuse_the_unknown() -> None:
    with pytest.raises(UsageError, match=r"adamax.*choose from adamw, full"):
        BenchSettings(methods=("adamax",))
    with pytest.raises(UsageError, match="rounds: 0 must be more than 0"):
        BenchSettings(rounds=0)


def test_slug_is_a_folder_name() -> None:
    name = slug(CPU)
    assert name.endswith(f"-{torch.get_num_threads()}-threads") and name.replace("-", "").isalnum()
