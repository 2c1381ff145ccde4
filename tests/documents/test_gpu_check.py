"""benchmarks/gpu_check.py on the CPU: what it writes, and how it tells a wrong number and a part that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    yield gpu_check
    for name in [name for name in sys.modules if name.split(".")[0] in ("gpu_check", "gpu_parts")]:
        del sys.modules[name]


def run(program: Any, folder: Path, *parts: str) -> tuple[int, dict[str, Any], str]:
    """The exit code and both reports of a run within this process."""
    options = ["--device", "cpu", "--tiny", "--output_dir", str(folder), "--parts", *parts]
    code = program.main(options, start=program.run_here)
    found = json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))
    return code, found, (folder / "gpu_check.md").read_text(encoding="utf-8")


def only_rank_4_of_full(oracles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracles, "settings_of_modes", lambda rank: [{"mode": "full", "update": "linear"}])


def test_a_good_run_reports_numbers_and_what_it_could_not_do(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpu_parts import oracles, times

    only_rank_4_of_full(oracles, monkeypatch)
    monkeypatch.setattr(times, "PEERS", ())
    monkeypatch.setattr(times, "MODES", ("full",))
    code, found, report = run(program, tmp_path, "oracles-4", "steps", "layers", "training", "times")
    assert code == 0 and found["is_good"]
    names = [number["name"] for number in found["parts"]["oracles-4"]["checks"]]
    assert "full linear, r=4, fp32: movement of s B A" in names and "full linear, r=4, fp32: state" in names
    assert all(number["value"] <= number["limit"] for part in found["parts"].values() for number in part["checks"])
    assert len(found["parts"]["training"]["figures"]["losses"]) == 10
    assert len(found["parts"]["layers"]["checks"]) == 40
    assert "| tiny | q_proj | 4 | fp32 | 64 | " in report
    for line in ("| tiny | 4 | fp32 | LoRA-Pro full |", "- steps: waits of the host and CUDA graphs: they need a GPU"):
        assert line in report
    assert "GB/s" in report and "full linear, r=4, fp32: movement of s B A | " in report
    assert report.split("\n## All numbers")[0] in capsys.readouterr().out


def test_a_wrong_number_and_a_failing_part_end_with_code_1_and_lose_nothing(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_parts import kernels, oracles

    only_rank_4_of_full(oracles, monkeypatch)
    right = oracles.reference.factor_gradients

    def wrong(*arguments: Any) -> tuple[torch.Tensor, ...]:
        h_A, h_B = right(*arguments)
        return h_A, 1.001 * h_B

    def failing(record: Any) -> None:
        record.check("found before", 0, 1)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(oracles.reference, "factor_gradients", wrong)
    monkeypatch.setattr(kernels, "check_kernels", failing)
    code, found, report = run(program, tmp_path, "oracles-4", "kernels", "steps")
    assert code == 1 and not found["is_good"]
    assert "- full linear, r=4, fp32: movement of s B A: 0.000" in report.split("## Wrong numbers")[1]
    assert found["parts"]["kernels"]["errors"] == ["kernels: RuntimeError: out of luck"]
    assert found["parts"]["kernels"]["checks"] == [{"name": "found before", "value": 0.0, "limit": 1}]
    assert found["parts"]["steps"]["not_done"] and not found["parts"]["steps"]["errors"]
    assert "| full linear, r=4, bf16: movement of s B A |" in report


def test_every_mode_has_an_oracle_and_every_kernel_its_formula(program: Any, tmp_path: Path) -> None:
    code, found, _ = run(program, tmp_path, "kernels")
    assert code == 0 and len(found["parts"]["kernels"]["checks"]) > 50


@pytest.mark.slow
def test_what_is_not_reached_in_time_is_listed(program: Any, tmp_path: Path) -> None:
    record = program.Record(tmp_path / "late.json", torch.device("cpu"), True, until=0.0)
    record.attempt("a number", lambda: pytest.fail("it was begun"))
    assert program.read_findings(record.path).not_done == ["a number: the time was up"]
    record.check("not a number", float("nan"), 1)
    record.save()
    assert not program.read_findings(record.path).is_good


@pytest.mark.slow
def test_a_part_that_dies_is_an_error(program: Any, tmp_path: Path) -> None:
    options = program.Options("cpu", True, 1.0, tmp_path, ("steps",))
    (tmp_path / "parts").mkdir()
    process = program.subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    found = program.ended(program.Running("steps", process, 2e10), options)
    assert found.errors == ["the part ended before it began", "the part ended with code 3, see parts/steps.log"]


def test_without_a_gpu_nothing_runs(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_all_parts_as_processes_of_their_own(program: Any, tmp_path: Path) -> None:
    code = program.main(["--device", "cpu", "--tiny", "--minutes", "30", "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert code == 0 and list(found["parts"]) == list(program.PARTS)
    assert len(found["parts"]["ddp"]["checks"]) == 4
