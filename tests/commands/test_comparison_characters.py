"""`lorapro compare`: the puzzles in characters, and the models that are pretrained here."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from torch import nn
from torch.nn.functional import cross_entropy

from comparison_helpers import content, run_all, settings
from lorapro_hf.commands.compare.settings import settings_of
from lorapro_hf.commands.compare.tasks import pretrained as pretraining
from lorapro_hf.commands.compare.tasks.base import LoadedTask, Rows, next_tokens
from lorapro_hf.commands.compare.tasks.characters import CHARACTERS, HELD_OUT, LEARNED, LENGTH, PRETRAINING
from lorapro_hf.commands.compare.tasks.kinds import load_task
from lorapro_hf.commands.compare.tasks.pretrained import pretrained
from lorapro_hf.options import UsageError

SMALL: dict[str, Any] = {
    **{"kind": "characters", "width": 16, "layers": 1, "pretraining_steps": 2, "steps": 3, "batch_size": 4},
    **{"validation_size": 20, "test_size": 30, "ranks": [2]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pretraining.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lorapro_hf"


def loaded(**more: Any) -> LoadedTask:
    return load_task(settings_of(content(tasks={"t": {**SMALL, **more}})).tasks[0])


def pairs(rows: Any) -> list[tuple[str, str]]:
    """Question and answer of each row, from its tokens and labels."""
    found = []
    for row in rows:
        text = "".join(CHARACTERS[token] for token in row["input_ids"].tolist())
        counts = row["labels"] != -100
        assert torch.equal(row["labels"][counts], row["input_ids"][counts])
        places = counts.nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1)) and not text[places[-1] + 1 :].strip()
        found.append((text[: places[0]], text[places[0] : places[-1] + 1]))
    return found


def solved(name: str, question: str) -> str:
    """The answer by another way than that of the task."""
    if name in ("copy", "reverse", "sort", "sort_set", "shift"):
        word = list(question[:-1])
        assert question[-1] == {"copy": ">", "reverse": ">", "shift": ">"}.get(name, "|")
        if name == "reverse":
            return "".join(word.pop() for _ in range(len(word)))
        if name == "shift":
            return "".join("bcdefgha"["abcdefgh".index(letter)] for letter in word)
        if name == "sort":
            return "".join(letter * word.count(letter) for letter in "abcdefgh")
        return "".join(word if name == "copy" else (letter for letter in "hgfedcba" if letter in word))
    first, sign, *others = re.findall(r"\d+|[-+*]", question)
    numbers = [int(first), *map(int, others[::2])]
    if name == "multiply":
        return str(sum([numbers[0]] * numbers[1])) if sign == "*" else ""
    if name == "subtract":
        return str(numbers[0] - numbers[1]) if sign == "-" else ""
    if name == "gap":
        return f"{max(numbers) - min(numbers):02d}"[::-1] if sign == "-" else ""
    assert len(numbers) == (2 if name == "add" else 3) and sign == "+"
    return str(sum(numbers))[:: 1 if name == "add" else -1]


@pytest.mark.parametrize("name", [*PRETRAINING, *LEARNED, *HELD_OUT])
def test_a_puzzle_asks_what_it_answers_and_fits_a_row(name: str) -> None:
    puzzle, draw = {**PRETRAINING, **LEARNED, **HELD_OUT}[name], random.Random(3)
    for question, answer in (puzzle(draw) for _ in range(300)):
        assert answer == solved(name, question) and len(question + answer) < LENGTH
        assert set(question + answer) < set(CHARACTERS)


def test_rows_hold_the_puzzles_to_learn_and_no_question_is_in_two_sets() -> None:
    task = loaded(learn=["multiply", "shift"], train_size=400, validation_size=200, test_size=200)
    found = {name: pairs(rows) for name, rows in task.sets.items()}
    assert {name: len(rows) for name, rows in found.items()} == {"train": 400, "validation": 200, "test": 200}
    for rows in found.values():
        assert {question[-1] for question, _ in rows} == {"=", ">"}
        for question, answer in rows:
            assert answer == solved("shift" if question[-1] == ">" else "multiply", question) + "#"
    questions = [{question for question, _ in rows} for rows in found.values()]
    assert sum(map(len, questions)) == len(set().union(*questions))


def test_data_is_the_same_again_and_another_seed_draws_other_data() -> None:
    first, again, other = loaded(), loaded(), loaded(data_seed=1)
    assert first.digest == again.digest != other.digest
    longer = loaded(steps=6)  # begins with the same examples
    assert pairs(longer.sets["train"][:12]) == pairs(first.sets["train"])
    changed = Rows({name: column.clone() for name, column in first.sets["test"].columns.items()})  # type: ignore[attr-defined]
    changed.columns["labels"][-1, -1] = 3
    assert LoadedTask(**{**vars_of(first), "sets": {**first.sets, "test": changed}}).digest != first.digest


def vars_of(task: LoadedTask) -> dict[str, Any]:
    return {name: getattr(task, name) for name in ("settings", "model", "head", "collate", "loss_of")}


def test_exact_match_counts_the_answers_of_greedy_decoding() -> None:
    task = loaded(width=32, learn=["multiply", "sum_three"])
    optimizer = torch.optim.Adam(task.model.parameters(), 1e-2)
    for _ in range(80):  # until these answers are right
        task.loss_of(task.model, task.collate(task.sets["test"][:10]))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    right = 0
    for question, answer in pairs(task.sets["test"]):
        text = question
        while len(text) < len(question + answer):
            ids = torch.tensor([[CHARACTERS.index(character) for character in text]])
            text += CHARACTERS[int(task.model(input_ids=ids).logits[0, -1].argmax())]
        right += text == question + answer
    assert 10 <= right < 30
    assert task.score(task.model)["test"]["exact_match"] == pytest.approx(right / 30)


def test_the_loss_is_that_of_all_logits_and_short_rows_are_cut_off() -> None:
    task = loaded(learn=["multiply", "reverse"], test_size=60)
    rows = [task.collate(task.sets["test"][start : start + 20]) for start in (0, 20, 40)]
    lengths = [next_tokens(batch)[0]["input_ids"].shape[1] for batch in rows]
    assert lengths[0] < lengths[2] < LENGTH  # no logits are needed after the last character
    for batch in rows:
        logits = task.model(input_ids=batch["input_ids"]).logits[:, :-1]
        whole = cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100)
        loss, count = task.loss_of(task.model, batch)
        torch.testing.assert_close(loss, whole)
        assert count == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("change", [{"learn": ["add"]}, {"width": 20}, {"max_length": 5}, {"learn": []}])
def test_a_wrong_entry_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"^Task t.*{next(iter(change))}"):
        loaded(**change)


def test_a_comparison_of_puzzles_runs(tmp_path: Path) -> None:
    methods: dict[str, Any] = {name: [1e-2] for name in ("lora", "full", "pro_factored_linear", "loraga")}
    methods["gelora"] = {"gelora": {"pooling": "tokens"}, "learning_rates": [1e-2]}
    chosen = settings(tmp_path, tasks={"t": SMALL}, methods=methods)
    records = run_all(chosen).store.records().values()
    assert {record.method: record.error for record in records} == dict.fromkeys(methods)
    assert len({(record.data, record.examples) for record in records}) == 1
    assert all(record.scores and {"loss", "exact_match"} == set(record.scores["test"]) for record in records)


# Pretraining


FACTS: dict[str, Any] = {"steps": 3, "learning_rate": 0.1}


def tiny(facts: dict[str, Any] = FACTS, trained: Callable[[], Any] = lambda: None) -> nn.Module:
    def batches() -> Iterator[dict[str, torch.Tensor]]:
        trained()
        yield from [{"x": torch.ones(1, 2)}] * facts["steps"]

    class Tiny(nn.Linear):
        device = torch.device("cpu")

    return pretrained("tiny", lambda: Tiny(2, 2), facts, batches, lambda model, batch: (model(batch["x"]).sum(), 1))  # type: ignore[no-any-return]


def test_a_model_is_pretrained_once_and_then_read(cache: Path) -> None:
    trainings: list[int] = []
    torch.manual_seed(5)
    first = tiny(trained=lambda: trainings.append(1))
    torch.manual_seed(6)
    again = tiny(trained=lambda: trainings.append(2))
    assert trainings == [1] and torch.equal(first.weight, again.weight) and not again.training  # type: ignore[arg-type]
    tiny({**FACTS, "steps": 4}, lambda: trainings.append(3))
    assert trainings == [1, 3] and len(list(cache.glob("*.safetensors"))) == 2
    assert not [path for path in cache.iterdir() if path.suffix not in (".safetensors", ".lock")]


def test_pretraining_repeats_and_leaves_the_generator_alone(cache: Path) -> None:
    state = torch.get_rng_state()
    first = loaded().model.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    for path in cache.iterdir():
        path.unlink()
    again = loaded().model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_made_again(cache: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = tiny()
    path = next(cache.glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-3], "changed": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[damage])
    again = tiny()
    assert torch.equal(first.weight, again.weight) and path.read_bytes() == whole  # type: ignore[arg-type]
    assert capsys.readouterr().err.count(f"{path} is damaged") == 1


def test_other_processes_wait_while_one_trains(cache: Path) -> None:
    def other() -> None:
        with pytest.raises(Timeout):
            FileLock(next(cache.glob("*.lock"))).acquire(timeout=0)

    tiny(trained=other)
