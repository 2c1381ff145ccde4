"""How are problems read from a file?"""

from __future__ import annotations

from collections.abc import Collection

from datasets import Dataset

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import with_texts
from lorapro_hf.recipes.files import read_file

_QUESTIONS, _FUNCTIONS = ("question", "answer"), ("task_id", "prompt", "test", "entry_point")
# the tasks whose problems may come from a file, and the columns that they read
COLUMNS = {
    "gsm8k": _QUESTIONS,
    "gsm8k_alpaca": _QUESTIONS,
    "humaneval": _FUNCTIONS,
    "humaneval_alpaca": _FUNCTIONS,
    "humaneval_instruct": _FUNCTIONS,
}


def load_rows(file: str, columns: Collection[str], label: str = "--dataset") -> Dataset:
    """The rows of a JSON, JSON lines, CSV or Parquet file with `columns` alone, as texts; `label` names the option.

    Raises:
        UsageError: the file is missing, empty or broken, lacks a column or is blank in a cell.
    """
    rows = read_file(file, label)
    missing = sorted(set(columns) - set(rows.column_names))
    if missing:
        raise UsageError(f"{file} has the columns {rows.column_names} and lacks {missing}; rename its columns.")
    if not len(rows):
        raise UsageError(f"{file} is empty.")
    return with_texts(rows.select_columns(list(columns)), columns, file, keep_all="a score counts every problem")


def local_rows(task: str, file: str | None, examples: str | None) -> dict[str, Dataset] | None:
    """The problems of a file (`--dataset`) as the split `test`, and solved examples (`--fewshot_dataset`) as `train`.

    Without a file there are no local rows. If no examples are named, the problems themselves are `train`.

    Raises:
        UsageError: the task takes no file, or the rows of a file cannot be used.
    """
    if file is None:
        if examples is not None:
            raise UsageError("--fewshot_dataset goes with --dataset.")
        return None
    columns = COLUMNS.get(task)
    if columns is None:
        raise UsageError(
            f"--dataset goes with the tasks {', '.join(COLUMNS)}. For another task write a task file of lm-eval (YAML) "
            "that names your data, and give its path as the task."
        )
    rows = {"test": load_rows(file, columns)}
    rows["train"] = rows["test"] if examples is None else load_rows(examples, columns, "--fewshot_dataset")
    if columns is _QUESTIONS:
        for answer in (answer for each in rows.values() for answer in each["answer"]):
            if "#### " not in answer:
                raise UsageError(f"the answer {answer!r} does not end with '#### ' and a number, as GSM8K's do.")
    return rows
