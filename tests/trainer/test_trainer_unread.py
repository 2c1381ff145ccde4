"""A plain Trainer says that it does not read the settings of LoRA-Pro, and nothing else says so."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from grids import rest_slow
from lorapro_hf import (
    LoRAProCallback,
    LoRAProOptimizerFactory,
    LoRAProTrainer,
    LoRAProTrainerMixin,
    LoRAProTrainingArguments,
    create_lorapro_optimizer,
)
from trainer_helpers import arguments, build, tiny_lora


@dataclasses.dataclass
class Seq2SeqArguments(Seq2SeqTrainingArguments, LoRAProTrainingArguments):
    pass


class LoRAProSeq2SeqTrainer(LoRAProTrainerMixin, Seq2SeqTrainer):
    pass


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.name == "lorapro_hf.trainer.arguments" and r.levelno >= logging.WARNING
    ]


def trained(folder: Path, cls: type[Trainer] = Trainer, build_with: dict | None = None, **settings: Any) -> Any:
    kind = Seq2SeqArguments if issubclass(cls, Seq2SeqTrainer) else LoRAProTrainingArguments
    args = arguments(folder, kind, max_steps=1, **settings)
    trainer = build(cls, args, **(build_with or {}))
    trainer.train()
    return trainer


def test_a_plain_trainer_says_so_at_each_training(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = trained(tmp_path)
    (message,) = warnings_of(caplog)
    for words in ("this Trainer trains without LoRA-Pro", "LoRAProTrainer,", "LoRAProTrainerMixin", "--no_lora_pro"):
        assert words in message
    trainer.train()
    assert len(warnings_of(caplog)) == 2


def test_arguments_with_other_classes_and_copies_say_so_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    args = dataclasses.replace(arguments(tmp_path, Seq2SeqArguments, max_steps=1))
    build(Seq2SeqTrainer, args).train()
    build(Trainer, pickle.loads(pickle.dumps(args))).train()
    (first, second) = warnings_of(caplog)
    assert "Seq2SeqTrainer" in first and "Trainer" in second


def test_another_optimizer_that_was_handed_in_counts_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = tiny_lora()
    trained(tmp_path, build_with={"model": model, "optimizers": (torch.optim.SGD(model.parameters(), lr=1e-3), None)})
    assert len(warnings_of(caplog)) == 1


def with_optimizer() -> dict[str, Any]:
    model = tiny_lora()
    return {"model": model, "optimizers": (create_lorapro_optimizer(model, lr=1e-2), None)}


def with_factory() -> dict[str, Any]:
    if Version(transformers.__version__) < Version("5"):
        pytest.skip("transformers 4 knows no optimizer factories")
    return {"optimizer_cls_and_kwargs": (LoRAProOptimizerFactory, {"lr": 1e-2})}


@pytest.mark.parametrize(
    ("cls", "build_with", "settings"),
    rest_slow(
        [
            (Trainer, with_optimizer, {}),
            (Trainer, lambda: {"callbacks": [LoRAProCallback()]}, {}),
            (LoRAProTrainer, dict, {}),
            (Trainer, dict, {"lora_pro": False}),
            (Trainer, with_factory, {}),
            (LoRAProTrainer, dict, {"lora_pro": False}),
            (LoRAProSeq2SeqTrainer, dict, {}),
        ],
        fast=3,
    ),
    ids=["optimizer", "callback", "trainer", "off", "factory", "trainer, off", "mixin"],
)
def test_what_reads_the_settings_says_nothing(
    cls: type[Trainer],
    build_with: Callable[[], dict[str, Any]],
    settings: dict,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    trained(tmp_path, cls, build_with(), **settings)
    assert warnings_of(caplog) == []


def test_a_callback_that_is_added_later_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer = build(Trainer, arguments(tmp_path, LoRAProTrainingArguments, max_steps=1))
    trainer.add_callback(LoRAProCallback)
    trainer.train()
    assert warnings_of(caplog) == []


def test_a_loop_of_ones_own_may_ask_for_the_warmup(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    args = arguments(tmp_path, LoRAProTrainingArguments, warmup_steps=3)
    assert args.get_warmup_steps(10) == 3
    assert warnings_of(caplog) == []


def test_nothing_of_it_is_kept_in_the_arguments(tmp_path: Path):
    args = arguments(tmp_path, LoRAProTrainingArguments, max_steps=1)
    before = json.loads(args.to_json_string()), set(vars(args))
    build(Trainer, args).train()
    assert (json.loads(args.to_json_string()), set(vars(args))) == before
