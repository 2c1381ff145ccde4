"""Questions with worked answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lorapro_hf.commands.common.problems import encode, load_problems
from lorapro_hf.commands.common.scoring import Evaluator
from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.base import IGNORED, Batch, Features, LoadedTask, language_loss
from lorapro_hf.commands.compare.tasks.models import causal_model
from lorapro_hf.commands.compare.tasks.vocabulary import cut_vocabulary
from lorapro_hf.options import UsageError


def load_questions(settings: TaskSettings) -> LoadedTask:
    """Arithmetic word problems, or a dataset with the columns `question` and `answer` as GSM8K has.

    The loss counts on the answers only. With `generate`, some test questions are answered greedily and the final
    numbers compared (`exact_match`).

    Raises:
        UsageError: for a model or data that are not there, or too few questions that are short enough.
    """
    model, tokenizer = causal_model(settings.model, settings.layers)
    held_out = settings.validation_size + settings.test_size
    train, rest = load_problems(
        settings.examples, held_out, settings.data_seed, settings.dataset, settings.dataset_config
    )
    examples = encode(rest, tokenizer, settings.max_length)
    if len(examples) < 2:
        raise UsageError(f"Task {settings.name}: too few held-out questions of at most {settings.max_length} tokens.")
    # in the same proportion where long ones had to go
    cut = max(1, len(examples) * settings.validation_size // held_out)
    validation, test = examples[:cut], examples[cut:]
    asked = test[: settings.generate]
    evaluator = Evaluator(asked, tokenizer) if asked else None

    def measure(trained: Any) -> Mapping[str, float]:
        return {} if evaluator is None else {"exact_match": evaluator.answer_scores(trained)["exact_match"]}

    sets: Mapping[str, Sequence[Features]] = {
        "train": [example.features() for example in encode(train, tokenizer, settings.max_length)],
        "validation": [example.features() for example in validation],
        "test": [example.features() for example in test],
    }
    if settings.cut_vocabulary:
        sets = cut_vocabulary(model, sets)
    return LoadedTask(settings, model, None, sets, _padded, language_loss, measure)


def _padded(batch: list[Features]) -> Batch:
    """The examples as rows of one length; a masked place may hold any token."""
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: pad_sequence([torch.tensor(each[name]) for each in batch], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }
