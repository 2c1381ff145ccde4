"""Which cells of a data set are blank, or hold something else than text?"""

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

_AT_A_TIME = 10_000  # rows
_ROLES, _CONTENTS = ("role", "from"), ("content", "value")  # the latter are ShareGPT's
_NUMBERS = ("int", "uint", "float", "decimal")


def require_columns(rows: Dataset, columns: Collection[str], remedy: str = "") -> None:
    """Refuse rows that lack a column.

    Raises:
        UsageError: with the columns that there are.
    """
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
    """The rows that are blank in none of the columns; one line says how many others are left out.

    A cell is blank that is null: the key is missing, the cell of a CSV file is empty, or the number is NaN. A
    conversation is blank without messages, and with one that has no role or says nothing.

    Args:
        rows: of a split as it was loaded.
        columns: what each row needs.
        where: names the rows in messages, such as "the train set".
        need_text: those of the columns in which texts without a letter (empty, spaces) are blank too.
        keep_all: why no row may be left out, if none may.

    Raises:
        UsageError: a column is blank in all rows, or in one though none may be left out.
    """
    blank = {column: _blank(rows, column, column in need_text) for column in columns}
    for column, cells in blank.items():
        if len(rows) and cells.all():
            raise UsageError(f"the column {column} of {where} is blank in every row; fill it, or name another column.")
        if keep_all is not None and cells.any():
            raise UsageError(
                f"the column {column} of {where} is blank in row {cells.argmax() + 1}; fill it or take the row out: "
                f"{keep_all}."
            )
    without = np.any(list(blank.values()), axis=0)
    if not without.any():
        return rows
    if os.environ.get("RANK", "0") == "0":  # launchers of several processes set it
        names = " or ".join(column for column, cells in blank.items() if cells.any())
        logger.warning("%s: %d of %d rows are blank in %s and are left out.", where, without.sum(), len(rows), names)
    return rows.select(np.flatnonzero(~without))


def with_texts(
    rows: Dataset,
    columns: Collection[str],
    where: str,
    need_text: Collection[str] = (),
    keep_all: str | None = None,
    map_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """As `complete_rows`, of columns that hold texts; numbers are texts too, as Python writes them.

    Args:
        rows: as there.
        columns: as there.
        where: as there.
        need_text: as there.
        keep_all: as there.
        map_kwargs: for `Dataset.map`.

    Raises:
        UsageError: as there, or a cell is neither a text nor a number.
    """
    for column in columns:
        require_plain(rows, column, where)
    rows = complete_rows(rows, columns, where, need_text, keep_all)
    others = [column for column in columns if not _is_text(rows.features[column])]
    if not others:
        return rows
    features = Features({**rows.features, **dict.fromkeys(others, Value("string"))})
    # without `features` datasets would make numbers of them again
    return rows.map(
        lambda row: {column: str(row[column]) for column in others}, features=features, **(map_kwargs or {})
    )


def require_plain(rows: Dataset, column: str, where: str, scalars: bool = False) -> None:
    """Refuse a column with a cell that is neither a text nor a number nor blank.

    Args:
        rows: of a split as it was loaded.
        column: which one.
        where: names the rows in messages.
        scalars: whether other single values (true and false, dates) will do.

    Raises:
        UsageError: with the row of that cell.
    """
    feature = rows.features[column]
    if isinstance(feature, Value | ClassLabel) and (
        scalars or _is_text(feature) or feature.dtype == "null" or is_number(rows, column)
    ):
        return
    for number, row in enumerate(rows.select_columns([column]), 1):
        cell = row[column]
        is_other = isinstance(cell, list | dict) if scalars else isinstance(cell, bool) or not _is_written(cell)
        if cell is not None and is_other:
            kind = type(cell).__name__
            raise UsageError(f"the column {column} of {where} has no text in row {number} but a {kind}: {cell!r:.80}.")


def require_contents(rows: Dataset, column: str, where: str) -> None:
    """Refuse messages that say something else than texts, of which a chat template would write Python's form.

    Args:
        rows: of a split as it was loaded.
        column: which one; one without messages passes.
        where: names the rows in messages.

    Raises:
        UsageError: with the row of that message.
    """
    if not holds_messages(rows, column):
        return
    for number, row in enumerate(rows.select_columns([column]), 1):
        for message in row[column] or ():
            content = _said(message, *_CONTENTS) if isinstance(message, dict) else message
            if isinstance(content, dict | bool) or not isinstance(message, dict | None):
                raise UsageError(
                    f"the column {column} of {where} has a message without text in row {number} but a "
                    f"{type(content).__name__}: {content!r:.80}."
                )


def is_number(rows: Dataset, column: str) -> bool:
    """Whether a column holds numbers."""
    feature = rows.features[column]
    return isinstance(feature, Value | ClassLabel) and feature.dtype.startswith(_NUMBERS)


def holds_lists(rows: Dataset, column: str) -> bool:
    """Whether the first cell of a column that is not blank is a list, as of messages."""
    cells = (row[column] for row in rows.select_columns([column]))
    return isinstance(next((cell for cell in cells if cell is not None), None), list)


def holds_messages(rows: Dataset, column: str) -> bool:
    """Whether the first cell of a column that is not blank is a list with messages."""
    kind = rows.features.arrow_schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):  # images and recordings would be decoded below
        return False
    cells = (row[column] for row in rows.select_columns([column]))
    first = next((cell for cell in cells if cell), None)
    return isinstance(first, list) and any(isinstance(message, dict) for message in first)


def is_blank(rows: Dataset, column: str) -> bool:
    """Whether a column is blank in every row, as the labels of a test set may be."""
    return bool(_blank(rows, column, False).all())


def _is_written(cell: Any) -> bool:
    return isinstance(cell, str | int | float)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.endswith("string")


def _said(message: dict[str, Any], *keys: str) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _is_unsaid(message: dict[str, Any] | None) -> bool:
    """Whether a chat template would have to write the word `None`."""
    if message is None or _said(message, *_ROLES) is None:
        return True
    content = _said(message, *_CONTENTS)
    if isinstance(content, list):
        return any(part.get("type") == "text" and part.get("text") is None for part in content)
    return content is None and not message.get("tool_calls")


def _blank(rows: Dataset, column: str, needs_text: bool) -> Any:
    if holds_messages(rows, column):
        lists = (row[column] for row in rows.select_columns([column]))
        return np.array([not messages or any(map(_is_unsaid, messages)) for messages in lists])
    found = [np.zeros(0, dtype=bool)]
    for batch in rows.select_columns([column]).with_format("arrow").iter(_AT_A_TIME):
        cells = batch[column]
        blank = pc.is_null(cells, nan_is_null=pa.types.is_floating(cells.type))
        if needs_text and (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
            letters = pc.utf8_length(pc.utf8_trim_whitespace(cells))
            blank = pc.or_kleene(blank, pc.equal(letters, 0))
        found.append(blank.to_numpy(zero_copy_only=False) if isinstance(blank, pa.Array) else blank.to_numpy())
    return np.concatenate(found)
