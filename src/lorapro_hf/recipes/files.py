"""How is exactly the named data file or folder read, and which line of it is broken?"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import zlib
from pathlib import Path
from typing import IO, cast

import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetsError

from lorapro_hf.options import UsageError, is_disk_full
from lorapro_hf.utils.text_files import parse_json

KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_GZIPPED = ".gz"
_CHAIN = "::"  # fsspec splits paths here
_BEGINNING, _SEARCHED = 1 << 20, 1 << 32  # bytes


def read_file(path: str, label: str, cache_dir: str | None = None) -> Dataset:
    """Return the rows of a CSV, JSON, JSON lines, Parquet or text file, gzipped or not.

    Raises:
        UsageError: if the file is missing, empty, broken or of an unknown kind; `label` is the option that named it.
    """
    try:
        return _read(Path(path), cache_dir)
    except UsageError as error:
        raise UsageError(f"{label} {path}: {error}") from error


def read_named(
    name: str, config: str | None = None, split: str | None = None, cache_dir: str | None = None
) -> Dataset | DatasetDict:
    """Return a data set or one split of it, from the Hub, a folder of data files or a folder of `save_to_disk`.

    Raises:
        UsageError: if datasets would take the path of the folder for a pattern.
        ValueError: if there is no such split.
    """
    if any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json")):
        saved = load_from_disk(name)
        parts = saved if isinstance(saved, DatasetDict) else {"train": saved}
        if split is not None and split not in parts:
            raise ValueError(f"Unknown split: {name} has the splits {sorted(parts)}; name one of these.")
        return saved if split is None else parts[split]
    _require_literal(name)
    return load_dataset(name, config, split=split, cache_dir=cache_dir)


def read_images(folder: str, label: str, cache_dir: str | None = None) -> Dataset:
    """Return the images of a folder that has a subfolder for each class.

    Raises:
        UsageError: if the folder holds no images.
    """
    try:
        _require_literal(folder)
        return load_dataset("imagefolder", split="train", cache_dir=cache_dir, data_dir=folder)
    except (DatasetsError, OSError, ValueError) as error:
        raise UsageError(f"{label} {folder}: {reason(error)}") from error


def fault_in(name: str, error: Exception) -> str:
    """Return why a data set could not be read: the broken file of its folder, or else the reason of the error.

    The search stops after 4 GiB, which take about a minute.
    """
    folder, searched = Path(name), 0
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        kind = _kind_of(file)
        if kind is None or not file.is_file() or searched >= _SEARCHED:
            continue
        searched += file.stat().st_size
        is_empty_text = kind == "text" and not file.stat().st_size  # no fault in a folder
        fault = None if is_empty_text else _fault(file, kind, parse=True)
        if fault is not None:
            return f"{file}: {fault}"
    return reason(error)


def reason(error: BaseException) -> str:
    """Return the cause of an error of datasets in one line.

    Raises:
        Exception: the cause itself, if memory or the disk is full.
    """
    errors = [error]
    while (cause := errors[-1].__cause__ or errors[-1].__context__) is not None:
        errors.append(cause)
    for each in errors:
        if isinstance(each, MemoryError) or is_disk_full(each):
            raise each
    # after an error of pyarrow datasets tries pandas, whose message misses the point
    cause = next((each for each in errors if isinstance(each, pa.ArrowException)), errors[-1])
    if "corresponds to no data" in str(cause) or isinstance(cause, StopIteration):
        return "there are no rows in it."
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if text.endswith(".") else f"{text}."


def _read(file: Path, cache_dir: str | None) -> Dataset:
    kind = _kind_of(file)
    if kind is None:
        raise UsageError(f"must end with one of {', '.join(sorted(KINDS))} (or that and .gz).")
    if not file.is_file():
        raise UsageError("there is no such file.")
    path = os.path.abspath(file)
    if _CHAIN in path:
        raise UsageError(f"datasets splits paths at {_CHAIN}; rename the file or its folder.")
    fault = _fault(file, kind)
    if fault is not None:
        raise UsageError(fault)
    # datasets would take a plain string for a pattern; the cache depends on time and size of the file
    origin = [(str(file.stat().st_mtime_ns), str(file.stat().st_size))]
    data_files = DataFilesDict({"train": DataFilesList([path], origin)})
    try:
        rows = load_dataset(kind, data_files=data_files, split="train", cache_dir=cache_dir)
        return _whole_numbers(rows, path) if kind == "csv" else rows
    except UsageError:
        raise
    except Exception as error:  # each reader has its own exceptions for broken files
        raise UsageError(_fault(file, kind, parse=True) or reason(error)) from error


def _require_literal(name: str) -> None:
    path = str(Path(name).resolve())
    if Path(name).is_dir() and (glob.has_magic(path) or _CHAIN in path):
        raise UsageError(f"{path}: datasets takes this path for a pattern; rename it without *, ?, [, ] and ::.")


def _kind_of(file: Path) -> str | None:
    """Return the reader of datasets for a file; gzipped files without another suffix are JSON."""
    if file.suffix.lower() == _GZIPPED:
        return KINDS.get(Path(file.stem).suffix.lower(), "json")
    return KINDS.get(file.suffix.lower())


def _fault(file: Path, kind: str, parse: bool = False) -> str | None:
    """Return what is wrong with the encoding of a file and, if `parse`, with its JSON; `None` if nothing is.

    The readers of datasets accept UTF-16 as letters with zeros between them, and other encodings in JSON.
    """
    if not file.stat().st_size:
        return "the file is empty."
    if kind == "parquet":
        return None
    try:
        with cast("IO[bytes]", gzip.open(file) if file.suffix.lower() == _GZIPPED else file.open("rb")) as opened:
            beginning = opened.read(_BEGINNING)
            if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in beginning:
                return "is no UTF-8 text but UTF-16 or binary; save it as UTF-8."
            opened.seek(0)
            is_lines = ".jsonl" in file.suffixes
            return _line_fault(opened, kind == "json" and parse, is_lines) if kind == "json" or parse else None
    except (OSError, EOFError, zlib.error) as error:
        return f"cannot be read: {error}."


def _line_fault(lines: IO[bytes], is_json: bool, is_lines: bool) -> str | None:
    """Return what is wrong with the first broken line; a file that is not `is_lines` may be one JSON value."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if is_json and text and not isinstance(parse_json(text), dict):
                return None if number == 1 else f"line {number} is no JSON object. Mend it or take it out."
        except UnicodeDecodeError as error:
            return f"line {number} is no UTF-8 ({error.reason}); save the file as UTF-8."
        except json.JSONDecodeError as error:
            if number > 1 or is_lines:
                return f"line {number} is no JSON: {error.msg} at column {error.colno}. Mend it or take it out."
            try:
                parse_json((line + lines.read()).decode("utf-8-sig", errors="replace"))
            except json.JSONDecodeError as of_value:
                return f"line {of_value.lineno} is no JSON: {of_value.msg} at column {of_value.colno}."
            return None
    return None


def _whole_numbers(rows: Dataset, path: str) -> Dataset:
    """Return the rows of a CSV file with whole numbers, of which pandas makes floats beside blank cells.

    Raises:
        UsageError: if pandas took the first column for an index.
    """
    if not isinstance(pd.read_csv(path, nrows=1).index, pd.RangeIndex):
        raise UsageError("its rows have more cells than its header; name every column in the first line.")
    for place, (column, feature) in enumerate(rows.features.items()):
        if getattr(feature, "dtype", None) == "float64" and rows.data.column(column).null_count:
            written = pd.read_csv(path, usecols=[place], dtype=str).iloc[:, 0].dropna()
            if written.str.fullmatch(r"\s*[+-]?\d{1,15}\s*").all():
                rows = rows.cast_column(column, Value("int64"))
    return rows
