"""What a comparison shows: best rates, gaps, significance, figures and the report, from records made up here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from comparison_helpers import TINY, record_of, runs_of, settings
from lorapro_hf.commands.compare import report
from lorapro_hf.commands.compare.command import _report as report_on
from lorapro_hf.commands.compare.figures import View
from lorapro_hf.commands.compare.findings import sentences
from lorapro_hf.commands.compare.plan import content_of, plan
from lorapro_hf.commands.compare.report import write_report
from lorapro_hf.commands.compare.settings import KINDS
from lorapro_hf.commands.compare.significance import estimate, holm, paired, paired_with, verdict
from lorapro_hf.commands.compare.store import RunRecord, Store
from lorapro_hf.commands.compare.summary import MethodSummary, StepSpread, TaskSummary, summarize
from lorapro_hf.commands.compare.tables import shown, spread
from lorapro_hf.options import UsageError

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
    chosen = settings(folder, seeds=list(seeds), methods=dict.fromkeys(LOSSES, GRID), tasks={"t": task})
    folder.mkdir(exist_ok=True, parents=True)
    store = Store(folder)
    runs = runs_of(chosen)
    store.write_sweep(content_of(chosen, plan(chosen)))
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
            store.append(RunRecord(**changed))
    return store


@pytest.fixture(autouse=True)
def _figures_only_where_they_matter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time."""
    if "figure" not in request.node.name:
        monkeypatch.setattr(report, "draw", lambda summary: {})


def compared(store: Store) -> TaskSummary:
    (comparison,) = summarize(store).comparisons
    return comparison


def of(store: Store, name: str) -> MethodSummary:
    return next(each for each in compared(store).methods if each.method == name)


def text_of(store: Store) -> str:
    write_report(store.folder)
    return (store.folder / "report.md").read_text()


def diverged(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "status": "diverged", "diverged_at": 2, "scores": None, "losses": [3.0, None]}


def test_each_method_has_its_own_best_rate(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    methods = {each.method: each for each in compared(store).methods}
    assert {name: each.learning_rate for name, each in methods.items()} == {
        "lora": 3e-4,
        "pro_full_linear": 1e-4,
        "full": 3e-4,
    }
    assert {name: each.at_edge for name, each in methods.items() if each.at_edge} == {"pro_full_linear": "lowest"}
    assert "| LoRA-Pro full, linear | 0.0001 ↓ | **1.1500 ± 0.0058** |" in text_of(store)


def test_validation_chooses_and_the_test_set_reports(tmp_path: Path) -> None:
    def contradict(record: dict[str, Any]) -> dict[str, Any]:
        record["scores"]["test"]["loss"] = -record["scores"]["validation"]["loss"]
        return record

    method = of(made_up(tmp_path, contradict), "lora")
    assert method.learning_rate == 3e-4 and method.best is not None
    assert method.best.test["loss"] == pytest.approx({"0": -1.2, "1": -1.21, "2": -1.22})
    assert (method.test["loss"].mean, method.test["loss"].error) == pytest.approx((-1.21, 0.01 / 3**0.5))
    assert method.loss_curve == pytest.approx([3.0, 2.5, 2.0, 1.21])


def test_gap_closed(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    assert compared(store).gap == pytest.approx(0.2) and compared(store).gap_seeds == 3
    assert of(store, "pro_full_linear").gap_closed == pytest.approx((1.2 - 1.04) / 0.2)
    text = text_of(store)
    assert re.search(r"\| LoRA-Pro full, linear \|.*\| 80% \|", text) and "| -0.1600 ± 0.0000 | 3/3 |" in text


def test_methods_are_judged_at_their_begin_and_their_end(tmp_path: Path) -> None:
    def shape(record: dict[str, Any]) -> dict[str, Any]:
        begin = {"lora": 3.0, "pro_full_linear": 2.0, "full": 2.0}[record["method"]] + 0.1 * (record["seed"] % 2)
        noise = 0.001 * record["seed"] if record["method"] == "full" else 0.0
        return {**record, "losses": [begin + noise, 1.5, 1.4, 1.3]}

    store = made_up(tmp_path, shape)
    ours, full = of(store, "pro_full_linear"), of(store, "full")
    assert ours.early is not None and ours.early.mean == pytest.approx(2.0 + 0.1 / 3)
    assert ours.early_against_baseline is not None and ours.early_against_baseline.difference == pytest.approx(-1.0)
    assert ours.early_against_reference is not None
    assert ours.early_against_reference.difference == pytest.approx(-0.001)
    assert full.early_against_reference is None and of(store, "lora").early_against_baseline is None
    assert ours.steps_to_baseline["half"].mean == pytest.approx(0.5) and ours.steps_to_baseline["end"].reached == 3
    assert ours.good_rates is not None and ours.good_rates.open == ["lowest"]
    verdicts = compared(store).verdicts
    assert {name: each.better for name, each in verdicts.items()} == {
        "loss": ["pro_full_linear", "full"],
        "early": ["pro_full_linear", "full"],
    }


def test_each_number_of_steps_is_a_comparison(tmp_path: Path) -> None:
    chosen = settings(tmp_path, tasks={"tiny": {**TINY, "ranks": [2, 4], "steps": [5, 3]}})
    store = Store(tmp_path)
    store.write_sweep(content_of(chosen, plan(chosen)))
    for run in runs_of(chosen):
        store.append(record_of(run, losses=[float(run.steps)] * 2))
    shown = [(each.rank, each.steps, [m.loss_curve for m in each.methods]) for each in summarize(store).comparisons]
    assert shown == [(rank, steps, 2 * [2 * [float(steps)]]) for rank in (2, 4) for steps in (5, 3)]


def test_without_a_gap_none_is_closed(tmp_path: Path) -> None:
    def spoil(record: dict[str, Any]) -> dict[str, Any]:
        if record["method"] == "full":
            record["scores"]["test"]["loss"] += 1
        return record

    store = made_up(tmp_path, spoil)
    assert of(store, "pro_full_linear").gap_closed is None
    text = text_of(store)
    assert "nothing to close" in text and "| gap closed |" not in text


def test_a_rate_at_which_a_seed_diverged_is_no_candidate(tmp_path: Path) -> None:
    def spoil(record: dict[str, Any]) -> dict[str, Any]:
        worst = (record["method"], record["learning_rate"], record["seed"]) == ("lora", 3e-4, 1)
        return diverged(record) if worst else record

    store = made_up(tmp_path, spoil)
    assert of(store, "lora").learning_rate == 1e-3
    assert of(store, "lora").runs == {"finished": 8, "diverged": 1, "failed": 0, "missing": 0}
    text = text_of(store)
    assert "| 1/9 |" in text and "loss not finite at step 2" in text and "retry_failed" not in text
    assert "| LoRA (AdamW) | 0.0003 | – | 1.3000, diverged, 1.3200 |" in text


def test_a_method_without_a_finished_rate_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(record: dict[str, Any]) -> dict[str, Any]:
        if record["method"] != "pro_full_linear":
            return record
        return {**record, "status": "failed", "error": "OutOfMemoryError: <no> | room", "scores": None}

    store = made_up(tmp_path, spoil)
    method = of(store, "pro_full_linear")
    assert method.learning_rate is None and method.runs["failed"] == 9
    assert report_on(tmp_path, as_json=False) == 1
    assert (
        "No learning rate at which all seeds finished: t r=4, 4 steps: LoRA-Pro full, linear" in capsys.readouterr().err
    )
    text = (tmp_path / "report.md").read_text()
    assert "| LoRA-Pro full, linear | none finished |" in text and "--retry_failed" in text
    assert text.count(r"OutOfMemoryError: \<no\> \| room") == 9


def test_runs_to_come_are_counted_not_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = made_up(tmp_path, lambda record: None if record["seed"] == 2 else record)
    assert summarize(store).missing == 9
    assert "9 runs are still to come" in text_of(store)
    assert all(method.learning_rate is None for method in compared(store).methods)
    assert report_on(tmp_path, as_json=False) == 0
    assert "No learning rate" not in capsys.readouterr().err


def blown_up(*where: tuple[str, float]) -> Change:
    """Runs of some methods and rates, of the first seed, end no better than they began, at the lowest loss."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if (record["method"], record["learning_rate"]) in where and record["seed"] == 0:
            record["losses"] = [3.0, 9.0, 4.0, 3.0]
            record["scores"]["validation"]["loss"] = 0.5
        return record

    return change


def test_a_rate_that_blew_up_is_not_the_best(tmp_path: Path) -> None:
    store = made_up(tmp_path, blown_up(("lora", 1e-3)))
    method = of(store, "lora")
    assert method.learning_rate == 3e-4
    assert method.no_better == 1 and method.rates[2].no_better == [0]
    text = text_of(store)
    assert "| 0 | 1/9 |" in text and "| 1.4000 †, 1.4100, 1.4200 |" in text
    everywhere = of(made_up(tmp_path / "all", blown_up(*(("lora", rate) for rate in GRID))), "lora")
    assert (everywhere.learning_rate, everywhere.no_better) == (3e-4, 3)


def test_reference_losses_are_shown_where_they_are_noted(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    assert compared(store).levels is None and "Reference losses" not in text_of(store)
    sweep = {**store.sweep(), "levels": {"t": {"untrained": 3.25, "frequencies": 2.5}}}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert "3.2500 of the untrained model, 2.5000 of a unigram model" in text_of(store)


def test_uneven_step_times_are_told(tmp_path: Path) -> None:
    def slow(record: dict[str, Any]) -> dict[str, Any]:
        busy = (record["method"], record["learning_rate"], record["seed"]) == ("lora", 3e-4, 1)
        return {**record, "step_ms": 13.0 if busy else 10.0}

    assert "Do not compare the times" not in text_of(made_up(tmp_path / "even"))
    store = made_up(tmp_path, slow)
    assert "at 1 of 9 rates the median step" in text_of(store)
    assert "the time of LoRA (AdamW), and" not in text_of(store)  # figures of no worth
    assert compared(store).step_spread == StepSpread(9, 1, pytest.approx(1.3), pytest.approx(1.3))


def test_unequal_data_are_noticed(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    assert compared(store).equal_data and "WARNING" not in text_of(store)
    store = made_up(tmp_path / "other", lambda record: {**record, "data": record["method"]})
    assert not compared(store).equal_data and "those of a seed the same batches" in text_of(store)
    assert not compared(made_up(tmp_path / "sets", lambda r: {**r, "examples": r["method"]})).equal_data


def test_records_of_another_comparison_do_not_count(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    before = summarize(store)
    store.append(RunRecord("of another", "t", 4, 4, "lora", 1e-3, 0, status="finished"))
    assert summarize(store) == before


def test_methods_that_share_a_run_show_it_alike(tmp_path: Path) -> None:
    methods = {"lora": [1e-3], "mine": {"like": "lora", "learning_rates": [1e-3]}}
    chosen, store = settings(tmp_path, methods=methods), Store(tmp_path)
    runs = runs_of(chosen)
    store.write_sweep(content_of(chosen, plan(chosen)))
    store.append(record_of(runs[0]))
    assert len({run.key for run in runs}) == 1 and summarize(store).missing == 0
    assert [(each.method, each.learning_rate) for each in compared(store).methods] == [("lora", 1e-3), ("mine", 1e-3)]


# Significance


def by_seed(*values: float) -> dict[str, float]:
    return {str(seed): value for seed, value in enumerate(values)}


def test_paired_tests_are_those_of_scipy() -> None:
    own, others = [1.0, 1.1, 0.9, 1.3, 1.05], [1.2, 1.15, 1.0, 1.25, 1.3]
    result = paired({**by_seed(*own), "7": 9.0}, by_seed(*others))  # a seed without its like does not count
    assert result is not None and (result.seeds, result.better) == (5, 4)
    assert result.difference == pytest.approx(-0.11)
    assert result.t_test == pytest.approx(stats.ttest_rel(own, others).pvalue)
    assert result.error == pytest.approx(stats.sem([a - b for a, b in zip(own, others, strict=True)]))


def test_without_differences_nothing_is_claimed() -> None:
    same = paired(by_seed(1.0, 2.0), by_seed(1.0, 2.0))
    assert same is not None and (same.t_test, same.better) == (None, 0)
    constant = paired(by_seed(1.0, 2.0), by_seed(2.0, 3.0))
    assert constant is not None and constant.t_test is None and constant.better == 2
    assert paired({}, {}) is None


def test_a_verdict_takes_two_standard_errors_of_the_paired_difference() -> None:
    base = by_seed(1.0, 2.0, 3.0)
    figures = {"base": base, "better": by_seed(0.8, 1.9, 2.7), "level": by_seed(0.6, 1.9, 3.1)}
    figures |= {"worse": by_seed(1.3, 2.1, 3.2), "once": {"0": 0.0}, "always": by_seed(0.5, 1.5, 2.5)}
    found = verdict(paired_with("base", figures))
    assert (found.better, found.level, found.worse) == (["better", "always"], ["level"], ["worse"])


def test_holm_corrects_in_order() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


# The report


def test_the_report_is_made_of_the_folder_alone(tmp_path: Path) -> None:
    store = made_up(tmp_path / "runs")
    text = text_of(store)
    first = json.loads((tmp_path / "runs" / "summary.json").read_text())
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    assert text_of(Store(moved)) == text and json.loads((moved / "summary.json").read_text()) == first
    assert text.count("| LoRA-Pro full, linear |") == 6
    assert "1.3100 ± 0.0058" in text
    with pytest.raises(UsageError, match="no comparison"):
        write_report(tmp_path)


@pytest.mark.slow
def test_figures_are_at_most_four_and_survive_empty_and_odd_records(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    sweep = store.sweep()
    sweep["methods"]["lora"]["title"] = r"LoRA $\frac$ for $5"  # no formula
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    names = re.findall(r"\]\((figures/[^)]+)\)", text_of(store))
    assert sorted(names) == [f"figures/t-{name}.png" for name in ("cost", "loss", "methods", "rates")]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    write_report(made_up(tmp_path / "none", diverged).folder)
    assert {path.name for path in (tmp_path / "none" / "figures").iterdir()} == {"t-rates.png"}  # the crosses
    write_report(made_up(tmp_path / "empty", lambda record: None).folder)
    assert not list((tmp_path / "empty" / "figures").iterdir())


def test_the_report_opens_with_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = made_up(tmp_path)
    assert report_on(tmp_path, as_json=False) == 0
    printed = " ".join(capsys.readouterr().out.split())
    first, second, third = sentences(summarize(store))
    assert first == (
        "By more than two standard errors of the final test loss, LoRA (AdamW) is beaten by "
        "LoRA-Pro full linear; it beats no method."
    )
    assert "LoRA-Pro full, linear has the lowest final loss: 1.04 times that of full fine-tuning" in second
    assert "1.00 times in the first quarter" in second and "(LoRA (AdamW): 1.18 times and 1.00 times)" in second
    assert third.endswith("takes 1.00 times the time of LoRA (AdamW), and its optimizer keeps 3.75 times the state.")
    assert (tmp_path / "report.md").read_text().startswith(f"# Comparison of methods\n\n{first}")
    assert "0.0003 1.3100" in printed and "better" not in printed and second in printed


def test_several_cells_have_an_overview(tmp_path: Path) -> None:
    tasks = {"tiny": {**TINY, "ranks": [2, 4], "steps": [5, 3]}}
    chosen = settings(tmp_path, seeds=[0, 1], tasks=tasks, methods={"lora": [1e-2], "loraplus": [1e-2]})
    store = Store(tmp_path)
    store.write_sweep(content_of(chosen, plan(chosen)))
    for run in runs_of(chosen):
        worse = run.method.name == "loraplus" and run.steps == 3
        loss = {"loss": 2.0 if worse else 1.0 - 0.5 * (run.method.name == "loraplus") + 0.01 * run.seed}
        store.append(record_of(run, scores={"validation": loss, "test": loss}, state_bytes=100))
    summary = summarize(store)
    assert [grid.rows for grid in shown(summary)] == [
        [
            ["LoRA+", "2, 0, 2", "×1.00", "×1.00", "–", "–", "×1.00"],
            ["LoRA (AdamW)", "–", "×1.00", "×1.00", "–", "–", "×1.00"],
        ]
    ]
    first, state = sentences(summary)
    assert state == "The optimizer of LoRA+ keeps 1.00 times the state of LoRA (AdamW)."
    assert "over 4 cells" in first and "is beaten by LoRA+ (2 of 4 cells); it beats LoRA+ (2 of 4 cells)" in first
    assert "## All cells" in text_of(store)


def test_a_gap_within_the_noise_is_not_shared_out(tmp_path: Path) -> None:
    def blur(record: dict[str, Any]) -> dict[str, Any]:
        if record["method"] == "full":
            record["scores"]["test"]["loss"] = 1.3 + 0.3 * (record["seed"] - 1.1)
        return record

    store = made_up(tmp_path, blur)
    assert compared(store).gap == pytest.approx(0.04)
    text = text_of(store)
    assert "within two standard errors, so no share" in text and "| gap closed |" not in text


def test_digits_follow_the_standard_error() -> None:
    assert spread(estimate({"0": 1.0, "1": 1.1})) == "1.050 ± 0.050"
    assert spread(estimate({"0": 12.0, "1": 52.0})) == "32.00 ± 20.00"
    assert spread(estimate({"0": 1.0})) == "1.0000" and spread(None) == "–"


def test_a_figure_highlights_a_dozen_methods_at_most(tmp_path: Path) -> None:
    summary = summarize(made_up(tmp_path))
    (cell,) = summary.comparisons
    cell.methods += [replace(cell.methods[1], method=f"ours {number}") for number in range(12)]
    cell.methods += [replace(cell.methods[0], method=f"peer {number}") for number in range(12)]
    view = View([cell], "lora", "full", [f"ours {number}" for number in range(12)] + ["pro_full_linear"])
    colors = [style["color"] for style in view.styles().values()]
    assert len(colors) == 27 and sum(color != colors[-1] for color in colors) == 8


def test_numbers_of_one_seed_have_no_spread(tmp_path: Path) -> None:
    method = of(made_up(tmp_path, seeds=(0,)), "pro_full_linear")
    assert (method.test["loss"].mean, method.test["loss"].error) == (pytest.approx(1.14), None)
    assert method.against_baseline is not None and method.against_baseline.t_test is None


def test_every_kind_of_task_is_described(tmp_path: Path) -> None:
    chosen = settings(tmp_path, tasks={kind: {"kind": kind} for kind in KINDS})
    Store(tmp_path).write_sweep(content_of(chosen, []))
    assert text_of(Store(tmp_path)).count("100 steps of") == len(KINDS)


@pytest.mark.parametrize(
    ("max_grad_norm", "said"),
    [(1.0, "(those of a classifier apart, those of LoRA-RITE not at all)"), (0, "no clipping")],
)
def test_unequal_treatment_is_said(tmp_path: Path, max_grad_norm: float, said: str) -> None:
    methods = {"lora": [1e-3], "loraga": [1e-3], "lorarite": [1e-3], "full": [1e-4]}
    tasks = {"code": {"kind": "text", "steps": 4, "batch_size": 2}}
    chosen = settings(tmp_path, methods=methods, tasks=tasks, max_grad_norm=max_grad_norm)
    Store(tmp_path).write_sweep(content_of(chosen, []))
    text = text_of(Store(tmp_path))
    assert r"clip\_unmagnified\_grad=1, update\_skipping=1" in text
    assert said in text and "LoRA-GA sees its first batches once more" in text
