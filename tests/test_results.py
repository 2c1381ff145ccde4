"""docs/results.md: what benchmarks/results.py makes of a summary."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RATES = {"lora": 1e-2, "full": 1e-3, "pro_full_paper": 1e-3, "pro_full_linear": 3e-3}
RATES |= {"pro_factored_linear": 3e-3, "efficient": 1e-2}
GAP = {"measured": 8, "closer": 8, "measured_steps": 2, "largest_step_error": 2e-6}


@pytest.fixture(scope="module")
def program():
    specification = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    module = sys.modules["results"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    del sys.modules["results"]


def row(name, loss, base, full, better):
    return {
        "method": name,
        "title": name.replace("_", " "),
        "learning_rate": RATES[name],
        "at_edge": None,
        "good_range": [RATES[name], 3 * RATES[name]],
        "test": {"loss": {"mean": loss, "std": 0.05}, "accuracy": {"mean": 1 - loss / 2, "std": None}},
        "gap_closed": (base - loss) / (base - full) if base > full else None,
        "against_baseline": None if name == "lora" else {"difference": loss - base, "better": better, "seeds": 3},
        "cost": {"step_ms": 10, "optimizer_ms": 1, "state_bytes": 1000 if "factored" in name else 9000, "trainable": 7},
        "runs": {"finished": 9, "diverged": 0, "failed": 0, "missing": 0},
    }


def summary(base=1.0, **losses):
    losses = {"lora": base, "full": 0.5, "pro_full_paper": 0.55, "pro_full_linear": 0.56} | losses
    losses.setdefault("pro_factored_linear", 0.58)
    found = [row(name, loss, base, losses["full"], 3 if loss < base else 0) for name, loss in losses.items()]
    return {
        "settings": {"seeds": [0, 1, 2]},
        "environment": {"machine": "a machine"},
        "comparisons": [{"task": "some_task", "rank": 8, "methods": found}],
    }


def verdicts(program, content, gap=GAP):
    table = program.targets(content["comparisons"], gap).splitlines()[2:]
    return [line.rstrip(" |").split("| ")[-1] for line in table]


def test_all_targets_met(program):
    assert verdicts(program, summary()) == ["met"] * 11
    assert "some task, r = 8: 90% of 0.500" in program.page({"small": summary()}, GAP)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"pro_full_paper": 0.65}, [4]),  # 70 % of the gap
        ({"pro_full_paper": 1.1}, [4, 5]),
        ({"pro_factored_linear": 0.62}, [6]),
        ({"full": 1.2}, []),  # no gap to close
    ],
)
def test_each_target_can_be_missed(program, change, missed):
    found = verdicts(program, summary(**change))
    assert [place for place, word in enumerate(found) if "missed" in word] == missed


def test_rates_and_gaps_can_be_missed(program):
    content = summary()
    ours = next(each for each in content["comparisons"][0]["methods"] if each["method"] == "pro_full_linear")
    ours["learning_rate"], ours["good_range"] = 1e-2, [1e-2, 1e-2]
    found = verdicts(program, content, {**GAP, "closer": 7, "largest_step_error": 1e-4})
    assert [place for place, word in enumerate(found) if "missed" in word] == [0, 1, 7, 8]


def test_a_method_that_never_finished_is_shown_and_misses(program):
    content = copy.deepcopy(summary())
    ours = next(each for each in content["comparisons"][0]["methods"] if each["method"] == "pro_full_paper")
    ours |= {"learning_rate": None, "against_baseline": None, "test": {"loss": None}}
    page = program.page({"small": content}, GAP)
    assert "| pro full paper | none finished |" in page
    assert sum("missed" in word for word in verdicts(program, content)) == 4


def test_who_is_better_is_said(program):
    said = program.against_lora(summary(pro_full_paper=1.1)["comparisons"][0])
    assert "on every seed: full (-0.500), pro full linear (-0.440)" in said
    assert "worse on every seed: pro full paper (+0.100)" in said


def test_what_was_not_compared_is_neither_met_nor_missed(program):
    less = summary()
    less["comparisons"][0] |= {"task": "less", "rank": 2}
    less["comparisons"][0]["methods"] = [row for row in less["comparisons"][0]["methods"] if row["method"] in RATES][:2]
    both = {"comparisons": [*summary()["comparisons"], *less["comparisons"]]}
    assert verdicts(program, both) == verdicts(program, summary())
    assert "| pro full paper | 0.550 ± 0.050 (0.001) | – |" in program.losses(both["comparisons"])
    assert "| pro full paper | 72.5% | – |" in program.answers(both["comparisons"])


def test_page_is_up_to_date(program):
    assert program.main(check=True) == 0, "run: python benchmarks/results.py"
    assert [each["missing"] for each in program.summaries().values()] == [0] * len(program.REPORTS)


def test_runs_of_full_fine_tuning_count_once_for_all_ranks(program):
    (one,) = summary()["comparisons"]
    one["folder"] = "small"
    counts = program.run_counts([one, {**one, "rank": 2}, {**one, "task": "other"}])
    assert sum(each["finished"] for each in counts) == 9 * (3 * len(one["methods"]) - 1)
