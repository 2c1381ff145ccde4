"""Which cells of a data set are blank, and which hold something other than text?"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Value

from lorapro_hf.options import UsageError

logger = logging.getLogger(__name__)

_BATCH = 10_000  # rows
_ROLES, _CONTENTS = ("role", "from"), ("content", "value")  # the second names are ShareGPT's
_NUMBERS = ("int", "uint", "float", "decimal")


def require_columns(rows: Dataset, columns: Collection[str], remedy: str = "") -> None:
    """Refuse rows that lack a column; the message lists the columns of the rows."""
    for column in columns:
        if column not in rows.column_names:
            raise UsageError(f"there is no column {column}; the columns are {rows.column_names}.{remedy}")


def complete_rows(
    rows: Dataset,
    columns: Collection[str],
    where: str,
    need_text: Collection[str] = (),
    keep_all: str | None = None,
) -> Dataset:
    """Return the rows that are blank in none of the columns, and log how many rows of `where` are left out.

    A cell is blank if it is null or NaN, and in the columns of `need_text` if it is empty or spaces. A conversation is
    blank if it has no message, or a message without a role or without content.

    Raises:
        UsageError: if a column is blank in all rows, or in one row although `keep_all` gives a reason to keep all.
    """
    blank = {column: _blank(rows, column, column in need_text) for column in columns}
    for column, cells in blank.items():
        if len(rows) and cells.all():
            raise UsageError(f"the column {column} of {where} is blank in every row; fill it, or name another column.")
        if keep_all is not None and cells.any():
            raise UsageError(
                f"the column {column} of {where} is blank in row {cells.argmax() + 1}; fill it or remove the row: "
                f"{keep_all}."
            )
    left_out = np.any(list(blank.values()), axis=0)
    if not left_out.any():
        return rows
    if os.environ.get("RANK", "0") == "0":
        names = " or ".join(column for column, cells in blank.items() if cells.any())
        logger.warning("%s: %d of %d rows are blank in %s and are left out.", where, left_out.sum(), len(rows), names)
    return rows.select(np.flatnonzero(~left_out))


def with_texts(
    rows: Dataset,
    columns: Collection[str],
    where: str,
    need_text: Collection[str] = (),
    keep_all: str | None = None,
    map_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """Return the complete rows, see `complete_rows`, with the numbers in the columns written as texts.

    Raises:
        UsageError: if a cell is neither text nor number, or as in `complete_rows`.
    """
    for column in columns:
        require_plain(rows, column, where)
    rows = complete_rows(rows, columns, where, need_text, keep_all)
    others = [column for column in columns if not _is_text(rows.features[column])]
    if not others:
        return rows
    features = Features({**rows.features, **dict.fromkeys(others, Value("string"))})
    # without `features` datasets would convert the texts back to numbers
    return rows.map(
        lambda row: {column: str(row[column]) for column in others}, features=features, **(map_kwargs or {})
    )


def require_plain(rows: Dataset, column: str, where: str, scalars: bool = False) -> None:
    """Refuse a cell that is neither text nor number nor blank, with its row; if `scalars`, lists and mappings alone."""
    feature = rows.features[column]
    if isinstance(feature, Value | ClassLabel) and (
        scalars or _is_text(feature) or feature.dtype == "null" or is_number(rows, column)
    ):
        return
    wrong = (list, dict) if scalars else (list, dict, bool)
    for number, row in enumerate(rows.select_columns([column]), 1):
        cell = row[column]
        if isinstance(cell, wrong) or not (scalars or cell is None or isinstance(cell, str | int | float)):
            raise _other_kind(column, where, number, cell)


def require_contents(rows: Dataset, column: str, where: str) -> None:
    """Refuse messages whose content is a mapping or a boolean, which a chat template would write as Python does."""
    for number, row in enumerate(rows.select_columns([column]), 1):
        for message in row[column] or ():
            content = _first_value(message, _CONTENTS) if isinstance(message, dict) else message
            if isinstance(content, dict | bool) or not isinstance(message, dict | None):
                raise _other_kind(column, where, number, content)


def is_number(rows: Dataset, column: str) -> bool:
    """Return whether a column holds numbers."""
    feature = rows.features[column]
    return isinstance(feature, Value | ClassLabel) and feature.dtype.startswith(_NUMBERS)


def holds_messages(rows: Dataset, column: str) -> bool:
    """Return whether the first cell that is not blank is a list of messages."""
    kind = rows.features.arrow_schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):  # iterating would decode images and recordings
        return False
    cells = (row[column] for row in rows.select_columns([column]))
    first = next((cell for cell in cells if cell), None)
    return isinstance(first, list) and any(isinstance(message, dict) for message in first)


def is_blank(rows: Dataset, column: str) -> bool:
    """Return whether a column is blank in every row, as the labels of a test set may be."""
    return bool(_blank(rows, column, False).all())


def _other_kind(column: str, where: str, number: int, cell: Any) -> UsageError:
    return UsageError(
        f"the column {column} of {where} has no text in row {number} but a {type(cell).__name__}: {cell!r:.80}."
    )


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.endswith("string")


def _first_value(message: dict[str, Any], keys: Collection[str]) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _is_incomplete(message: dict[str, Any] | None) -> bool:
    """Return whether a chat template would write the word `None` for this message."""
    if message is None or _first_value(message, _ROLES) is None:
        return True
    content = _first_value(message, _CONTENTS)
    if isinstance(content, list):
        return any(part.get("type") == "text" and part.get("text") is None for part in content)
    return content is None and not message.get("tool_calls")


def _blank(rows: Dataset, column: str, needs_text: bool) -> Any:
    """Return a boolean for each row."""
    if holds_messages(rows, column):
        conversations = (row[column] for row in rows.select_columns([column]))
        return np.array([not messages or any(map(_is_incomplete, messages)) for messages in conversations])
    parts = [np.zeros(0, dtype=bool)]
    for batch in rows.select_columns([column]).with_format("arrow").iter(_BATCH):
        cells = batch[column]
        blank = pc.is_null(cells, nan_is_null=pa.types.is_floating(cells.type))
        if needs_text and (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
            blank = pc.or_kleene(blank, pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(cells)), 0))
        parts.append(np.asarray(blank))
    return np.concatenate(parts)
