"""Does the chaos run see what it is to see? One cheap case, and verdicts on endings of every kind."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from chaos import __main__ as program
from chaos import damage
from chaos.cases import Lab, Result, try_case
from chaos.report import markdown
from chaos.verdicts import (
    FAILURES,
    FOREIGN,
    HANG,
    LATE,
    NEAR,
    OTHER_SAID,
    REFUSED,
    SAME,
    SAME_SAID,
    SILENT,
    Outcome,
    judge,
)
from killable import Nursery

ADAPTER = {"A": torch.ones(3), "B": torch.ones(2)}
WHOLE = Outcome([0], warnings=["checkpoint-0 is always warned about"], adapter=ADAPTER)
NEXT = {**ADAPTER, "B": torch.nextafter(torch.ones(2), torch.full((2,), 2.0))}
WARNING = ["checkpoint-6 is not complete: going on from checkpoint-4"]


def error(message: str = "cannot resume from checkpoint-4: ...", ours: bool = True, loaded: bool = False) -> Any:
    return {"type": "ValueError", "message": message, "ours": ours, "loaded": loaded}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (Outcome([0], adapter=ADAPTER), SAME),
        (Outcome([0], WARNING, adapter=ADAPTER), SAME_SAID),
        (Outcome([0], adapter=NEXT), SILENT),
        (Outcome([0], WHOLE.warnings, adapter=NEXT), SILENT),
        (Outcome([0], ["some other thing"], adapter=NEXT), SILENT),
        (Outcome([0], WARNING, adapter=NEXT), OTHER_SAID),
        (Outcome([0], adapter={"A": ADAPTER["A"]}), SILENT),
        (Outcome([0], adapter={**ADAPTER, "B": torch.full((2,), float("nan"))}), SILENT),
        (Outcome([0], adapter={}), SILENT),
        (Outcome([1, -9], errors=[error()]), REFUSED),
        (Outcome([1, -9], errors=[error(loaded=True)]), LATE),
        (Outcome([1, 1], errors=[error(ours=False)]), FOREIGN),
        (Outcome([1], errors=[error("the checkpoint does not fit")]), FOREIGN),
        (Outcome([0, -9]), HANG),
        (Outcome([-9, -9]), HANG),
    ],
)
def test_every_ending_has_its_verdict(found: Outcome, verdict: str):
    assert judge(found, WHOLE)[0] == verdict


def test_only_conversions_may_be_rounded_otherwise():
    assert judge(Outcome([0], adapter=NEXT), WHOLE, is_converted=True)[0] == NEAR
    far = {**ADAPTER, "B": 1.01 * ADAPTER["B"]}
    assert judge(Outcome([0], adapter=far), WHOLE, is_converted=True)[0] == SILENT


def test_a_seed_draws_the_same_cases_again():
    def drawn(seed: int, only: str = "") -> list[str]:
        return list(itertools.islice(program.draw(only, seed, {}), 40))

    assert drawn(1) == drawn(1) != drawn(2)
    assert {name.split(":")[1] for name in drawn(1)} == set(program.TRICKS) - program.ON_REQUEST
    assert drawn(1, "ddp:torn")[:2] == ["ddp:torn:0", "ddp:torn:1"]
    assert drawn(1, "ddp:torn:7") == ["ddp:torn:7"]


@pytest.mark.parametrize("only", ["dpp", "ddp:tron"])
def test_unknown_cases_are_named(only: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        program.main(["--only", only])
    assert end.value.code == 2
    assert f"--only {only}: the engines are one, ddp" in capsys.readouterr().err


def test_a_silent_difference_is_the_exit_code_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results = [Result("ddp:torn:0", SAME, "a", "", 1.0), Result("ddp:torn:1", SILENT, "a bit flipped", "1e-1", 1.0)]
    command = 'make chaos ARGS="--seed 5 --only ddp:torn:1"'
    for found, code in ((results, 1), (results[:1], 0)):
        monkeypatch.setattr(program, "run", lambda *given, found=found: given[-1].extend(found))
        assert program.main(["--seed", "5", "--output_dir", str(tmp_path)]) == code
        assert (command in capsys.readouterr().err) == bool(code)
    assert [case["name"] for case in json.loads((tmp_path / "results.json").read_text())["cases"]] == ["ddp:torn:0"]
    report = markdown(results, 5, "")
    assert "**2 cases, 1 silent differences**" in report and command in report
    assert "| ddp | torn | 2 | 1 |" in report


@pytest.mark.parametrize("number", range(20))
def test_damage_changes_what_it_names(number: int, tmp_path: Path):
    checkpoint, other = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    for folder in (checkpoint, other):
        (folder / f"global_step{folder.name[-1]}").mkdir(parents=True)
        files = (folder / "optimizer.pt", folder / f"global_step{folder.name[-1]}" / "states.pt")
        for file in files:
            file.write_text(f"{folder.name} {file.name}" * 20)
    tear, mix, lose = (
        f(*rest, Random(number))
        for f, *rest in ((damage.tear, other / "optimizer.pt"), (damage.mix, checkpoint, other), (damage.lose, other))
    )
    assert tear.startswith("checkpoint-4/optimizer.pt: ") and mix.endswith(" of checkpoint-4 in checkpoint-2")
    assert any("checkpoint-4" in file.read_text(errors="replace") for file in damage.files_of(checkpoint))
    assert not (checkpoint / "global_step4").exists()
    assert len(damage.files_of(other)) < 2 and lose.endswith(" in checkpoint-4")


@pytest.fixture(scope="module")
def lab(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(nursery, tmp_path_factory.mktemp("chaos"))


@pytest.mark.distributed
def test_one_process_resumes_to_the_bit(lab: Lab):
    killed = try_case(lab, "one:killed:0", seed=1)
    assert killed.verdict in (SAME, SAME_SAID) and killed.tried.startswith("killed rank 0 at instant "), killed


@pytest.mark.slow
@pytest.mark.distributed
def test_a_planted_difference_is_seen(lab: Lab):
    whole = lab.whole("one")
    name = next(iter(whole.adapter))
    whole.adapter[name] = torch.nextafter(whole.adapter[name], torch.tensor(float("inf")))
    planted = try_case(lab, "one:untouched:0", seed=1)
    assert planted.verdict == SILENT and planted.verdict in FAILURES, planted
