"""Where do the problems of an evaluation come from?"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import with_texts
from lorapro_hf.recipes.files import fault_in, kind_of, read_file, read_named


def is_file(source: str) -> bool:
    """Whether `source` is meant as a local file rather than as a name on the Hub."""
    return kind_of(source) is not None and not Path(source).is_dir()


def load_rows(
    source: str,
    columns: Collection[str],
    config: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """The first `limit` rows of a data set, or all of them, with `columns` alone as texts.

    Args:
        source: a JSON, JSON lines (also gzipped), CSV or Parquet file, or a name on the Hub.
        columns: what each row must have.
        config: configuration of a data set of the Hub.
        split: split of a data set of the Hub.
        limit: how many rows.

    Raises:
        UsageError: there is no such data set, it is empty, broken, blank in a cell or lacks a column, or a file is
            given a config or split.
    """
    if is_file(source):
        if config is not None or split is not None:
            raise UsageError(f"{source} is a file, which has neither configuration nor split; leave them out.")
        rows = read_file(source, "the data set")
    else:
        rows = _named(source, config, split)
    missing = sorted(set(columns) - set(rows.column_names))
    if missing:
        raise UsageError(f"{source} has the columns {rows.column_names} and lacks {missing}; rename its columns.")
    rows = rows.select_columns(list(columns))
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise UsageError(f"{source} is empty.")
    return list(with_texts(rows, columns, source, keep_all="a score counts every problem"))


def _named(source: str, config: str | None, split: str | None) -> Dataset:
    try:
        found = read_named(source, config, split)
    except UsageError:
        raise
    except (DatasetsError, OSError, ValueError, StopIteration) as error:
        raise UsageError(
            f"cannot load the data set {source!r}: {fault_in(source, error)}\nGive --dataset a name on the Hub or a "
            "local JSON, JSON lines, CSV or Parquet file."
        ) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise UsageError(f"{source} has the splits {sorted(found)}; name one of these by --dataset_split.")
        return found[split]
    return found
