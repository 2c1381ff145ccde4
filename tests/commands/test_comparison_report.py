"""What a comparison shows: best rates, gaps, significance, figures and the report, from records made up here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from lorapro_hf.commands.compare import report
from lorapro_hf.commands.compare.command import _report as report_on
from lorapro_hf.commands.compare.document import Heading, Picture, Table, Text, as_html, as_markdown
from lorapro_hf.commands.compare.plan import plan
from lorapro_hf.commands.compare.report import write_report
from lorapro_hf.commands.compare.settings import settings_of
from lorapro_hf.commands.compare.significance import holm, paired, smallest_p
from lorapro_hf.commands.compare.store import Store
from lorapro_hf.commands.compare.summary import Comparison, summarize

GRID = [1e-4, 3e-4, 1e-3]
# Loss by method and rate; the seed adds a little.
LOSSES = {
    "lora": dict(zip(GRID, (1.4, 1.2, 1.3), strict=True)),
    "pro_full_linear": dict(zip(GRID, (1.04, 1.05, 1.9), strict=True)),
    "full": dict(zip(GRID, (1.1, 1.0, 1.01), strict=True)),
}
Change = Callable[[dict[str, Any]], dict[str, Any] | None]


def made_up(folder: Path, change: Change = lambda record: record, seeds: tuple[int, ...] = (0, 1, 2)) -> Store:
    """A comparison whose runs ended as `change` says; those for which it returns None are still to come."""
    task = {"kind": "classification", "model": "tiny-random", "steps": 4, "ranks": [4]}
    settings = settings_of(
        {"seeds": list(seeds), "methods": dict.fromkeys(LOSSES, GRID), "tasks": {"t": task}, "output_dir": str(folder)}
    )
    folder.mkdir(exist_ok=True, parents=True)
    store = Store(folder)
    runs = plan(settings)
    store.write_sweep(settings, runs)
    for run in runs:
        loss = LOSSES[run.method.name][run.learning_rate] + 0.01 * run.seed
        record = {
            **run.entry(),
            "status": "finished",
            "scores": {"validation": {"loss": loss}, "test": {"loss": loss + 0.1, "accuracy": 1 / (1 + loss)}},
            "losses": [3.0, 2.5, 2.0, loss],
            "data": f"order of seed {run.seed}",
            "step_ms": 10.0,
            "train_s": 40.0,
            "state_bytes": 1000 * len(run.method.name),
            "peak_bytes": 2**20,
            "trainable": 1234,
            "environment": {"device": "cpu"},
        }
        changed = change(record)
        if changed is not None:
            store.append(changed)
    return store


@pytest.fixture(autouse=True)
def _figures_only_where_they_matter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time."""
    if "figure" not in request.node.name:
        monkeypatch.setattr(report, "draw", lambda comparison, ours: {})


def compared(store: Store) -> Comparison:
    (comparison,) = summarize(store.sweep(), store.records())
    return comparison


def diverged(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "status": "diverged", "diverged_at": 2, "scores": None, "losses": [3.0, None]}


def test_each_method_stands_at_its_own_best_rate(tmp_path: Path) -> None:
    comparison = compared(made_up(tmp_path))
    best = {row.method: row.best.learning_rate for row in comparison.rows if row.best}
    assert best == {"lora": 3e-4, "pro_full_linear": 1e-4, "full": 3e-4}
    assert {row.method: row.at_edge for row in comparison.rows if row.at_edge} == {"pro_full_linear": "lowest"}
    assert {row.method: row.good_range for row in comparison.rows} == {
        "lora": (3e-4, 3e-4),
        "pro_full_linear": (1e-4, 3e-4),
        "full": (3e-4, 1e-3),
    }


def test_validation_chooses_and_the_test_set_reports(tmp_path: Path) -> None:
    def contradict(record: dict[str, Any]) -> dict[str, Any]:
        record["scores"]["test"]["loss"] = -record["scores"]["validation"]["loss"]
        return record

    row = compared(made_up(tmp_path, contradict)).row("lora")
    assert row is not None and row.best is not None
    assert row.best.learning_rate == 3e-4 and row.best.values("loss") == pytest.approx({0: -1.2, 1: -1.21, 2: -1.22})


def test_share_of_the_gap(tmp_path: Path) -> None:
    comparison = compared(made_up(tmp_path))
    assert comparison.gap == pytest.approx(0.2) and comparison.gap_seeds == 3
    row = comparison.row("pro_full_linear")
    assert row is not None and row.gap_closed == pytest.approx((1.2 - 1.04) / 0.2)


def test_without_a_gap_there_is_no_share(tmp_path: Path) -> None:
    def spoil(record: dict[str, Any]) -> dict[str, Any]:
        if record["method"] == "full":
            record["scores"]["test"]["loss"] += 1
        return record

    store = made_up(tmp_path, spoil)
    row = compared(store).row("pro_full_linear")
    assert row is not None and row.gap_closed is None
    write_report(store, tmp_path)
    assert "nothing to close" in (tmp_path / "report.md").read_text()


def test_a_rate_at_which_a_seed_diverged_is_no_candidate(tmp_path: Path) -> None:
    def spoil(record: dict[str, Any]) -> dict[str, Any]:
        worst = (record["method"], record["learning_rate"], record["seed"]) == ("lora", 3e-4, 1)
        return diverged(record) if worst else record

    store = made_up(tmp_path, spoil)
    row = compared(store).row("lora")
    assert row is not None and row.best is not None and row.best.learning_rate == 1e-3
    assert row.counts() == {"finished": 8, "diverged": 1, "failed": 0, "missing": 0}
    write_report(store, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| 1/9 |" in text
    assert "loss not finite at step 2" in text
    assert re.search(r"\| LoRA \(AdamW\) \| 0\.0003 \| – \| 1\.3000, diverged, 1\.3200 \|", text)


def test_a_method_without_a_finished_rate_is_shown(tmp_path: Path) -> None:
    def spoil(record: dict[str, Any]) -> dict[str, Any]:
        if record["method"] != "pro_full_linear":
            return record
        return {**record, "status": "failed", "error": "OutOfMemoryError: <no> room", "scores": None}

    store = made_up(tmp_path, spoil)
    summary = write_report(store, tmp_path)
    row = summary["comparisons"][0]["methods"][1]
    assert row["learning_rate"] is None and row["runs"]["failed"] == 9
    assert report_on(tmp_path, tmp_path, as_json=False) == 1
    text = (tmp_path / "report.md").read_text()
    assert "| LoRA-Pro full, linear | none finished |" in text
    assert text.count(r"OutOfMemoryError: \<no\> room") == 9
    assert "&lt;no&gt; room" in (tmp_path / "report.html").read_text()


def test_runs_to_come_are_counted_not_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = made_up(tmp_path, lambda record: None if record["seed"] == 2 else record)
    summary = write_report(store, tmp_path)
    assert summary["missing"] == 9
    assert "9 of 27 runs are still to come" in (tmp_path / "report.md").read_text()
    assert all(row["learning_rate"] is None for row in summary["comparisons"][0]["methods"])
    assert report_on(tmp_path, tmp_path, as_json=False) == 0
    assert "No learning rate" not in capsys.readouterr().err


def blown_up(*where: tuple[str, float]) -> Change:
    """Whose runs of some methods and rates, of the first seed, end no better than they began, at the lowest loss."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if (record["method"], record["learning_rate"]) in where and record["seed"] == 0:
            record["losses"] = [3.0, 9.0, 4.0, 3.0]
            record["scores"]["validation"]["loss"] = 0.5
        return record

    return change


def test_a_rate_that_blew_up_is_not_the_best_nor_good(tmp_path: Path) -> None:
    row = compared(made_up(tmp_path, blown_up(("lora", 1e-3)))).row("lora")
    assert row is not None and row.best is not None
    assert (row.best.learning_rate, row.good_range, row.ties) == (3e-4, (3e-4, 3e-4), [])
    assert row.no_better() == 1 and row.rates[2].no_better == [0]
    row = compared(made_up(tmp_path / "near", blown_up(("full", 1e-3)))).row("full")  # within 2 % of the best otherwise
    assert row is not None and (row.good_range, row.good_at_edge) == ((3e-4, 3e-4), [])


def test_a_method_that_blew_up_at_all_rates_still_has_a_best_one(tmp_path: Path) -> None:
    row = compared(made_up(tmp_path, blown_up(*(("lora", rate) for rate in GRID)))).row("lora")
    assert row is not None and row.best is not None and row.good_range is None
    assert (row.best.learning_rate, row.no_better()) == (3e-4, 3)


def test_runs_that_blew_up_are_counted_and_marked(tmp_path: Path) -> None:
    summary = write_report(made_up(tmp_path, blown_up(("lora", 1e-3))), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| 0 | 1/9 |" in text and "| 1.4000 †, 1.4100, 1.4200 |" in text
    row = summary["comparisons"][0]["methods"][0]
    assert row["no_better"] == 1 and row["rates"][2]["no_better"] == [0]
    assert len({key for rate in row["rates"] for key in rate["keys"].values()}) == 9


def test_ranges_that_reach_the_end_of_the_grid_are_marked(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    assert {row.method: row.good_at_edge for row in compared(store).rows} == {
        "lora": [],
        "pro_full_linear": ["lowest"],
        "full": ["highest"],
    }
    write_report(store, tmp_path)
    assert "| 0.0001 to 0.0003 (×3) ↓ |" in (tmp_path / "report.md").read_text()


def test_levels_are_shown_where_they_are_noted(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    assert write_report(store, tmp_path)["comparisons"][0]["levels"] is None
    assert "Levels of the test loss" not in (tmp_path / "report.md").read_text()
    sweep = {**store.sweep(), "levels": {"t": {"untrained": 3.25, "frequencies": 2.5}}}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert write_report(store, tmp_path)["comparisons"][0]["levels"] == sweep["levels"]["t"]
    for name in ("report.md", "report.html"):
        assert "3.2500 untrained; 2.5000 for whoever" in (tmp_path / name).read_text()


def test_runs_of_other_sources_and_sessions_are_told(tmp_path: Path) -> None:
    def later(record: dict[str, Any]) -> dict[str, Any]:
        hour = {0: 1, 1: 3, 2: 9}[record["seed"]]
        when = {"finished_at": f"2026-01-02T{hour:02d}:30:00+00:00", "wall_s": 60.0}
        return {**record, **when} if record["seed"] == 0 else {**record, **when, "source": "abc"}

    write_report(made_up(tmp_path / "old"), tmp_path / "old")
    text = (tmp_path / "old" / "report.md").read_text()
    assert "states of this package" not in text and "sessions" not in text and "not to be compared" not in text
    write_report(made_up(tmp_path / "new", later), tmp_path / "new")
    text = (tmp_path / "new" / "report.md").read_text()
    assert "2 states of this package's source (not noted: 9 runs, abc: 18 runs)" in text
    assert "2 sessions (UTC 2026-01-02 01:29 to 2026-01-02 03:30; 2026-01-02 09:29 to 2026-01-02 09:30)" in text


def test_uneven_step_times_are_told(tmp_path: Path) -> None:
    def slow(record: dict[str, Any]) -> dict[str, Any]:
        busy = (record["method"], record["learning_rate"], record["seed"]) == ("lora", 3e-4, 1)
        return {**record, "step_ms": 13.0 if busy else 10.0}

    summary = write_report(made_up(tmp_path, slow), tmp_path)
    assert "at 1 of 9 rates the median step" in (tmp_path / "report.md").read_text()
    assert summary["comparisons"][0]["step_spread"] == pytest.approx(
        {"rates": 9, "uneven": 1, "largest": 1.3, "best": 1.3, "median": 1.0}
    )


def test_dollars_in_titles_are_no_formulas_in_figures(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    sweep = store.sweep()
    sweep["methods"]["lora"]["title"] = r"LoRA $\frac$ for $5"
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    write_report(store, tmp_path)
    assert (tmp_path / "figures" / "t-r4-loss.png").exists()


def test_unequal_data_are_noticed(tmp_path: Path) -> None:
    assert compared(made_up(tmp_path / "equal")).equal_data
    store = made_up(tmp_path / "other", lambda record: {**record, "data": record["method"]})
    assert not compared(store).equal_data
    other = made_up(tmp_path / "sets", lambda record: {**record, "examples": record["method"]})
    assert not compared(other).equal_data
    # old records beside new ones: like is compared with like
    mixed = made_up(tmp_path / "mixed", lambda r: {**r, "examples": "all"} if r["method"] == "full" else r)
    assert compared(mixed).equal_data
    write_report(store, tmp_path)
    assert "those of a seed the same batches" in (tmp_path / "report.md").read_text()


def test_ties_are_within_the_standard_error(tmp_path: Path) -> None:
    def closer(record: dict[str, Any]) -> dict[str, Any]:
        # standard error over the seeds: 0.01 / sqrt(3) = 0.0058
        if record["method"] == "full" and record["learning_rate"] == 1e-3:
            record["scores"]["validation"]["loss"] -= 0.005
        return record

    assert [row.ties for row in compared(made_up(tmp_path / "a")).rows] == [[], [], []]
    assert [row.ties for row in compared(made_up(tmp_path / "b", closer)).rows] == [[], [], [1e-3]]


def test_records_of_another_comparison_do_not_count(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    before = write_report(store, tmp_path)
    store.append({"key": "of another", "status": "finished"})
    assert write_report(store, tmp_path) == before


# Significance


def test_paired_tests_are_those_of_scipy() -> None:
    own, others = [1.0, 1.1, 0.9, 1.3, 1.05], [1.2, 1.15, 1.0, 1.25, 1.3]
    result = paired(own, others, more_is_better=False)
    assert result is not None and (result.seeds, result.better) == (5, 4)
    assert result.difference == pytest.approx(-0.11)
    assert result.t_test == pytest.approx(stats.ttest_rel(own, others).pvalue)
    assert result.sign_test == pytest.approx(2 * 6 / 32)
    assert result.wilcoxon == pytest.approx(stats.wilcoxon(own, others).pvalue)
    assert paired(own, others, more_is_better=True).better == 1


def test_few_seeds_cannot_show_much() -> None:
    result = paired([1.0, 1.1, 1.2], [2.0, 2.3, 2.1], more_is_better=False)
    assert result is not None and result.better == 3
    assert result.wilcoxon == result.sign_test == smallest_p(3) == 0.25
    assert smallest_p(1) == 1.0 and smallest_p(6) == pytest.approx(1 / 32)


def test_without_differences_nothing_is_claimed() -> None:
    same = paired([1.0, 2.0], [1.0, 2.0], more_is_better=False)
    assert same is not None and (same.t_test, same.wilcoxon, same.better) == (None, None, 0)
    constant = paired([1.0, 2.0], [2.0, 3.0], more_is_better=False)
    assert constant is not None and constant.t_test is None and constant.better == 2
    assert paired([], [], more_is_better=False) is None


def test_holm_corrects_in_order() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


# The report


def test_the_report_is_made_of_the_files_alone(tmp_path: Path) -> None:
    store = made_up(tmp_path / "runs")
    first = write_report(store, tmp_path / "one")
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    again = write_report(Store(moved), tmp_path / "two")
    assert first == again == json.loads((tmp_path / "two" / "summary.json").read_text())
    for name in ("report.md", "report.html"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_a_report_in_a_folder_of_its_own_has_its_runs_beside_it(tmp_path: Path) -> None:
    store = made_up(tmp_path / "runs")
    own = store.records()
    store.append({**next(iter(own.values())), "key": "of another sweep"})
    first = write_report(store, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    assert copy.records() == own and copy.sweep() == store.sweep()
    assert write_report(copy, copy.folder) == first and copy.records() == own


def test_markdown_and_html_hold_the_same_and_every_figure(tmp_path: Path) -> None:
    write_report(made_up(tmp_path), tmp_path)
    markdown, html = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    names = re.findall(r"\]\((figures/[^)]+)\)", markdown)
    kinds = ("loss", "rate-loss", "rate-accuracy", "train_s", "state_bytes")
    assert names == [f"figures/t-r4-{kind}.png" for kind in kinds]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert html.count("data:image/png;base64,") == len(names) and not re.search(r'(src|href)="(?!data:)', html)
    assert markdown.count("| LoRA-Pro full, linear |") == html.count("<td>LoRA-Pro full, linear</td>") == 5
    assert "1.3100 ± 0.0100" in markdown and "80%" in markdown and "0.25" in markdown


def test_figures_survive_what_cannot_be_drawn(tmp_path: Path) -> None:
    write_report(made_up(tmp_path / "none", diverged), tmp_path / "none")
    names = {path.name for path in (tmp_path / "none" / "figures").iterdir()}
    assert names == {"t-r4-rate-loss.png"}  # the crosses
    write_report(made_up(tmp_path / "empty", lambda record: None), tmp_path / "empty")
    assert not list((tmp_path / "empty" / "figures").iterdir())


def test_text_stays_text() -> None:
    blocks = [Heading(1, "a_b"), Text("1 < 2 | 3"), Table(["x", "y"], [["<i>", "a|b"]]), Picture("p", "q")]
    assert as_markdown(blocks, "figures") == (
        "# a\\_b\n\n1 \\< 2 \\| 3\n\n| x | y |\n| --- | ---: |\n| \\<i\\> | a\\|b |\n\n![q](figures/p.png)\n"
    )
    html = as_html(blocks, {"p": b"png"})
    assert "<td>&lt;i&gt;</td>" in html and "1 &lt; 2" in html and "<title>a_b</title>" in html


def test_numbers_of_one_seed_have_no_spread(tmp_path: Path) -> None:
    summary = write_report(made_up(tmp_path, seeds=(0,)), tmp_path)
    row = summary["comparisons"][0]["methods"][1]
    assert row["test"]["loss"]["std"] is None and math.isclose(row["test"]["loss"]["mean"], 1.14)
    assert row["against_baseline"]["t_test"] is None


@pytest.mark.parametrize(("max_grad_norm", "said"), [(1.0, "apart (not those of LoRA-RITE)"), (0, "no clipping")])
def test_what_is_not_equal_is_said(tmp_path: Path, max_grad_norm: float, said: str) -> None:
    settings = settings_of(
        {
            "output_dir": str(tmp_path),
            "seeds": [0],
            "max_grad_norm": max_grad_norm,
            "tasks": {"code": {"kind": "text", "steps": 4, "batch_size": 2}},
            "methods": {"lora": [1e-3], "loraga": [1e-3], "lorarite": [1e-3], "full": [1e-4]},
        }
    )
    store = Store(tmp_path)
    store.write_sweep(settings, [])
    write_report(store, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert r"clip\_unmagnified\_grad=1, update\_skipping=1" in text
    assert said in text and "LoRA-GA sees its first batches once more" in text
