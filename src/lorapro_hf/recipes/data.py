"""Where do the training, validation and test sets of a script come from?"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from transformers import TrainingArguments

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.files import fault_in, is_saved, read_file, read_named, reason
from lorapro_hf.recipes.hub import sought

_NO_SPLIT = re.compile("unknown split|bad split", re.IGNORECASE)  # in what datasets says


@dataclass
class DataArguments:
    """The data: a name on the Hub, a local folder, or a file for each split."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set: a name on the Hub, or a local folder of data files or from save_to_disk."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Which configuration of the data set.", "aliases": ["--dataset_config"]}
    )
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON, JSON lines, Parquet or text file."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for the evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for the prediction."})
    train_split: str = field(
        default="train",
        metadata={"help": "Split to train on, such as train[:100000].", "aliases": ["--dataset_train_split"]},
    )
    validation_split: str = field(
        default="validation",
        metadata={
            "help": "Split to evaluate on; a data set without it lends a share of train.",
            "aliases": ["--dataset_test_split"],
        },
    )
    test_split: str = field(default="test", metadata={"help": "Split to predict."})
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Share of the training set that is held out where there is no validation set."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many only."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first so many only."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Preprocess again what is cached."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that preprocess."})

    def __post_init__(self) -> None:
        self.require_positive("max_train_samples", "max_eval_samples", "max_predict_samples")
        self.require_positive("preprocessing_num_workers")
        if self.dataset_name is not None and self._files():
            raise UsageError("--dataset_name and --train_file (or another file) exclude each other.")
        if not 0 < self.validation_split_percentage < 100:
            raise UsageError(f"--validation_split_percentage {self.validation_split_percentage} is not in (0, 100).")

    def require_positive(self, *names: str) -> None:
        """Refuse zero and less for settings that count something; `None` is their default.

        Raises:
            UsageError: with the setting and its value.
        """
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
        """The data set's name for the model card: that on the Hub; local files have none that others could follow."""
        is_local = self.dataset_name is None or Path(self.dataset_name).exists()
        return None if is_local else self.dataset_name

    def available(self, cache_dir: str | None) -> dict[str, Dataset]:
        """The splits that there are.

        Args:
            cache_dir: where downloads go.
        """
        return _from_files(self, cache_dir) if self._files() else _by_name(self, cache_dir)

    def _files(self) -> dict[str, str]:
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in files.items() if path is not None}


def load_splits(
    data: DataArguments,
    training: TrainingArguments,
    cache_dir: str | None = None,
    also: Collection[str] = (),
    prepare: Callable[[Dataset, str], Dataset] = lambda rows, split: rows,
) -> DatasetDict:
    """The splits that the arguments ask for, named train, validation and test, cut to their `max_*_samples`.

    Where there is no validation set, a share of the training set is held out, the same in every run of one `data_seed`
    (or `seed`).

    Args:
        data: where they come from.
        training: its `do_train`, `do_eval` and `do_predict` say which splits are needed.
        cache_dir: where downloads go.
        also: splits that are needed whatever is to be done.
        prepare: leaves rows of a split, which it is told, out or rewrites them, before a share is held out and
            `max_*_samples` are counted.

    Raises:
        UsageError: no data were named, a file is missing, broken or of an unknown kind, or a split that is needed is
            not there or has no rows.
    """
    asked = {"train": training.do_train, "validation": training.do_eval, "test": training.do_predict}
    needed = [split for split, wanted in asked.items() if wanted or split in also]
    with training.main_process_first(desc="loading the data"):
        available = data.available(cache_dir)
        holds_out = training.do_eval and "validation" not in available and "train" in available
        used = {"train", *needed} if holds_out else set(needed)
        available = {split: prepare(rows, split) if split in used else rows for split, rows in available.items()}
    if holds_out:
        available |= _held_out(available["train"], data, training)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
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
    """Why no row of a split may be left out for a blank cell, if none may."""
    return "predictions stand in the order of the rows" if split == "test" else None


def _held_out(rows: Dataset, data: DataArguments, training: TrainingArguments) -> dict[str, Dataset]:
    seed = training.seed if training.data_seed is None else training.data_seed
    percentage = data.validation_split_percentage
    try:
        parts = rows.train_test_split(percentage / 100, seed=seed)
    except ValueError as error:
        raise UsageError(
            f"{percentage:g} % of the {len(rows)} rows of the train set cannot be held out for the evaluation: name a "
            "--validation_file or --validation_split, change --validation_split_percentage, or leave out --do_eval."
        ) from error
    return {"train": parts["train"], "validation": parts["test"]}


def _from_files(data: DataArguments, cache_dir: str | None) -> dict[str, Dataset]:
    return {split: read_file(path, f"--{split}_file", cache_dir) for split, path in data._files().items()}


def _by_name(data: DataArguments, cache_dir: str | None) -> dict[str, Dataset]:
    name = data.dataset_name
    if name is None:
        raise UsageError("name the data: --dataset_name, or --train_file and --validation_file.")
    wanted_splits = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    if is_saved(name):
        return _of_saved(data, wanted_splits, name)
    found: dict[str, Dataset] = {}
    for split, wanted in wanted_splits.items():
        try:
            with sought("the data set", name):
                found[split] = read_named(name, data.dataset_config_name, wanted, cache_dir)
        except UsageError:
            raise
        except (DatasetsError, FileNotFoundError, ValueError, StopIteration) as error:
            if not (isinstance(error, ValueError) and _NO_SPLIT.search(str(error))):
                raise UsageError(f"--dataset_name {name}: {fault_in(name, error)}") from error
            if not _is_default(data, split):
                raise UsageError(f"{name}: {error}") from error
    return found


def _of_saved(data: DataArguments, wanted_splits: dict[str, str], name: str) -> dict[str, Dataset]:
    try:
        saved = read_named(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"--dataset_name {name}: {reason(error)}") from error
    parts = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    for split, wanted in wanted_splits.items():
        if wanted not in parts and not _is_default(data, split):
            raise UsageError(f"--{split}_split {wanted}: {name} has the splits {sorted(parts)}; name one of these.")
    return {split: parts[wanted] for split, wanted in wanted_splits.items() if wanted in parts}


def _is_default(data: DataArguments, split: str) -> bool:
    return getattr(data, f"{split}_split") == DataArguments.__dataclass_fields__[f"{split}_split"].default
