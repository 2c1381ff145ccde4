"""docs/results.md: what benchmarks/results.py makes of a summary."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest

from lorapro_hf.commands.compare.settings import read_settings

ROOT = Path(__file__).parents[2]
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


def rate(name, value, statuses, no_better=()):
    seeds = range(len(statuses))
    return {
        "learning_rate": value,
        "status": {str(seed): status for seed, status in zip(seeds, statuses, strict=True)},
        "keys": {str(seed): f"{name} {value} {seed}" for seed in seeds},
        "no_better": list(no_better),
    }


def row(name, loss, base, full, better):
    return {
        "method": name,
        "title": name.replace("_", " "),
        "learning_rate": RATES[name],
        "at_edge": None,
        "good_range": [RATES[name], 3 * RATES[name]],
        "good_at_edge": [],
        "test": {"loss": {"mean": loss, "std": 0.05}, "accuracy": {"mean": 1 - loss / 2, "std": None}},
        "gap_closed": (base - loss) / (base - full) if base > full else None,
        "against_baseline": None if name == "lora" else {"difference": loss - base, "better": better, "seeds": 3},
        "cost": {"step_ms": 10, "optimizer_ms": 1, "state_bytes": 1000 if "factored" in name else 9000, "trainable": 7},
        "rates": [rate(name, RATES[name], 9 * ["finished"])],
    }


def summary(base=1.0, **losses):
    losses = {"lora": base, "full": 0.5, "pro_full_paper": 0.55, "pro_full_linear": 0.56} | losses
    losses.setdefault("pro_factored_linear", 0.58)
    found = [row(name, loss, base, losses["full"], 3 if loss < base else 0) for name, loss in losses.items()]
    return {
        "settings": {"seeds": [0, 1, 2], "tasks": [{"steps": 12}]},
        "environment": {"machine": "a machine"},
        "comparisons": [
            {
                "task": "some_task",
                "rank": 8,
                "gap": base - losses["full"],
                "gap_seeds": 3 if base > losses["full"] else 0,
                "step_spread": {"rates": 6, "uneven": 0, "largest": 1.1, "best": 1.04, "median": 1.02},
                "methods": found,
            }
        ],
    }


def verdicts(program, content, gap=GAP):
    table = program.targets(content["comparisons"], gap).splitlines()[2:]
    return [line.rstrip(" |").split("| ")[-1] for line in table]


def test_all_targets_met(program):
    assert verdicts(program, summary()) == ["met"] * 11
    assert "some task, r = 8: 90% of 0.500" in program.page({"small": summary()}, summary(), summary(), summary(), GAP)


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
    page = program.page({"small": content}, summary(), summary(), summary(), GAP)
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
    assert all(
        program.summary(name)["missing"] == 0
        for name in [*program.REPORTS, program.WHOLE, program.LIMITS, program.COSTS]
    )


def test_a_run_counts_once_in_however_many_reports_it_is(program):
    (one,) = summary()["comparisons"]
    methods = len(one["methods"])
    said = program.all_runs([{**one, "folder": "small"}, {**one, "folder": "small", "rank": 2}])
    assert said.startswith(f"{9 * methods} runs, of which 0 diverged")
    (other,) = summary()["comparisons"]
    other["methods"][0]["rates"] = [rate("lora", 1, ["diverged", "finished", "missing"], no_better=[1])]
    said = program.all_runs([{**one, "folder": "small"}, {**other, "folder": "limits"}])
    assert said == (
        f"{9 * methods + 3} runs ({9 * (methods - 1)} of them in more than one of the reports), of which 1 diverged, "
        "0 failed, 1 missing; 1 ended no better than they began, by their training loss"
    )
    assert f"in the same order: {9 * methods} runs" in program.page(
        {"small": summary()}, summary(), summary(), summary(), GAP
    )


def test_a_gap_within_the_noise_decides_nothing(program):
    content = summary(full=0.994)
    content["comparisons"][0]["gap_seeds"] = 2
    what, said, word = program.closed(content["comparisons"], "pro_full_paper")
    assert word == "not decided" and "%" not in said
    assert "gap within the noise (0.006, on 2 of 3 seeds), and better than full fine-tuning too (-0.444)" in said
    content = summary(full=0.994, pro_full_paper=1.2)
    content["comparisons"][0]["gap_seeds"] = 2
    assert program.closed(content["comparisons"], "pro_full_paper")[1].endswith("(0.006, on 2 of 3 seeds)")


def test_ranges_of_one_rate_decide_nothing_and_ends_of_the_grid_are_marked(program):
    content = summary()
    rows = {each["method"]: each for each in content["comparisons"][0]["methods"]}
    for name in ("lora", "pro_full_paper"):
        rows[name]["good_range"] = [1e-3, 1e-3]
    what, said, word = program.as_wide(content["comparisons"], "pro_full_paper")
    assert "validation loss" in what and said.endswith("both one rate of the grid") and word == "not decided"
    rows["pro_full_paper"] |= {"good_range": [1e-3, 3e-3], "good_at_edge": ["highest"]}
    assert program.as_wide(content["comparisons"], "pro_full_paper")[1:] == ["some task, r = 8: ×3 ↑ and ×1", "met"]
    rows["pro_full_paper"]["good_range"] = None
    assert program.as_wide(content["comparisons"], "pro_full_paper")[2] == "**missed**"


def test_levels_say_what_a_task_measures(program):
    content = summary()
    assert program.levels(content["comparisons"]) == ""
    content["comparisons"][0]["levels"] = {"untrained": 3.0, "frequencies": 1.5}
    said = program.levels(content["comparisons"])
    assert "some task: untrained 3.000, frequencies 1.500" in said and "little else" not in said
    content["comparisons"][0]["levels"]["frequencies"] = 0.9
    assert "tuned LoRA on some task (0.900 to 1.000)" in program.levels(content["comparisons"])


def test_costs_are_those_of_their_own_report(program):
    idle, busy = summary(), summary()
    idle["comparisons"][0]["methods"][0]["cost"]["step_ms"] = 123
    page = program.page({"small": summary()}, summary(), summary(), idle, GAP)
    assert (
        "| lora | 123 | 1.0 |" in page
        and "nothing else running; from seed to seed the median step of a method differs by up to 4%." in page
    )
    busy["comparisons"][0]["step_spread"] |= {"uneven": 2, "best": 1.6}
    page = program.page({"small": summary()}, summary(), summary(), busy, GAP)
    assert "up to 60%, so that other work was on the machine" in page and "nothing else running" not in page


def test_costs_are_of_every_method_of_small_at_its_best_rate(program):
    found = read_settings(ROOT / "configs" / "compare" / "costs.yaml")
    small = next(each for each in program.summary("small")["comparisons"] if each["task"] == found.tasks[0].name)
    assert [(m.name, list(m.learning_rates)) for m in found.methods] == [
        (row["method"], [row["learning_rate"]]) for row in small["methods"]
    ]
