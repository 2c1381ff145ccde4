"""`lorapro compare`: the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits as read

from comparison_helpers import content, run_all, settings
from lorapro_hf.commands.compare.adapters import layers_to_adapt
from lorapro_hf.commands.compare.settings import settings_of
from lorapro_hf.commands.compare.tasks import digits
from lorapro_hf.commands.compare.tasks import pretrained as pretraining
from lorapro_hf.commands.compare.tasks.base import LoadedTask
from lorapro_hf.commands.compare.tasks.kinds import load_task
from lorapro_hf.options import UsageError

SMALL: dict[str, Any] = {
    **{"kind": "digits", "width": 16, "layers": 1, "pretraining_steps": 2, "steps": 3, "batch_size": 4, "ranks": [2]},
    **{"validation_size": 20, "test_size": 30},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining.constants, "HF_HOME", str(tmp_path / "cache"))


def loaded(**more: Any) -> LoadedTask:
    return load_task(settings_of(content(tasks={"t": {**SMALL, **more}})).tasks[0])


def test_no_image_is_in_two_sets_and_each_is_there_in_two_forms() -> None:
    label_of = {
        tuple(image.ravel() / 8 - 1): int(label) for image, label in zip(read().images, read().target, strict=True)
    }
    assert len(label_of) == 1797  # all images differ
    seen = [tuple(image.flatten().tolist()) for image in digits._halves(0)[0].columns["pixel_values"]]
    for rows in loaded().sets.values():
        half = len(rows) // 2
        for original, inverted in zip(rows[:half], rows[half:], strict=True):
            assert torch.equal(original["pixel_values"], -inverted["pixel_values"])
            seen.append(tuple(original["pixel_values"].flatten().tolist()))
            assert label_of[seen[-1]] == int(original["labels"]) == int(inverted["labels"])
    assert len(set(seen)) == len(seen) == 1797


def test_accuracies_are_of_originals_and_inverted_images() -> None:
    task = loaded()
    images = torch.stack([row["pixel_values"] for row in task.sets["test"]])
    labels = torch.stack([row["labels"] for row in task.sets["test"]])
    right = (task.model(pixel_values=images).logits.argmax(-1) == labels).double()
    expected = {
        "accuracy": right.mean(),
        "accuracy_original": right[:15].mean(),
        "accuracy_inverted": right[15:].mean(),
    }
    scores = task.score(task.model)["test"]
    assert {name: scores[name] for name in expected} == pytest.approx(
        {name: float(part.mean()) for name, part in expected.items()}
    )


def test_the_encoder_is_adapted_and_the_classifier_is_not() -> None:
    model = loaded().model
    layers = layers_to_adapt(model, "all-linear", None)
    assert len(layers) == 6 and "classifier" not in layers


@pytest.mark.parametrize("change", [{"test_size": 31}, {"train_size": 900}, {"width": 20}, {"learn": ["copy"]}])
def test_a_wrong_entry_is_refused(change: dict[str, Any]) -> None:
    name = next(iter(change))
    with pytest.raises(UsageError, match=rf"^Task t.*{name}"):
        loaded(**{"test_size": 1000, **change} if name == "train_size" else change)


def test_a_comparison_of_digits_runs(tmp_path: Path) -> None:
    methods = {name: [1e-2] for name in ("lora", "full", "pro_factored_linear")}
    records = run_all(settings(tmp_path, tasks={"t": SMALL}, methods=methods)).store.records().values()
    assert {record.method: record.error for record in records} == dict.fromkeys(methods)
    assert len({(record.data, record.examples) for record in records}) == 1
