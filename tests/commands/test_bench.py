"""The benchmark: its probes against known allocations and operators, its methods, its arithmetic, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lorapro_hf import cli, find_lora_pairs
from lorapro_hf.commands.bench import growth, ratios, run, settings
from lorapro_hf.commands.bench.growth import curves, fitted_exponent, series
from lorapro_hf.commands.bench.layers import MEASURED
from lorapro_hf.commands.bench.measure import Bench, Contender, machine_speed, roofline, turns
from lorapro_hf.commands.bench.probes import kernels_of, memory_of
from lorapro_hf.commands.bench.ratios import measure_ratios
from lorapro_hf.commands.bench.report import markdown, slug
from lorapro_hf.commands.bench.results import GrowthPoint, Machine, Outcome, Result, Roofline, Spread, read_results
from lorapro_hf.commands.bench.settings import BASELINE, DTYPES, METHODS, MODELS, BenchSettings, missing
from lorapro_hf.commands.bench.training import computes_bf16
from lorapro_hf.commands.bench.workloads import SyntheticModel, Workload
from lorapro_hf.commands.common import optimizers
from lorapro_hf.commands.common.meters import kept_bytes, state_bytes
from lorapro_hf.config import MODES

CPU = torch.device("cpu")
TINY = Workload.of(MODELS["tiny"], 4, "fp32")
TINY_PAIRS = TINY.layers * len(TINY.block)
TINY_FACTORS = TINY.layers * sum((m + n) * 4 for _, m, n in TINY.block)


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
    assert used.largest == (1000, 1000)
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
    assert (used.peak, used.largest, used.kernels) == (0, None, 1)


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

    assert kernels_of(step, CPU) == memory_of(step, CPU).kernels == 5
    assert kernels_of(lambda: torch._foreach_add_(many, 1.0), CPU) == 1


# Workloads and methods


def test_task_is_the_model_it_says() -> None:
    task = SyntheticModel(Workload.of(MODELS["smollm2-135m"], 8, "bf16", 2), CPU)
    pairs = find_lora_pairs(task.model)
    assert len(pairs) == 14
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
    base = [p for p in task.model.parameters() if not p.requires_grad]
    assert base and all(p.untyped_storage().nbytes() <= 4 for p in base)


def test_elements_of_smollm2() -> None:
    model = Workload.of(MODELS["smollm2-135m"], 8, "fp32")
    assert model.elements == 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)


def built(name: str, task: SyntheticModel) -> Any:
    return optimizers.build(METHODS[name].builder, task.model, 1e-5, METHODS[name].settings)


@pytest.mark.parametrize("name", METHODS)
def test_step_changes_the_factors(name: str) -> None:
    if (reason := missing(METHODS[name])) is not None:
        pytest.skip(reason)
    task = SyntheticModel(TINY, CPU)
    before = [factor.detach().clone() for factor in task.factors]
    optimizer = built(name, task)
    for _ in range(2):
        task.restore_gradients()
        optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, task.factors, strict=True)]
    assert all(changed[1::2]), "every B moves"
    assert all(changed[0::2]) or name == "lorafa", "every A moves, but for LoRA-FA's"
    assert all(factor.isfinite().all() for factor in task.factors)


def test_gradients_are_restored() -> None:
    task = SyntheticModel(TINY, CPU)
    before = [factor.grad.clone() for factor in task.factors if factor.grad is not None]
    built("riemannian", task).step()
    now = [factor.grad for factor in task.factors if factor.grad is not None]
    assert not torch.equal(before[0], now[0])  # it writes over them
    task.restore_gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_state_and_kept_bytes() -> None:
    steps = 4 * 2 * TINY_PAIRS
    for name, moments in ((BASELINE, 8 * TINY_FACTORS + steps), ("adamw_full", 8 * TINY.elements)):
        if missing(METHODS[name]) is None:
            contender = Contender(name, TINY, CPU)
            assert state_bytes(contender.optimizer) == moments
            assert kept_bytes(contender.optimizer, contender.synthetic.model) == moments
    contender = Contender("efficient", TINY, CPU)
    assert state_bytes(contender.optimizer) >= 8 * TINY_FACTORS
    assert kept_bytes(contender.optimizer, contender.synthetic.model) >= state_bytes(contender.optimizer)


def test_buffers_beside_the_state_count_as_kept() -> None:
    contender = Contender(BASELINE, TINY, CPU)
    before = kept_bytes(contender.optimizer, contender.synthetic.model)
    contender.optimizer.workspace = {"buffers": [torch.zeros(100), contender.synthetic.factors[0].detach().view(-1)]}
    assert kept_bytes(contender.optimizer, contender.synthetic.model) == before + 400
    assert state_bytes(contender.optimizer) == before


def test_every_mode_is_a_method() -> None:
    assert [method.settings["mode"] for method in METHODS.values() if method.ours] == list(MODES)


# What is measured where


@pytest.mark.parametrize(("estimate_ms", "wanted"), [(1.0, 15), (1000.0, 3), (400.0, 7), (60_000.0, 2)])
def test_turns_keep_the_time(estimate_ms: float, wanted: int) -> None:
    steps = turns(estimate_ms, BenchSettings())
    assert sum(steps) == wanted
    assert len(steps) == 5 and max(steps) - min(steps) <= 1


def report_of(outcome: Outcome) -> list[str]:
    outcome.environment = {"versions": {}}
    return markdown(outcome).splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    """The cells of the tables in a report."""
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]


def measured(*methods: str) -> Outcome:
    chosen = BenchSettings(workloads=("tiny",), ranks=(4,), dtypes=("fp32",), methods=methods, rounds=1, repeats=1)
    bench = Bench(chosen, CPU, Outcome({}))
    measure_ratios(bench, MODELS["tiny"], 4, "fp32")
    return bench.outcome


def test_missing_and_failing_peers_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any, lr: float, **settings: Any) -> Any:
        raise NotImplementedError("geqrf is not implemented for BFloat16\nat some line")

    monkeypatch.setitem(optimizers.BUILDERS, "riemannian", (fail, {}))
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(ratios, "usable_bytes", lambda device: 10**9)
    outcome = measured("adamw_full", "lorarite", "riemannian", "efficient")
    by_method = {result.method: result for result in outcome.results}
    notes = {
        "adamw_full": "not installed: pip install 'lora-pro-adamw==0.2.1'",
        "lorarite": "not installed: pip install 'pytorch_optimizer>=4.1'",
        "riemannian": "NotImplementedError: geqrf is not implemented for BFloat16",
    }
    assert {name: result.note for name, result in by_method.items()} == {BASELINE: None, "efficient": None, **notes}
    assert all(by_method[name].ratio is None for name in notes)
    assert by_method["efficient"].ratio is not None and by_method["efficient"].ratio > 0
    assert by_method[BASELINE].ratio == 1
    lines = report_of(outcome)
    assert {f"- {METHODS[name].title}: {note}" for name, note in notes.items()} < set(lines)
    assert [row[0] for row in rows(lines)][:3] == ["method", METHODS[BASELINE].title, METHODS["efficient"].title]


def test_one_block_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([10**9] + [1000] * 20)
    monkeypatch.setattr(ratios, "usable_bytes", lambda device: next(sizes))
    outcome = measured("efficient")
    efficient = next(result for result in outcome.results if result.method == "efficient")
    assert (efficient.whole, efficient.layers) == (False, 1)
    assert efficient.note is not None and efficient.note.startswith("one block: the model would need")
    assert efficient.ratio is not None
    assert {(r.method, r.whole) for r in outcome.results} == {(BASELINE, True), (BASELINE, False), ("efficient", False)}


def test_speed_of_the_machine_is_positive() -> None:
    machine = machine_speed(CPU, small=True)
    assert machine.copy_gb_per_s > 0 and machine.matmul_gflop_per_s > 0


# Arithmetic


def test_fitted_exponent_of_a_power_law() -> None:
    sizes = [30, 60, 120]
    assert fitted_exponent(sizes, [0.3 * size**1.7 for size in sizes]) == pytest.approx(1.7, abs=1e-9)
    assert fitted_exponent(sizes, [5.0] * 3) == pytest.approx(0, abs=1e-9)


def test_growth_takes_medians() -> None:
    spreads = {size: Spread.of([size, size * 2.0, size * 30.0]) for size in (10, 20, 40)}
    points = [GrowthPoint("full", "m", size, spread, kernels=7) for size, spread in spreads.items()]
    assert curves([*points, GrowthPoint("full", "n", 10, points[0].step_ms, 7)]) == [points]
    _, row = rows(report_of(Outcome({}, growth=points)))
    assert row == ["LoRA-Pro full", "m (out)", "10, 20, 40", "20, 40, 80", "1.00", "7, 7, 7", "0.00"]


def test_spread_of_known_samples() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_layers_grow_through_the_model_itself() -> None:
    for mode in MODES:
        sizes = [size for size, _ in series(MODELS["smollm2-135m"], METHODS[mode], "layers")]
        assert {30, 60} <= set(sizes)


def test_roofline_of_known_rates() -> None:
    workload = Workload("x", (("proj", 1000, 500),), 2, 8, "fp32")  # 1e6 elements
    result = Result("full", "tiny", 8, "fp32", state_bytes=8_000_000)
    result.roofline = roofline(result, workload, Machine(10.0, 64.0))
    assert result.roofline == Roofline(pytest.approx(16e6 / 10e9 * 1e3), pytest.approx(64e6 / 64e9 * 1e3))
    result.step_ms = Spread(5.2, 5.0, 6.0, 3)
    head, values = rows(report_of(Outcome({}, [result])))
    assert dict(zip(head, values, strict=True)).items() > {"×roof": "3.25", "×sum": "2.00"}.items()
    assert roofline(Result("efficient", "x", 8, "fp32", state_bytes=10**9), workload, Machine(1.0, 1.0)) is None


@pytest.mark.parametrize(("flags", "native"), [("avx2 avx512_bf16", True), ("fp asimd bf16", True), ("avx2", False)])
def test_bf16_instructions_are_read_from_the_processor(flags: str, native: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name : x\nflags\t\t: sse2 {flags}\n", encoding="utf-8")
    assert computes_bf16(CPU, tmp_path / "cpuinfo") is native


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run on the tiny model."""
    folder = tmp_path_factory.mktemp("bench") / "made"
    arguments = ["--workloads", "tiny", "--ranks", "4", "--dtypes", "fp32", "--rounds", "1", "--repeats", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "_COPIES", 1)
        assert cli.main(["bench", *arguments, "--methods", "full", "--output_dir", str(folder)]) == 0
    return folder


def undisturbed(notes: list[str]) -> list[str]:
    return [note for note in notes if not note.startswith("Other processes")]


def test_other_processes_are_noted() -> None:
    assert run.disturbance(foreign=1.0, seconds=100.0) is None
    assert "used 50% of a core" in (run.disturbance(foreign=50.0, seconds=100.0) or "")


def test_run_writes_tables(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "results.md"]
    text = (folder / "results.md").read_text(encoding="utf-8")
    for title in ("tiny, r = 4, fp32 factors", "Growth of a step", "Share of a training step"):
        assert f"## {title}" in text
    assert "| LoRA-Pro full |" in text


def test_results_json(folder: Path) -> None:
    outcome = read_results(folder / "results.json")
    assert not outcome.stopped
    assert [note for note in undisturbed(outcome.notes) if not note.startswith("Training step in fp32")] == []
    assert outcome.environment["threads"] == torch.get_num_threads()
    assert outcome.environment["versions"]["torch"] == torch.__version__
    by_method = {result.method: result for result in outcome.results}
    assert list(by_method) == [BASELINE, "full"]
    for result in by_method.values():
        assert result.step_ms is not None and result.step_ms.count == 2 and result.step_ms.low > 0, result
        assert result.ratio is not None and result.kernels is not None and result.kernels > 0, result
        assert (result.kept_bytes or 0) >= (result.state_bytes or 0) > 0
    assert by_method["full"].roofline is not None and by_method["full"].roofline.memory_ms > 0
    assert by_method[BASELINE].roofline is None
    axes = {(curve[0].method, curve[0].axis) for curve in curves(outcome.growth)}
    assert axes == {(method, axis) for method in (BASELINE, "full") for axis in ("layers", "m", "n", "r")}
    assert all(0 < share.share < 1 and share.step_ms.count == 4 for share in outcome.training)


def test_report_is_a_function_of_the_results(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again"
    again.mkdir()
    (again / "results.json").write_bytes((folder / "results.json").read_bytes())
    assert cli.main(["bench", "--report_only", "--output_dir", str(again)]) == 0
    assert (again / "results.md").read_text(encoding="utf-8") == (folder / "results.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["bench", "--report_only", "--json", "--output_dir", str(again)]) == 0
    assert capsys.readouterr().out == (again / "results.json").read_text(encoding="utf-8")
    (again / "results.json").write_text("{}")
    assert cli.main(["bench", "--report_only", "--output_dir", str(again)]) == 2
    assert "is no result of lorapro bench" in capsys.readouterr().err


def test_layers_beside_peft_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--workloads", "tiny", "--ranks", "4", "--dtypes", "fp32", "bf16", "--tokens", "64", "--rounds", "2"]
    assert cli.main(["bench", "--parts", "layers", "--output_dir", str(tmp_path), *options]) == 0
    outcome = read_results(tmp_path / "results.json")
    assert [(time.layer, time.dtype) for time in outcome.layers] == [(n, d) for d in DTYPES for n in MEASURED]
    for time in outcome.layers:
        assert time.peft_ms.count > 1 and time.fused_ms.keys() == time.gains.keys() == {"flops", "time"}
        assert time.gains["flops"] == pytest.approx(time.peft_ms.median / time.fused_ms["flops"].median)
        assert time.kept_bytes["flops"] == 0 and time.kept_bytes["PEFT"] == 64 * 4 * (4 if time.dtype == "fp32" else 2)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "## LoRA layers of tiny, r = 4, bf16" in text and "| down_proj | 64 |" in text


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(bench: Bench) -> None:
        raise KeyboardInterrupt

    def measure(bench: Bench, *workload: Any) -> None:
        bench.outcome.results.append(Result(BASELINE, "tiny", 4, "fp32", step_ms=Spread.of([1.0])))

    monkeypatch.setattr(run, "measure_ratios", measure)
    monkeypatch.setattr(run, "measure_growth", interrupt)
    settings = BenchSettings(workloads=("tiny",), output_dir=tmp_path)
    assert run.run_bench(settings, Console(quiet=True)) == 130
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["stopped"] is True
    assert [result["method"] for result in content["results"]] == [BASELINE]


def test_time_limit_is_told(tmp_path: Path) -> None:
    settings = BenchSettings(workloads=("tiny",), ranks=(4,), minutes=1e-9, output_dir=tmp_path)
    assert run.run_bench(settings, Console(quiet=True)) == 0
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    (note,) = undisturbed(content["notes"])
    assert note.startswith("Not measured within --minutes 1e-09: tiny r=4 fp32, growth, training step, tiny r=4 bf16")


def test_a_name_twice_and_a_missing_device_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--ranks", "4", "4"]) == 2
    assert "names one twice" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device", "cuda"]) == 2
        assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--methods", "adamax"], "invalid choice: 'adamax'"), (["--rounds", "0"], "'0' is not a whole number from 1 on")],
)
def test_the_parser_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_slug_is_a_folder_name() -> None:
    name = slug(CPU)
    assert name.endswith(f"-{torch.get_num_threads()}-threads") and name.replace("-", "").isalnum()
