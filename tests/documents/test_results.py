"""docs/results.md: the page that benchmarks/results.py makes of summaries."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lorapro_hf.commands.compare.settings import read_settings

ROOT = Path(__file__).parents[2]
RATES = {"lora": 1e-2, "full": 1e-3, "pro_full_paper": 1e-3, "pro_full_linear": 3e-3, "pro_factored_linear": 3e-3}
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


def row(name, loss, base, full):
    better = 3 if loss < base else 0
    return {
        "method": name,
        "title": name.replace("_", " "),
        "learning_rate": RATES[name],
        "at_edge": None,
        "test": {"loss": {"mean": loss, "std": 0.05}, "accuracy": {"mean": 1 - loss / 2, "std": None}},
        "gap_closed": (base - loss) / (base - full) if base > full else None,
        "against_baseline": None if name == "lora" else {"difference": loss - base, "better": better, "seeds": 3},
        "cost": {"step_ms": 10, "optimizer_ms": 1, "state_bytes": 9000, "trainable": 7},
        "rates": [rate(name, RATES[name], 9 * ["finished"])],
    }


def summary(**losses):
    losses = {"lora": 1.0, "full": 0.5, "pro_full_paper": 1.1, "pro_full_linear": 0.56} | losses
    return {
        "settings": {"seeds": [0, 1, 2], "tasks": [{"steps": 12}]},
        "environment": {"machine": "a machine"},
        "comparisons": [
            {
                "task": "some_task",
                "rank": 8,
                "gap": 1.0 - losses["full"],
                "gap_seeds": 3 if losses["full"] < 1 else 0,
                "levels": None,
                "step_spread": {"rates": 6, "uneven": 0, "largest": 1.1, "best": 1.04},
                "methods": [row(name, loss, 1.0, losses["full"]) for name, loss in losses.items()],
            }
        ],
    }


def made(program, **changed):
    names = (*program.MAIN, program.WHOLE, program.LIMITS, program.COSTS, program.NEIGHBOURS)
    return program.page({**{name: summary() for name in names}, **changed}, GAP)


def test_losses_say_who_is_better_than_lora_and_which_rates_end_their_grid(program):
    content = summary()
    content["comparisons"][0]["methods"][2]["at_edge"] = "highest"
    page = made(program, small=content)
    assert "| pro full paper | *1.100±0.050* (0.001 ↑) |" in page and "| lora | 1.000±0.050 (0.01) |" in page
    assert "| pro full linear | **0.560±0.050** (0.003) |" in page


def test_a_method_that_never_finished_is_shown_and_one_that_is_not_compared_is_not(program):
    content, less = summary(), summary()
    content["comparisons"][0]["methods"][2] |= {"learning_rate": None, "against_baseline": None, "test": {}}
    del less["comparisons"][0]["methods"][2]
    comparisons = [*content["comparisons"], *less["comparisons"]]
    assert "| pro full paper | none finished | – |" in program.by_method(comparisons, {"": program.loss})
    assert "| pro full linear | 72.0% | 72.0% |" in program.answers(comparisons)
    assert "| pro full paper | none finished |" in made(program, small=content)


def test_a_gap_is_closed_only_where_every_seed_shows_one(program):
    assert "| pro full linear | 88% |" in program.closed(summary()["comparisons"])
    noisy = summary()["comparisons"]
    noisy[0]["gap_seeds"] = 2
    assert "| pro full linear | noise |" in program.closed(noisy)
    assert "| pro full linear | no gap |" in program.closed(summary(full=1.2)["comparisons"])
    assert "| pro_factored_linear | – |" in program.closed(summary()["comparisons"])


def test_a_run_counts_once_in_however_many_comparisons_it_is(program):
    one, other = summary(), summary()
    methods = len(one["comparisons"][0]["methods"])
    assert program.all_runs({"small": one}).startswith(f"{9 * methods} runs, of which 0 diverged")
    other["comparisons"][0]["methods"][0]["rates"] = [rate("lora", 1, ["diverged", "finished", "missing"], [1])]
    assert program.all_runs({"small": one, "limits": other}) == (
        f"{9 * methods + 3} runs ({9 * (methods - 1)} of them in more than one comparison), of which 1 diverged, "
        "0 failed, 1 missing; 1 ended no better than they began, by their training loss"
    )


def test_reference_losses_say_what_a_task_measures(program):
    comparisons = summary()["comparisons"]
    comparisons[0]["levels"] = {"untrained": 3.0, "frequencies": 1.5}
    said = program.references(comparisons)
    assert "| some task | 3.000 | 1.500 |" in said and "little else" not in said
    comparisons[0]["levels"]["frequencies"] = 0.9
    assert "beats tuned LoRA on some task (0.900 to 1.000)" in program.references(comparisons)


def test_costs_are_those_of_their_own_comparison(program):
    idle, busy = summary(), summary()
    idle["comparisons"][0]["methods"][0]["cost"]["step_ms"] = 123
    page = made(program, costs=idle)
    assert "| lora | 123 | 1.0 |" in page and "differs by up to 4%. [Memory" in page
    busy["comparisons"][0]["step_spread"] |= {"uneven": 2, "best": 1.6}
    assert "up to 60%: other work was on the machine" in made(program, costs=busy)


def test_a_taken_summary_has_fewer_digits_and_the_figures_of_the_page(program, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "DOCS", tmp_path / "docs")
    settings = {"output_dir": str(tmp_path / "elsewhere")}
    content = {"settings": settings, "losses": [1.23456789, 2e-12 / 3], "seed": 1234567, "none": None}
    for name in ("small", "long"):
        run = tmp_path / "runs" / f"compare-{name}"
        (run / "figures").mkdir(parents=True)
        for figure in ("cost.png", *program.FIGURES):
            (run / "figures" / figure).write_text(figure)
        (run / "summary.json").write_text(json.dumps(content))
        program.take(name)
        expected = {"settings": {"output_dir": f"runs/compare-{name}"}, "losses": [1.23457, 6.66667e-13]}
        assert program.summary(name) == content | expected
    kept = sorted(path.name for path in (tmp_path / "docs").rglob("*.png"))
    assert kept == ["loss.png", "rates.png"]


def test_page_is_up_to_date(program):
    assert program.main(check=True) == 0, "run: python benchmarks/results.py"
    names = [*program.MAIN, program.WHOLE, program.LIMITS, program.COSTS, program.NEIGHBOURS]
    found = {name: program.summary(name) for name in names}
    assert all(each["missing"] == 0 for each in found.values())
    assert {name: each["settings"]["output_dir"] for name, each in found.items()} == {
        name: f"runs/compare-{name}" for name in names
    }


def test_costs_are_of_every_method_of_small_at_its_best_rate(program):
    found = read_settings(ROOT / "configs" / "compare" / "costs.yaml")
    small = next(each for each in program.summary("small")["comparisons"] if each["task"] == found.tasks[0].name)
    assert [(m.name, list(m.learning_rates)) for m in found.methods] == [
        (row["method"], [row["learning_rate"]]) for row in small["methods"]
    ]


def test_neighbours_are_shown_with_both_optimizers(program):
    content = summary()
    for number, name in enumerate(("mgpo", "pro_mgpo")):
        added = {**row("lora", 0.5 + number, 1.0, 0.4), "method": name, "title": name.replace("_", " ")}
        content["comparisons"][0]["methods"].append(added)
    page = made(program, neighbours=content)
    assert "| mgpo | 0.500 (0.01) | 1.500 (0.01) |" in page and "| lora | 1.000 (0.01) | 0.560 (0.003) |" in page
    assert "| full | " in page and "| pro mgpo |" not in page.split("## Methods beside LoRA-Pro")[1]
