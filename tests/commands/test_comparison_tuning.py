"""How `lorapro compare` tunes a method: the stages, on loss curves made up here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from comparison_helpers import TINY, record_of, settings, sweep_of
from lorapro_hf.commands.compare import sweep as sweep_module
from lorapro_hf.commands.compare.plan import Cell, next_runs, plan
from lorapro_hf.commands.compare.store import RECORDS, Store
from lorapro_hf.commands.compare.summary import summarize
from lorapro_hf.commands.compare.tuning import EXTENSIONS, Procedure, Score, Trial, Tuning, grid_around, tune

GRID = grid_around(1e-2)
SEEDS = Procedure((0, 1, 2), (100, 101))
Loss = Callable[[float, int], float]


def valley(bottom: float) -> Loss:
    """Losses that are least at one rate, however far it is."""
    return lambda rate, seed: math.log10(rate / bottom) ** 2 + 1e-3 * seed


def stages(loss: Loss, grid: tuple[float, ...] = GRID, procedure: Procedure = SEEDS) -> Iterator[Tuning]:
    """The states of a tuning whose runs end as `loss` says, one run at a time."""
    done: dict[Trial, Score] = {}
    while True:
        state = tune(grid, procedure, done.get)
        assert state.done == len(done) and not done.keys() & set(state.todo)
        yield state
        if not state.todo:
            return
        found = loss(*state.todo[0])
        done[state.todo[0]] = Score(math.isinf(found), found)


def last(loss: Loss, **more: Any) -> Tuning:
    return list(stages(loss, **more))[-1]


def trials(loss: Loss, **more: Any) -> list[Trial]:
    return [state.todo[0] for state in stages(loss, **more) if state.todo]


def test_a_grid_has_three_rates_a_factor_of_the_root_of_ten_apart() -> None:
    assert GRID == (3.16e-3, 1e-2, 3.16e-2)


def test_stages_are_grid_then_halves_then_the_seeds_at_the_best_rate() -> None:
    found = trials(valley(1.1e-2))
    halves = [5.62e-3, 1.78e-2]
    assert found[:6] == [Trial(rate, seed) for seed in (100, 101) for rate in GRID]
    assert found[6:10] == [Trial(rate, seed) for seed in (100, 101) for rate in halves]
    assert found[10:] == [Trial(1e-2, seed) for seed in (0, 1, 2)]
    state = last(valley(1.1e-2))
    assert (state.best, state.at_edge, state.rates) == (1e-2, None, (3.16e-3, 5.62e-3, 1e-2, 1.78e-2, 3.16e-2))


def test_refined_rates_may_be_the_best() -> None:
    assert last(valley(1.7e-2)).best == 1.78e-2


def test_later_runs_are_counted_from_below() -> None:
    states = list(stages(valley(1e-2)))
    assert {state.done + len(state.todo) + state.later for state in states} == {6 + 4 + 3}


@pytest.mark.parametrize(
    ("bottom", "rates"),
    [(1e-1, (3.16e-3, 1e-2, 3.16e-2, 0.1, 0.316)), (1e-3, (3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2))],
)
def test_a_best_rate_at_an_edge_gets_a_neighbour(bottom: float, rates: tuple[float, ...]) -> None:
    state = last(valley(bottom))
    assert state.best == bottom and state.at_edge is None
    assert set(rates) < set(state.rates) and len(state.rates) == len(rates) + 2
    assert len(trials(valley(bottom))) == 2 * len(state.rates) + 3  # no run twice


def test_rounded_grids_are_extended_in_their_manner() -> None:
    assert last(valley(1e-1), grid=(1e-3, 3e-3, 1e-2)).rates[-3:] == (0.1, 0.173, 0.3)
    assert last(valley(1e-4), grid=(3e-4, 1e-3)).rates[:3] == (3e-5, 5.48e-5, 1e-4)
    assert last(valley(1e-1), grid=(1e-3, 2e-2)).rates[-2:] == (0.112, 0.2)


@pytest.mark.parametrize(("bottom", "edge"), [(1e3, "highest"), (1e-9, "lowest")])
def test_extensions_end_and_the_edge_is_told(bottom: float, edge: str) -> None:
    state = last(valley(bottom))
    assert state.at_edge == edge and len(state.rates) == 3 + EXTENSIONS + 1  # one half, on the inner side


def test_of_equal_rates_the_lowest_is_the_best() -> None:
    level = last(lambda rate, seed: 1.0 if 3e-3 < rate < 4e-2 else 2.0)
    assert level.best == 3.16e-3 and level.at_edge is None


def test_rates_that_fail_are_no_candidates_and_the_grid_moves_down() -> None:
    state = last(lambda rate, seed: math.inf if rate > 2e-3 else valley(1e-2)(rate, seed))
    assert state.best == 1.78e-3 and state.at_edge is None  # rates above diverge
    one_seed = last(lambda rate, seed: math.inf if (rate, seed) == (1e-2, 101) else valley(1e-2)(rate, seed))
    assert one_seed.best == 1.78e-2


def test_a_method_whose_rates_all_fail_has_none() -> None:
    state = last(lambda rate, seed: math.inf)
    assert (state.best, state.todo, len(state.rates)) == (None, (), 3 + EXTENSIONS)


def test_a_reported_seed_that_fails_leaves_the_next_best_rate() -> None:
    state = last(lambda rate, seed: math.inf if (rate, seed) == (1e-2, 2) else valley(1.01e-2)(rate, seed))
    assert state.best == 1.78e-2


def test_a_run_that_ended_no_better_than_it_began_loses_to_all_that_did() -> None:
    def score(trial: Trial) -> Score:
        return Score(trial.learning_rate == 1e-2, 0.1 if trial.learning_rate == 1e-2 else 1.0)

    assert tune(GRID, Procedure((0,)), score).best == 3.16e-3
    assert tune((1e-2,), Procedure((0,)), score).best == 1e-2


def test_without_tuning_seeds_all_rates_run_under_all_seeds() -> None:
    plain = Procedure((0, 1))
    assert trials(valley(1e-2), procedure=plain) == [Trial(rate, seed) for seed in (0, 1) for rate in GRID]
    assert last(valley(1.0), procedure=plain).at_edge == "highest"
    assert trials(valley(1.0), grid=(1e-2,)) == [Trial(1e-2, seed) for seed in (0, 1, 2)]  # a rate that is given


# Stopped and shared comparisons


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """The trials from now on, none of them in earnest: at an edge of the grid, then inside."""
    found: list[Trial] = []

    def pretend(task: Any, run: Any, *rest: Any) -> Any:
        trial = Trial(run.learning_rate, run.seed)
        found.append(trial)
        loss = valley(4e-2)(*trial)
        return record_of(run, scores={"validation": {"loss": loss}, "test": {"loss": loss}})

    monkeypatch.setattr(sweep_module, "train_run", pretend)
    monkeypatch.setattr(sweep_module, "load_task", lambda task: type("Loaded", (), {"settings": task})())
    monkeypatch.setattr(sweep_module, "reference_losses", lambda *_: {})
    return found


def tuned(folder: Path, **more: Any) -> Any:
    return settings(folder, **{"seeds": [0, 1, 2], "tuning_seeds": [100, 101], "methods": {"lora": 1e-2}, **more})


def test_a_comparison_that_stops_in_any_stage_goes_on(tmp_path: Path, trained: list[Trial]) -> None:
    sweep_of(tuned(tmp_path / "whole")).run()
    whole, lines = list(trained), (tmp_path / "whole" / RECORDS).read_text().splitlines()
    for place in range(len(lines) + 1):  # after each run
        trained.clear()
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / RECORDS).write_text("".join(f"{line}\n" for line in lines[:place]))
        sweep_of(tuned(folder)).run()
        assert trained == whole[place:]
    (comparison,) = summarize(Store(tmp_path / "whole")).comparisons
    (method,) = comparison.methods
    assert method.learning_rate == whole[-1].learning_rate == 3.16e-2 and method.test["loss"].by_seed.keys() == {
        "0",
        "1",
        "2",
    }
    assert [len(rate.status) for rate in method.rates] == [2, 2, 2, 5, 2, 2]


def test_a_summary_of_a_tuning_that_goes_on(tmp_path: Path, trained: list[Trial]) -> None:
    sweep_of(tuned(tmp_path)).run()
    lines = (tmp_path / RECORDS).read_text().splitlines()
    (tmp_path / RECORDS).write_text("\n".join(lines[:3]) + "\n")
    summary = summarize(Store(tmp_path))
    (method,) = summary.comparisons[0].methods
    assert method.learning_rate is None and method.runs == {"finished": 3, "diverged": 0, "failed": 0, "missing": 10}
    assert summary.missing == 10


def test_next_runs_are_those_of_the_cell(tmp_path: Path) -> None:
    (cell,) = plan(tuned(tmp_path, tasks={"t": TINY}))
    assert isinstance(cell, Cell)
    runs = next_runs(cell, {})
    assert [(run.learning_rate, run.seed) for run in runs] == [(rate, seed) for seed in (100, 101) for rate in GRID]
    scores = {run.key: Score(False, 1.0) for run in runs[:-1]}
    assert next_runs(cell, scores) == runs[-1:] and len({run.key for run in runs}) == 6
