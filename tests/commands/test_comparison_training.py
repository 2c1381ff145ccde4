"""`lorapro compare`: its trainings and its tasks, on tiny models."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from peft import optimizers
from transformers import get_scheduler

from comparison_helpers import CLASSES, CPU, SIZES, TINY, content, only, runs_of, settings
from grids import rest_slow
from lorapro_hf import create_lorapro_optimizer
from lorapro_hf.commands.compare import training
from lorapro_hf.commands.compare.adapters import layers_to_adapt, make_trainable
from lorapro_hf.commands.compare.methods import METHODS
from lorapro_hf.commands.compare.references import reference_losses
from lorapro_hf.commands.compare.settings import settings_of
from lorapro_hf.commands.compare.tasks import sources
from lorapro_hf.commands.compare.tasks.base import LoadedTask
from lorapro_hf.commands.compare.tasks.kinds import load_task
from lorapro_hf.commands.compare.tasks.sources import docstrings, library_code, table
from lorapro_hf.options import UsageError


def loaded(entry: dict[str, Any]) -> LoadedTask:
    return load_task(settings_of(content(tasks={"t": entry})).tasks[0])


@pytest.fixture(scope="module")
def task() -> LoadedTask:
    return loaded(TINY)


# Trainings


FEW = ["lora", "pissa", "lorafa", "dora", "full", "pro_full_linear"]


@pytest.mark.parametrize("wanted", rest_slow([FEW, list(METHODS)]), ids=["few", "all"])
def test_every_method_trains_on_the_same_data(task: LoadedTask, tmp_path: Path, wanted: list[str]) -> None:
    old = {"riemannian": "create_riemannian_optimizer", "loraga": "LoraGAConfig"}  # which the oldest PEFT lacks
    names = [name for name in wanted if name not in old or hasattr(peft, old[name]) or hasattr(optimizers, old[name])]
    entries: dict[str, Any] = {name: {"learning_rates": [1e-2]} for name in names}
    for name in {"gelora", "pro_gelora"} & entries.keys():
        entries[name]["gelora"] = {"pooling": "tokens"}  # six questions are too few points
    for name in {"beamlora", "pro_beamlora"} & entries.keys():
        entries[name]["callbacks"] = {"BeamLoRACallback": {"every": 2, "keep": 1.0}}  # three steps are too few
    chosen = settings(tmp_path, methods=entries)
    records = {run.method.name: training.train_run(task, run, chosen, CPU) for run in runs_of(chosen)}
    assert {name: record.error for name, record in records.items()} == dict.fromkeys(names)
    assert len({record.data for record in records.values()}) == 1
    # the same model before the first step, whatever has been done to its weights, unless the start is a step itself
    first = [record.losses[0] for name, record in records.items() if not METHODS[name].callbacks]
    torch.testing.assert_close(first, [records["lora"].losses[0]] * len(first))
    before = float(task.loss(task.model.eval(), "test"))
    after = {name: record.scores["test"]["loss"] for name, record in records.items() if record.scores}
    assert all(loss < before - 1e-4 for loss in after.values()), (before, after)
    # LoRA-FA trains B alone and DoRA magnitudes besides
    trainable = {name: record.trainable or 0 for name, record in records.items()}
    assert trainable["lorafa"] < trainable["lora"] == trainable["pissa"] < trainable["dora"] < trainable["full"]
    assert (records["full"].state_bytes or 0) >= 8 * trainable["full"]
    layers = layers_to_adapt(task.model, "all-linear", None)
    assert trainable["full"] == sum(task.model.get_submodule(name).weight.numel() for name in layers)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("questions", "pro_full_linear"),
        pytest.param("classification", "lora", marks=pytest.mark.slow),
        pytest.param("classification", "pro_full_linear", marks=pytest.mark.slow),
        pytest.param("classification", "lorarite", marks=pytest.mark.slow),
        pytest.param("classification", "full", marks=pytest.mark.slow),
    ],
)
def test_the_trainer_trains_as_a_plain_loop(kind: str, method: str, tmp_path: Path) -> None:
    """Losses to the bit: batches, dropout masks, schedule, clipping of method and head apart, the head's own AdamW."""
    entry = TINY if kind == "questions" else {**CLASSES, "head_learning_rate": 0.05}
    more = {"tasks": {"t": entry}, "max_grad_norm": 0.5}
    chosen, run, task = settings(tmp_path, **more), only(method, **more), loaded(entry)
    record = training.train_run(task, run, chosen, CPU)
    assert record.status == "finished", record.error

    order = task.order(run.seed)
    model = load_task(task.settings).model
    head = task.start_head(model, run.seed)
    model = make_trainable(model, run, layers_to_adapt(model, "all-linear", head), 2.0, lambda: None)
    own = [p for p in model.parameters() if p.requires_grad]
    if method == "lorarite":
        from pytorch_optimizer import LoRARite

        optimizers: list[Any] = [LoRARite(own, lr=run.learning_rate)]
    elif method == "pro_full_linear":
        optimizers = [create_lorapro_optimizer(model, lr=run.learning_rate, mode="full", update="linear")]
    else:
        optimizers = [torch.optim.AdamW(own, lr=run.learning_rate, weight_decay=0.0, fused=True)]
    of_head = [] if head is None else list(head.requires_grad_(True).parameters())
    if of_head:
        optimizers.append(torch.optim.AdamW(of_head, lr=0.05, weight_decay=0.0, fused=True))
    schedulers = [get_scheduler("cosine", each, 0, 3) for each in optimizers]
    losses = []
    model.train()
    for step, indices in enumerate(order):
        torch.manual_seed(run.seed * 1_000_003 + step)
        loss, _ = task.loss_of(model, task.collate([task.sets["train"][index] for index in indices]))
        loss.backward()
        losses.append(float(loss.detach()))
        for part in ([] if method == "lorarite" else own, of_head):
            torch.nn.utils.clip_grad_norm_(part, 0.5)
        for each in (*optimizers, *schedulers):
            each.step()
        model.zero_grad()
    assert record.losses == losses
    assert record.scores == task.score(model)


def test_a_shorter_run_sees_the_first_part_of_the_same_order(tmp_path: Path) -> None:
    more: dict[str, Any] = {"tasks": {"t": {**TINY, "steps": [2, 4]}}, "schedule": "constant"}
    chosen = settings(tmp_path, methods={"lora": [1e-2]}, **more)
    task = load_task(chosen.tasks[0])
    long, short = (training.train_run(task, run, chosen, CPU) for run in runs_of(chosen))
    assert len(long.losses) == 4 and short.losses == long.losses[:2] and short.steps == 2
    assert long.examples == short.examples and long.data != short.data


def test_the_task_is_left_as_it_was(task: LoadedTask, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    for method in ("pissa", "loraga", "full"):
        training.train_run(task, only(method), settings(tmp_path), CPU)
    after = task.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_repeats_and_its_seed_matters(task: LoadedTask, tmp_path: Path) -> None:
    first, again = (training.train_run(task, only("lora"), settings(tmp_path), CPU) for _ in range(2))
    other = training.train_run(task, only("lora", seeds=[1]), settings(tmp_path), CPU)
    assert first.losses == again.losses and first.scores == again.scores
    assert first.data == again.data != other.data


def test_bf16_is_autocast(task: LoadedTask, tmp_path: Path) -> None:
    wide, narrow = (
        training.train_run(task, only("pro_full_linear"), settings(tmp_path, precision=each), CPU)
        for each in ("fp32", "bf16")
    )
    assert wide.losses != narrow.losses and wide.losses == pytest.approx(narrow.losses, rel=1e-2)


def test_all_methods_adapt_all_linear_layers_but_the_output(task: LoadedTask) -> None:
    layers = layers_to_adapt(task.model, "all-linear", None)
    assert len(layers) == 2 * 7 and "lm_head" not in layers
    assert layers_to_adapt(task.model, ["q_proj"], None) == [name for name in layers if name.endswith("q_proj")]
    for targets in (["q_porj"], ["q_proj", "q_porj"]):
        with pytest.raises(UsageError, match=r"no linear layer q_porj \(did you mean q_proj .*It has q_proj, k_proj"):
            layers_to_adapt(task.model, targets, None)


def test_data_are_those_of_all_sets_with_their_targets(task: LoadedTask) -> None:
    assert load_task(task.settings).digest == task.digest
    for change in ({"validation": []}, {"test": [{**task.sets["test"][0], "labels": [1]}]}):
        assert dataclasses.replace(task, sets={**task.sets, **change}).digest != task.digest


def test_modes_of_a_model_change_once_and_in_all_its_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()).eval()
    model.training = True  # as PEFT's model around one in evaluation mode
    training._change_modes_once(model)
    assert model[0].training and model[1].training
    model[0].training = False
    assert model.train() is model and not model[0].training  # left out
    assert model.eval() is model and not model[1].training
    assert model.train() is model and model[0].training


def test_divergence_is_recorded(task: LoadedTask, tmp_path: Path) -> None:
    record = training.train_run(task, only("full", 1e30), settings(tmp_path, warmup=0.0), CPU)
    assert record.status == "diverged" and record.scores is None
    assert record.diverged_at == len(record.losses) > 1


def test_an_exception_is_recorded(task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(training, "build", explode)
    record = training.train_run(task, only("lora"), settings(tmp_path), CPU)
    assert (record.status, record.error) == ("failed", "OutOfMemoryError: no room")


def test_an_exception_while_scoring_is_no_divergence(
    task: LoadedTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(type(task), "score", explode)
    record = training.train_run(task, only("lora"), settings(tmp_path), CPU)
    assert (record.status, record.error) == ("failed", "OutOfMemoryError: no room")


# Tasks


def test_code_is_held_out_by_the_package() -> None:
    packages = {name: set() for name in ("train", "validation", "test")}
    for package, _ in sources.standard_modules():
        packages[sources.set_of(f"0 {package}")].add(package)
    assert all(packages.values()) and len(packages["train"]) > len(packages["test"])
    assert not packages["train"] & packages["test"] and not packages["train"] & packages["validation"]
    assert all(next(texts) for texts in library_code(0).values())


def test_docstrings_are_balanced_disjoint_and_masked() -> None:
    sets = docstrings(2, seed=0)
    texts = {name: {text for text, _ in part} for name, part in sets.items()}
    assert not texts["train"] & texts["test"] and not texts["validation"] & (texts["train"] | texts["test"])
    for name, part in sets.items():
        assert len(part) > 40, name
        assert {label for _, label in part[:2]} == {"asyncio", "importlib"}
        assert not any(label in text.lower().split() for text, label in part)
    assert docstrings.__wrapped__(2, seed=0) == sets


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "text", "max_length": 16},
        {"kind": "questions", "max_length": 512, "generate": 2},
    ],
    ids=lambda entry: "-".join(str(value) for value in entry.values()),
)
def test_tasks_train(entry: dict[str, Any], tmp_path: Path) -> None:
    task = loaded({**SIZES, **entry})
    record = training.train_run(task, only("full", tasks={"t": {**SIZES, **entry}}), settings(tmp_path), CPU)
    assert record.status == "finished", record.error
    more = {"exact_match"} if entry.get("generate") else set()
    assert record.scores is not None and set(record.scores["test"]) == {"loss"} | more
    assert all(len(examples) >= 4 for examples in task.sets.values())


@pytest.mark.parametrize(
    "method", ["lorafa", *(pytest.param(each, marks=pytest.mark.slow) for each in ("lora", "full"))]
)
def test_the_head_is_trained_alike(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # so low a rate that the method itself moves nothing, and no warm-up
    more = {"tasks": {"t": {**CLASSES, "head_learning_rate": 0.05, "steps": 2}}, "warmup": 0.0, "schedule": "constant"}
    heads = []
    real = LoadedTask.score
    monkeypatch.setattr(LoadedTask, "score", lambda self, model: heads.append(head_of(model)) or real(self, model))
    task = loaded(more["tasks"]["t"])
    record = training.train_run(task, only(method, 1e-30, **more), settings(tmp_path, **more), CPU)
    assert record.status == "finished", record.error
    assert record.adapted_layers == 2 * 6  # no pooler, which gets no gradients
    # AdamW's first two steps are of one rate each, wherever the gradients of both agree in sign
    torch.manual_seed(0)
    start = torch.nn.init.normal_(torch.empty_like(heads[0].weight), std=0.02)
    moved = (heads[0].weight.detach() - start).abs()
    assert 0.05 < moved.max() < 0.1001 and moved.median() > 0.01


def head_of(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).classifier


def test_a_table_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"words": f"{'good' if i % 2 else 'bad'} thing number {i}", "mood": i % 2} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    entry = {"kind": "classification", "model": "tiny-random", "dataset": str(path), "text_column": "words"}
    entry |= {"label_column": "mood", "steps": 2, "batch_size": 4, "validation_size": 6, "test_size": 6}
    assert {name: len(part) for name, part in loaded(entry).sets.items()} == {"train": 8, "validation": 6, "test": 6}
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "one")
    sets = table(settings_of(content(tasks={"t": {**entry, "dataset": str(tmp_path / "one")}})).tasks[0], ("words",))
    assert sum(map(len, sets.values())) == len({row["words"] for part in sets.values() for row in part}) == 60
    with pytest.raises(UsageError, match="has the columns"):
        loaded({**entry, "label_column": "label"})
    with pytest.raises(UsageError, match="no file or folder"):
        loaded({**entry, "dataset": "./none.csv"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "./none.jsonl"}, "Task t: .*check `dataset`"),
        ({"model": "./nowhere"}, "Task t: .*check `model`"),
        ({"max_length": 2}, "Task t: .*`max_length`"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named_by_the_keys_of_the_yaml(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        loaded({**TINY, **change})
    assert "--" not in str(caught.value)


# Reference losses


def test_a_unigram_model_knows_the_frequencies_of_the_answers() -> None:
    task = loaded(TINY)
    found = reference_losses(task, 0, CPU)
    targets = {
        which: [token for each in task.sets[which] for token in each["labels"][1:] if token != -100]
        for which in ("train", "test")
    }
    counts, size = Counter(targets["train"]), task.model.config.vocab_size
    chances = [(counts[token] + 1) / (len(targets["train"]) + size) for token in targets["test"]]
    assert found["frequencies"] == pytest.approx(-sum(map(math.log, chances)) / len(chances))
    assert found["untrained"] == pytest.approx(task.loss(task.model.eval(), "test"))


def test_a_unigram_model_knows_the_frequencies_of_the_classes() -> None:
    task = loaded({**CLASSES, "batch_size": 3})
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    found = reference_losses(task, 0, CPU)
    counts = Counter(each["labels"] for each in task.sets["train"])
    losses = [-math.log(counts[each["labels"]] / 9) for each in task.sets["test"]]
    assert found["frequencies"] == pytest.approx(sum(losses) / 4)
    assert found["untrained"] == pytest.approx(math.log(2), abs=0.3)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
