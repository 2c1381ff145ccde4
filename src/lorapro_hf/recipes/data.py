"""Where do the training, validation and test sets of a script come from?"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from lorapro_hf.options import UsageError, is_disk_full
from lorapro_hf.recipes.endings import NotFetchedError, sought
from lorapro_hf.recipes.files import fault_in, read_file, read_named

_SPLITS = ("train", "validation", "test")
_NO_SPLIT = re.compile("unknown split|bad split", re.IGNORECASE)  # messages of datasets


@dataclass
class DataArguments:
    """The data set: a name on the Hub, a local folder, or a file for each split."""

    dataset_name: str | None = HfArg(default=None, help="Data set: a name on the Hub, or a folder (also save_to_disk).")
    dataset_config_name: str | None = HfArg(default=None, help="Its configuration.", aliases=["--dataset_config"])
    train_file: str | None = HfArg(default=None, help="CSV, JSON, JSON lines, Parquet or text file.")
    validation_file: str | None = HfArg(default=None, help="The same for the evaluation.")
    test_file: str | None = HfArg(default=None, help="The same for the prediction.")
    train_split: str = HfArg(default="train", help="Such as train[:100000].", aliases=["--dataset_train_split"])
    validation_split: str = HfArg(
        default="validation",
        help="Split to evaluate on; if it is missing, a part of the training set is held out.",
        aliases=["--dataset_test_split"],
    )
    test_split: str = HfArg(default="test", help="Split to predict.")
    validation_split_percentage: float = HfArg(default=5.0, help="Part to hold out if there is no validation set.")
    max_train_samples: int | None = HfArg(default=None, help="Train on the first N rows only.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on the first N rows only.")
    max_predict_samples: int | None = HfArg(default=None, help="Predict the first N rows only.")
    overwrite_cache: bool = HfArg(default=False, help="Preprocess again in spite of the cache.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes that preprocess.")

    def __post_init__(self) -> None:
        self.require_positive(
            "max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"
        )
        if self.dataset_name is not None and self._files():
            raise UsageError("--dataset_name and --train_file (or another file) exclude each other.")
        if self.dataset_name is not None and Path(self.dataset_name).is_file():
            raise UsageError(
                f"--dataset_name {self.dataset_name} is a file: name it by --train_file (and others by "
                "--validation_file and --test_file)."
            )
        if not 0 < self.validation_split_percentage < 100:
            raise UsageError(f"--validation_split_percentage {self.validation_split_percentage} is not in (0, 100).")

    def require_positive(self, *names: str) -> None:
        """Refuse zero and negative numbers in the named settings; `None` is allowed."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name} {value} must be positive.")

    @property
    def map_kwargs(self) -> dict[str, Any]:
        """Keywords for every `Dataset.map`."""
        return {"num_proc": self.preprocessing_num_workers, "load_from_cache_file": not self.overwrite_cache}

    @property
    def described(self) -> str | None:
        """The name of the data set for the model card; `None` for local data, which others could not find."""
        is_local = self.dataset_name is None or Path(self.dataset_name).exists()
        return None if is_local else self.dataset_name

    def available(self, cache_dir: str | None) -> dict[str, Dataset]:
        """Return the splits of the data set by name, as far as they exist.

        Raises:
            UsageError: if no data set is named, or it cannot be read.
        """
        if self._files():
            return {split: read_file(path, f"--{split}_file", cache_dir) for split, path in self._files().items()}
        if self.dataset_name is None:
            raise UsageError("name the data: --dataset_name, or --train_file and --validation_file.")
        splits = {split: self._named(self.dataset_name, split, cache_dir) for split in _SPLITS}
        return {split: rows for split, rows in splits.items() if rows is not None}

    def _files(self) -> dict[str, str]:
        files = {split: getattr(self, f"{split}_file") for split in _SPLITS}
        return {split: path for split, path in files.items() if path is not None}

    def _named(self, name: str, split: str, cache_dir: str | None) -> Any:
        """Return a split of the Hub or of a folder; `None` if it is missing and was not asked for by name."""
        wanted = getattr(self, f"{split}_split")
        try:
            with sought("the data set", name):
                return read_named(name, self.dataset_config_name, wanted, cache_dir)
        except (UsageError, NotFetchedError):
            raise
        except (DatasetsError, OSError, ValueError, StopIteration) as error:
            if is_disk_full(error):
                raise
            if not (isinstance(error, ValueError) and _NO_SPLIT.search(str(error))):
                raise UsageError(f"--dataset_name {name}: {fault_in(name, error)}") from error
            if wanted != split:
                raise UsageError(f"--{split}_split {wanted}: {error}") from error
            return None


def load_splits(
    data: DataArguments,
    training: TrainingArguments,
    cache_dir: str | None = None,
    also: Collection[str] = (),
    prepare: Callable[[Dataset, str], Dataset] = lambda rows, split: rows,
) -> DatasetDict:
    """Return the splits for `do_train`, `do_eval` and `do_predict` and those in `also`, cut to `max_*_samples`.

    Without a validation set, a part of the training set is held out, the same for each `data_seed` (or `seed`).
    `prepare(rows, split)` filters or rewrites the rows of a split before rows are held out or counted.

    Raises:
        UsageError: if a needed split is missing or empty, or the data cannot be read.
    """
    asked = dict(zip(_SPLITS, (training.do_train, training.do_eval, training.do_predict), strict=True))
    limits = dict(zip(_SPLITS, (data.max_train_samples, data.max_eval_samples, data.max_predict_samples), strict=True))
    needed = [split for split, wanted in asked.items() if wanted or split in also]
    with training.main_process_first(desc="loading the data"):
        available = data.available(cache_dir)
        holds_out = training.do_eval and "validation" not in available and "train" in available
        used = {"train", *needed} if holds_out else set(needed)
        available = {split: prepare(rows, split) if split in used else rows for split, rows in available.items()}
    if holds_out:
        available |= _held_out(available["train"], data.validation_split_percentage, training)
    splits = DatasetDict()
    for split in needed:
        if split not in available:
            raise UsageError(f"there is no {split} set among {sorted(available)}; name one by --{split}_file or split.")
        rows, limit = available[split], limits[split]
        if not len(rows):
            raise UsageError(f"the {split} set has no rows; name another by --{split}_file or --{split}_split.")
        splits[split] = rows if limit is None else rows.select(range(min(limit, len(rows))))
    return splits


def keep_all_of(split: str) -> str | None:
    """Return why no blank row of a split may be left out; `None` if it may."""
    return "predictions keep the order of the rows" if split == "test" else None


def _held_out(rows: Dataset, percentage: float, training: TrainingArguments) -> dict[str, Dataset]:
    seed = training.seed if training.data_seed is None else training.data_seed
    try:
        parts = rows.train_test_split(percentage / 100, seed=seed)
    except ValueError as error:
        raise UsageError(
            f"{percentage:g} % of the {len(rows)} rows of the train set cannot be held out for the evaluation: name a "
            "--validation_file or --validation_split, change --validation_split_percentage, or leave out --do_eval."
        ) from error
    return {"train": parts["train"], "validation": parts["test"]}
