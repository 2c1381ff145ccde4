"""How is a data set read by its name, and which names are local paths?"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.files import KINDS, fault_in, read_file, read_named


def is_missing_path(name: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether the start or suffix of `name` shows that it is a local path, and no file is there."""
    local = name.startswith((".", "/", "~")) or Path(name).suffix in suffixes
    return local and not Path(name).exists()


def read_dataset(name: str, config: str | None) -> Dataset | DatasetDict:
    """The data set of a hub name, a local folder or a file.

    Raises:
        UsageError: it is missing or cannot be read.
    """
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
