"""Models that get a new head: one line names the head, and a warning names other layers without weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from lorapro_hf.recipes.heads import load_with_head
from lorapro_hf.recipes.model import ModelArguments
from script_helpers import Lines
from trainer_helpers import tiny_base

REPORTS = ("LOAD REPORT", "Some weights of")


def reports(said: Lines) -> list[str]:
    return [line for line in said.lines if any(words in line for words in REPORTS)]


@pytest.fixture
def said() -> Iterator[Lines]:
    """What transformers logs."""
    handler, level = Lines(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logging.getLogger("transformers").addHandler(handler)
    yield handler
    logging.getLogger("transformers").removeHandler(handler)
    transformers_logging.set_verbosity(level)


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("lorapro_hf")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model without a head for classes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_base().save_pretrained(folder)
    return folder


def test_a_new_head_is_one_line(folder: Path, said: Lines, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lorapro_hf"):
        model, missing = load_with_head(AutoModelForSequenceClassification, ModelArguments(str(folder)), num_labels=3)
    assert missing == {"score.weight"} and not reports(said)
    line = f"New in the {type(model).__name__}, to be trained whole: score"
    assert ours(caplog) == [line]
    # another program sees what it always saw
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert len(reports(said)) >= 1


def test_other_layers_without_weights_get_a_warning(
    folder: Path, tmp_path: Path, said: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.INFO, "lorapro_hf"):
        load_with_head(AutoModelForSequenceClassification, ModelArguments(str(tmp_path)), num_labels=3)
    new, others = ours(caplog)
    assert not reports(said) and new.endswith("to be trained whole: score")
    assert others == f"{tmp_path} has no weights for model.layers.0.self_attn.q_proj: they start at random."


def test_a_head_of_other_classes_is_new_and_elsewhere_an_error(
    tmp_path: Path, said: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=8)).save_pretrained(tmp_path)
    words = (AutoModelForImageClassification, ModelArguments(str(tmp_path)), "classifier")
    with caplog.at_level(logging.INFO, "lorapro_hf"):
        load_with_head(*words, num_labels=5, ignore_mismatched_sizes=True)
    assert not reports(said) and ours(caplog)[-1].endswith("to be trained whole: classifier")
    load_with_head(*words)
    assert len(ours(caplog)) == 1  # nothing is new
    with pytest.raises(RuntimeError):
        load_with_head(*words, num_labels=5)
