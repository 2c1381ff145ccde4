"""Which problems does the demo train on and hold out, and what does the model see of them?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from lorapro_hf.commands.common.word_problems import word_problems
from lorapro_hf.commands.demo.settings import DemoSettings, is_missing_path
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import with_texts
from lorapro_hf.recipes.files import KINDS, fault_in, read_file, read_named

_HELD_OUT_SPLITS = ("test", "validation", "eval", "dev")
_MOST_WORD_PROBLEMS = 6000  # longer trainings see them again
_FINAL_ANSWER = re.compile(r"#### -?[0-9.,]")


@dataclass(frozen=True)
class Example:
    """A problem as text and as tokens; the answer's tokens end with the end-of-sequence token."""

    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]

    def features(self) -> dict[str, list[int]]:
        """What the model trains on: the loss counts on the answer only."""
        return {
            "input_ids": self.prompt_ids + self.answer_ids,
            "attention_mask": [1] * (len(self.prompt_ids) + len(self.answer_ids)),
            "labels": [-100] * len(self.prompt_ids) + self.answer_ids,
        }


def load_problems(settings: DemoSettings) -> tuple[Dataset, Dataset]:
    """The problems to train on and those held out, with the columns `question` and `answer`.

    Raises:
        UsageError: if there is no such dataset, a column is missing, a held-out answer has no number after `####`, or
            nothing is left to train on.
    """
    wanted = settings.steps * settings.batch_size
    if settings.dataset is None:
        try:
            return word_problems(min(wanted, _MOST_WORD_PROBLEMS), settings.eval_size, seed=settings.seed)
        except ValueError as error:
            raise UsageError(f"{error} Lower --eval_size.") from error
    train, held_out = _splits(_load(settings.dataset, settings.dataset_config), settings)
    held_out = held_out.select(range(min(settings.eval_size, len(held_out))))
    for row in held_out:
        if not _FINAL_ANSWER.search(row["answer"]):
            raise UsageError(
                f"The answer {row['answer']!r} of {settings.dataset!r} does not end with '#### ' and a number, so "
                "there is nothing to compare with. Write the answers as GSM8K does."
            )
    seen = set(held_out["question"])
    train = train.select([index for index, question in enumerate(train["question"]) if question not in seen])
    if not len(train) or not len(held_out):
        raise UsageError(f"The dataset {settings.dataset!r} has too few different problems to train and hold some out.")
    return train.select(range(min(wanted, len(train)))), held_out


def _load(name: str, config: str | None) -> Dataset | DatasetDict:
    if Path(name).is_file():
        return read_file(name, "--dataset")
    if is_missing_path(name, tuple(KINDS)):
        raise UsageError(f"There is no file or folder {name!r}; check --dataset.")
    try:
        return read_named(name, config)
    except UsageError:
        raise
    except (DatasetsError, OSError, ValueError, StopIteration) as error:
        raise UsageError(
            f"Cannot load the dataset {name!r}: {fault_in(name, error)}\nGive --dataset a hub name, with "
            "--dataset_config if it has several configurations, or a local folder or file."
        ) from error


def _splits(data: Dataset | DatasetDict, settings: DemoSettings) -> tuple[Dataset, Dataset]:
    """Training and held-out part, both shuffled; without a split for it, the held-out part is taken from the other."""
    parts = dict(data) if isinstance(data, DatasetDict) else {"train": data}
    for name, part in parts.items():
        if not {"question", "answer"} <= set(part.column_names):
            raise UsageError(
                f"The dataset {settings.dataset!r} has the columns {part.column_names}; the demo needs 'question' and "
                "'answer'. Rename its columns."
            )
        parts[name] = with_texts(part, ("question", "answer"), f"the {name} set of {settings.dataset!r}")
    train = parts.get("train", next(iter(parts.values()))).shuffle(seed=settings.seed)
    for name in _HELD_OUT_SPLITS:
        if name in parts and len(parts) > 1:
            return train, parts[name].shuffle(seed=settings.seed)
    count = min(settings.eval_size, len(train) // 2)
    return train.select(range(count, len(train))), train.select(range(count))


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """The problems as tokens, without those longer than `max_length`.

    Raises:
        UsageError: if all are longer.
    """
    prompts = [f"Question: {question}\nAnswer:" for question in rows["question"]]
    answers = [f" {answer.strip()}" for answer in rows["answer"]]
    prompt_ids: list[list[int]] = tokenizer(prompts)["input_ids"]
    answer_ids: list[list[int]] = tokenizer(answers, add_special_tokens=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    examples = [
        Example(prompt, answer.strip(), first, [*second, end])
        for prompt, answer, first, second in zip(prompts, answers, prompt_ids, answer_ids, strict=True)
    ]
    kept = [example for example in examples if len(example.prompt_ids) + len(example.answer_ids) <= max_length]
    if not kept:
        raise UsageError(f"All {len(examples)} problems are longer than {max_length} tokens; raise --max_length.")
    return kept
