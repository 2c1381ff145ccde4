"""docs/results.md: the page that benchmarks/results.py makes of summaries."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from comparison_helpers import TINY, record_of, runs_of, settings
from lorapro_hf.commands.common.records import write_json
from lorapro_hf.commands.compare.plan import content_of, plan
from lorapro_hf.commands.compare.store import Store
from lorapro_hf.commands.compare.summary import Summary, summarize
from lorapro_hf.config import MODE, UPDATE, LoRAProConfig

ROOT = Path(__file__).parents[2]
GAP = {"measured": 8, "closer": 7}
OURS = f"pro_{MODE}_{UPDATE}"  # LoRA-Pro with the settings that it has beside the neighbours
OUR_TITLE = f"LoRA-Pro {MODE}, {UPDATE}"
LOSSES = {"lora": 1.0, "loraplus": 1.2, "lora_one": 0.8, OURS: 0.9, "pro_lora_one": 0.85, "full": 0.5}
METHODS = {name: [1e-2] for name in LOSSES}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results

    return results


def made(folder: Path, losses: dict[str, float] = LOSSES, noise: float = 0.001, **tasks: Any) -> Summary:
    """A comparison of three seeds, whose losses are those given and a little more for each seed."""
    chosen = settings(folder, seeds=[0, 1, 2], methods=METHODS, tasks=tasks or {"tiny": {**TINY, "ranks": [4]}})
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder)
    store.write_sweep(content_of(chosen, plan(chosen)))
    for run in runs_of(chosen):
        loss = losses[run.method.name] + noise * (run.seed + (run.seed - 1) * (run.method.name != "lora"))
        test = {"loss": loss, "accuracy": 1 - loss / 2}
        store.append(
            record_of(
                run,
                scores={"validation": {"loss": loss}, "test": test},
                losses=[2 * loss, loss, loss, loss],
                step_ms=10.0 * (1 + run.method.is_lora_pro),
                optimizer_ms=1.0,
                state_bytes=2**20,
            )
        )
    return summarize(store)


def test_losses_say_who_is_better_than_lora(program: Any, tmp_path: Path) -> None:
    page = program.page({"small": made(tmp_path)}, GAP)
    assert "|LoRA (AdamW)|1.00100±0.00058<br>2.002, 50.0%|" in page
    assert "|LoRA+|*1.2010±0.0012*<br>*2.402*, 40.0%|" in page
    assert f"|{OUR_TITLE}|**0.9010±0.0012**<br>**1.802**, 54.9%|" in page
    assert page.index("### 3 steps") < page.index("|LoRA (AdamW)|") < page.index("|full fine-tuning|")
    assert "in 7 of 8 measurements" in page and "18 runs: 0 diverged" in page
    assert "Not run in this form: long, whole, held_out, neighbours, costs." in page


def test_noise_makes_methods_level(program: Any, tmp_path: Path) -> None:
    found = made(tmp_path, noise=0.2)
    page = program.page({"small": found, "neighbours": found}, GAP)
    assert f"|{OUR_TITLE}|1.10±0.23<br>" in page and "**LoRA-One** is level with LoRA with AdamW" in page


def test_the_default_is_found_by_its_settings(program: Any, tmp_path: Path) -> None:
    from results_parts.summaries import default_of

    config = LoRAProConfig()
    mine = {"like": OURS, "optimizer": {"mode": config.mode, "update": config.update}}
    for methods, expected in (({"pro_full_paper": None}, None), ({"pro_full_paper": None, "mine": mine}, "mine")):
        chosen = settings(tmp_path, methods=methods)
        Store(tmp_path).write_sweep(content_of(chosen, []))
        assert default_of(summarize(Store(tmp_path))) == expected


def test_targets_are_computed_and_missed_ones_named(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from results_parts import summaries

    monkeypatch.setattr(summaries, "default_of", lambda summary: OURS)
    tasks = {"tiny": {**TINY, "ranks": [2, 4], "steps": [3, 200]}}
    lines = program.page({"small": made(tmp_path, **tasks)}, GAP).split("## Targets")[1].split("## Losses")[0]
    early, sooner, last, first, rate = lines.strip().splitlines()
    assert "**missed**, 0 of 2 cells (tiny 1.80)" in early  # rank 2 is not part of it
    assert "at most 75% of them: **missed**, 0 of 4 cells (tiny 100%)" in sooner
    assert "**met**, 2 of 2 cells (tiny 0.90)" in last  # 3 steps are not part of it
    assert "**met**, 4 of 4 (first 4, tied 0, behind 0)" in first and "**met**, 4 of 4 cells (tiny 0.50)" in rate
    behind = made(tmp_path / "behind", {**LOSSES, OURS: 1.1, "pro_lora_one": 1.3}, **tasks)
    page = program.page({"small": behind}, GAP)
    assert "**missed**, 0 of 4 (first 0, tied 0, behind 4). Behind in: tiny, r = 2, 3 steps;" in page
    assert "not worse by two standard errors from 200 steps: **missed**, 0 of 2 cells (tiny 1.10)" in page


def test_neighbours_get_a_verdict_each(program: Any, tmp_path: Path) -> None:
    page = program.page({"neighbours": made(tmp_path)}, GAP)
    assert (
        "- **LoRA-One** is better than LoRA with AdamW (loss, early: ×0.80, ×0.80) and is better than LoRA-Pro alone "
        "(loss, early: ×0.94, ×0.94): it helps."
    ) in page
    assert f"- no such start, tiny, r = 4, 3 steps: {OUR_TITLE} is better (0.9010 ± 0.0012 against" in page
    assert "- LoRA-One, tiny, r = 4, 3 steps: LoRA-Pro, LoRA-One is worse (0.8510 ± 0.0012 against" in page
    assert "No comparison has been run in this form." in page  # the tables


def test_variants_are_counted(program: Any, tmp_path: Path) -> None:
    page = program.page({"small": made(tmp_path)}, GAP)
    assert "Of 1 pairs of a variant (8 at most) and a cell, 0 better, 0 level, 1 worse; the loss is ×1.20" in page


def test_tasks_that_differ_in_ranks_alone_have_one_name_and_wide_tables_are_split(program: Any, tmp_path: Path) -> None:
    few = ["lora", "full"]
    tasks = {
        "tiny": {**TINY, "ranks": [4]},
        "tiny_ranks": {**TINY, "ranks": [1, 2, 8], "methods": few, "train_size": 6},
        "other": {**TINY, "ranks": [4], "data_seed": 1},
    }
    page = program.page({"small": made(tmp_path, **tasks)}, GAP)
    assert "|method|tiny<br>r = 4|other<br>r = 4|" in page
    assert "|method|tiny<br>r = 1|tiny<br>r = 2|tiny<br>r = 8|" in page


def test_costs_are_those_of_their_own_comparison(program: Any, tmp_path: Path) -> None:
    page = program.page({"costs": made(tmp_path)}, GAP)
    assert f"|{OUR_TITLE}|20.0|1.0|1.0|" in page and "Seeds differ by up to 0%." in page


def test_a_summary_is_read_as_it_was_and_one_of_an_older_form_is_absent(program: Any, tmp_path: Path) -> None:
    from results_parts.summaries import read

    found = made(tmp_path)
    write_json(tmp_path / "summary.json", asdict(found))
    again = read(tmp_path)
    assert again is not None and asdict(again) == json.loads((tmp_path / "summary.json").read_text())
    assert program.page({"small": again}, GAP) == program.page({"small": found}, GAP)
    (tmp_path / "summary.json").write_text(json.dumps({"comparisons": [{"task": "old", "rank": 8}]}))
    assert read(tmp_path) is None and read(tmp_path / "nothing") is None


def test_a_taken_summary_has_fewer_digits(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "KEPT", tmp_path / "kept")
    run = tmp_path / "runs" / "compare-small"
    run.mkdir(parents=True)
    content = {"settings": {"output_dir": str(tmp_path)}, "losses": [1.23456789, 2e-12 / 3], "seed": 1234567}
    (run / "summary.json").write_text(json.dumps(content))
    program.take("small")
    expected = {"settings": {"output_dir": "runs/compare-small"}, "losses": [1.23457, 6.66667e-13]}
    assert json.loads((tmp_path / "kept" / "small" / "summary.json").read_text()) == content | expected


@pytest.mark.slow
def test_pictures_are_drawn_beside_the_page(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "KEPT", tmp_path)
    monkeypatch.setattr(program, "PAGE", tmp_path / "results.md")
    made(tmp_path / "small")
    write_json(tmp_path / "small" / "summary.json", asdict(summarize(Store(tmp_path / "small"))))
    assert program.main(check=False) == 0 and program.main(check=True) == 0
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == sorted(program.PICTURES)
    assert all(f"(results/{name}.png)" in (tmp_path / "results.md").read_text() for name in program.PICTURES)


def test_page_is_up_to_date(program: Any) -> None:
    assert program.main(check=True) == 0, "run: python benchmarks/results.py"
