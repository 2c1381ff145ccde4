"""Which problems are trained on and held out, and which tokens does the model see?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from lorapro_hf.commands.common.datasets import read_dataset
from lorapro_hf.commands.common.word_problems import word_problems
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import with_texts

_HELD_OUT_SPLITS = ("test", "validation", "eval", "dev")
_MOST_WORD_PROBLEMS = 6000  # longer trainings see them again
_FINAL_ANSWER = re.compile(r"#### -?[0-9.,]")


@dataclass(frozen=True)
class Example:
    """A problem as text and as tokens; `answer_ids` end with the end-of-sequence token."""

    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]

    def features(self) -> dict[str, list[int]]:
        """The inputs and labels of training: only the answer has a loss."""
        return {
            "input_ids": self.prompt_ids + self.answer_ids,
            "attention_mask": [1] * (len(self.prompt_ids) + len(self.answer_ids)),
            "labels": [-100] * len(self.prompt_ids) + self.answer_ids,
        }


def load_problems(
    train_size: int, eval_size: int, seed: int = 0, dataset: str | None = None, config: str | None = None
) -> tuple[Dataset, Dataset]:
    """At most `train_size` problems to train on and `eval_size` held out, with the columns `question` and `answer`.

    They are word problems, decided by the seed, or those of `dataset` (hub name, local folder or file; of a hub dataset
    the configuration `config`), whose order it decides. Raises `UsageError` for a dataset or column that is missing, a
    held-out answer without a number after `####`, and if no problem is left to train on.
    """
    if dataset is None:
        try:
            return word_problems(min(train_size, _MOST_WORD_PROBLEMS), eval_size, seed=seed)
        except ValueError as error:
            raise UsageError(f"{error} Lower --eval_size.") from error
    train, held_out = _splits(read_dataset(dataset, config), dataset, eval_size, seed)
    held_out = held_out.select(range(min(eval_size, len(held_out))))
    for answer in held_out["answer"]:
        if not _FINAL_ANSWER.search(answer):
            message = f"The answer {answer!r} of {dataset!r} does not end with '#### ' and a number."
            raise UsageError(f"{message} Write the answers as GSM8K does.")
    seen = set(held_out["question"])
    train = train.select([index for index, question in enumerate(train["question"]) if question not in seen])
    if not len(train) or not len(held_out):
        raise UsageError(f"The dataset {dataset!r} has too few different problems to train and hold some out.")
    return train.select(range(min(train_size, len(train)))), held_out


def _splits(data: Dataset | DatasetDict, dataset: str, eval_size: int, seed: int) -> tuple[Dataset, Dataset]:
    """The training and the held-out split, shuffled; a dataset with one split is divided."""
    parts = dict(data) if isinstance(data, DatasetDict) else {"train": data}
    for name, part in parts.items():
        if not {"question", "answer"} <= set(part.column_names):
            columns = f"has the columns {part.column_names}; 'question' and 'answer' are needed"
            raise UsageError(f"The dataset {dataset!r} {columns}. Rename its columns.")
        parts[name] = with_texts(part, ("question", "answer"), f"the {name} set of {dataset!r}")
    train = parts.get("train", next(iter(parts.values()))).shuffle(seed=seed)
    for name in _HELD_OUT_SPLITS:
        if name in parts and len(parts) > 1:
            return train, parts[name].shuffle(seed=seed)
    count = min(eval_size, len(train) // 2)
    return train.select(range(count, len(train))), train.select(range(count))


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """The problems as tokens, without those longer than `max_length`; raises `UsageError` if all are longer."""
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
