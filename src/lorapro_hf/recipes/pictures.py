"""Which rows hold pictures, and what reads them?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, Image, Sequence
from transformers import AutoProcessor, ProcessorMixin

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows
from lorapro_hf.recipes.data import DataArguments
from lorapro_hf.recipes.model import ModelArguments, load_processor

PICTURES = ("image", "images")  # TRL's names of the column with one picture and with a list of pictures


def picture_column(rows: Dataset) -> str | None:
    """Return the column with pictures; `None` if there is none."""
    return next((column for column in PICTURES if column in rows.column_names), None)


def with_pictures(rows: Dataset, split: str, data: DataArguments) -> Dataset:
    """Return the rows that have pictures, with files read when a row is; paths start at the folder of the data file.

    Raises:
        UsageError: if a file does not exist.
    """
    column, where = picture_column(rows), f"the {split} set"
    if column is None:
        return rows
    rows = complete_rows(rows, (column,), where)
    first = rows.features[column]
    if "string" not in str(first) or "Image" in str(first):
        return rows  # pictures already
    folder = Path(getattr(data, f"{split}_file") or "x").parent

    def found(path: str) -> str:
        if "://" not in path and not (folder / path).is_file():
            raise UsageError(f"the picture {path} of {where} does not exist in the folder {folder}.")
        return path if "://" in path else str(folder / path)

    def absolute(cell: Any) -> dict[str, Any]:
        return {column: found(cell) if isinstance(cell, str) else [found(path) for path in cell]}

    rows = rows.map(absolute, input_columns=column, **data.map_kwargs)
    return rows.cast_column(column, Image() if column == "image" else Sequence(Image()))


def load_vision_processor(arguments: ModelArguments) -> ProcessorMixin:
    """Return what turns pictures and texts into the model's inputs.

    Raises:
        UsageError: if the model reads no pictures.
    """
    source = arguments.tokenizer_name or arguments.model_name_or_path
    processor = load_processor(AutoProcessor, source, arguments)
    if not isinstance(processor, ProcessorMixin):
        raise UsageError(
            f"{source} reads no pictures, and the rows have a column {' or '.join(PICTURES)}: take a vision-language "
            "model, or remove the column."
        )
    return processor
