"""How is a data file or a folder of data read: exactly the one that is named, and with a word for what is broken?"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, cast

import datasets
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, Value, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns
from datasets.exceptions import DatasetsError

from lorapro_hf.options import UsageError, is_disk_full
from lorapro_hf.utils.text_files import parse_json

KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_GZIPPED = ".gz"
_CHAIN = "::"  # what joins addresses in a path, for fsspec
_PIECE, _SEARCHED = 1 << 20, 1 << 32  # bytes


def kind_of(name: str) -> str | None:
    """What datasets calls files of this name, or `None` for what is no data file; gzipped files are JSON by default."""
    path = Path(name)
    if path.suffix.lower() == _GZIPPED:
        return KINDS.get(Path(path.stem).suffix.lower(), "json")
    return KINDS.get(path.suffix.lower())


def read_file(path: str, label: str, cache_dir: str | None = None) -> Dataset:
    """The rows of a CSV, JSON, JSON lines, Parquet or text file, gzipped or not.

    Args:
        path: the file; no character of its name stands for others.
        label: the option or setting that named it, with which messages begin.
        cache_dir: where datasets keeps what it has read.

    Raises:
        UsageError: there is no such file, or it is of an unknown kind, empty or broken.
    """
    file, kind = Path(path), kind_of(path)
    if kind is None:
        raise UsageError(f"{label} {path}: must end with one of {', '.join(sorted(KINDS))} (or that and .gz).")
    if not file.is_file():
        raise UsageError(f"{label} {path}: there is no such file.")
    if not file.stat().st_size:
        raise UsageError(f"{label} {path}: the file is empty.")
    fault = _encoding_fault(file, kind)
    if fault is not None:
        raise UsageError(f"{label} {path}: {fault}")
    try:
        with _quiet(), _plain_path(file) as plain:
            # a plain text would be a pattern to datasets
            origin = [(str(file.stat().st_mtime_ns), str(file.stat().st_size))]
            named = DataFilesDict({"train": DataFilesList([plain], origin)})
            rows = load_dataset(kind, data_files=named, split="train", cache_dir=cache_dir)
            return _whole_numbers(rows, file) if kind == "csv" else rows
    except UsageError as error:
        raise UsageError(f"{label} {path}: {error}") from error
    except Exception as error:  # each reader has exceptions of its own for broken files
        why = _bad_line(file, kind) or reason(error)
        raise UsageError(f"{label} {path}: {why}") from error


def is_saved(name: str) -> bool:
    """Whether a folder is from `save_to_disk`."""
    return any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json"))


def read_named(
    name: str, config: str | None = None, split: str | None = None, cache_dir: str | None = None
) -> Dataset | DatasetDict:
    """A data set of the Hub, of a folder of data files, or of a folder from `save_to_disk`.

    Args:
        name: as on the Hub, or the folder; no character of its path stands for others.
        config: which configuration.
        split: which split alone; a folder from `save_to_disk` is read as a whole.
        cache_dir: where downloads go.

    Raises:
        UsageError: the path of the folder cannot be read literally.
    """
    if is_saved(name):
        return load_from_disk(name)
    with _quiet():
        return load_dataset(name, config, split=split, cache_dir=cache_dir, **_files_of(Path(name)))


def read_images(folder: str, label: str, cache_dir: str | None = None) -> Dataset:
    """A folder with a folder of images for each class; no character of its path stands for others.

    Args:
        folder: where they lie.
        label: the option that named it, with which messages begin.
        cache_dir: where datasets keeps what it has read.

    Raises:
        UsageError: there are no such images.
    """
    try:
        with _quiet():
            files = _files_of(Path(folder)) or {"data_dir": folder}
            return load_dataset("imagefolder", split="train", cache_dir=cache_dir, **files)
    except (DatasetsError, OSError, ValueError) as error:
        raise UsageError(f"{label} {folder}: {reason(error)}") from error


def fault_in(name: str, error: Exception) -> str:
    """Why a data set could not be read: the file of the folder and its line where these are known.

    The search ends with the file in which it has read so many bytes that the user would wait for minutes.
    """
    folder, searched = Path(name), 0
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        kind = kind_of(file.name)
        if kind is not None and file.is_file() and searched < _SEARCHED:
            size = file.stat().st_size
            searched += size if kind == "json" else min(size, _PIECE)
            is_empty = not size and kind != "text"  # an empty text is no fault
            fault = "the file is empty." if is_empty else _encoding_fault(file, kind)
            if fault is None and kind == "json":
                fault = _bad_line(file, kind)
            if fault is not None:
                return f"{file}: {fault}"
    return reason(error)


def reason(error: BaseException) -> str:
    """What is behind an error of datasets, in one line.

    Raises:
        Exception: the one among those behind it that is no fault of the data: memory or the disk is full.
    """
    errors = [error]
    while (behind := errors[-1].__cause__ or errors[-1].__context__) is not None:
        errors.append(behind)
    for each in errors:
        if isinstance(each, MemoryError) or is_disk_full(each):
            raise each
    # after an error of pyarrow datasets tries pandas, which misses the point
    told = next((each for each in errors if isinstance(each, pa.ArrowException)), errors[-1])
    if "corresponds to no data" in str(told) or isinstance(told, StopIteration):
        return "there are no rows in it."
    said = " ".join(str(told).split())
    return f"{said or type(told).__name__}{'' if said.endswith('.') else '.'}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without datasets' own lines about a file that it cannot read: the exception tells."""
    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)


@contextmanager
def _plain_path(file: Path) -> Iterator[str]:
    """The absolute path of a file, or of a link to it where datasets would take the path for several."""
    path = os.path.abspath(file)
    if _CHAIN not in path:
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, f"data{''.join(file.suffixes[-2:])}".replace(_CHAIN, ""))
        link.symlink_to(path)
        yield str(link)


def _files_of(folder: Path) -> dict[str, DataFilesDict]:
    """The `data_files` of a folder whose path datasets would take for a pattern; else nothing."""
    path = str(folder.resolve())
    if not folder.is_dir() or not (glob.has_magic(path) or _CHAIN in path):
        return {}
    card = folder / "README.md"
    has_own = card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")
    if _CHAIN in path or has_own:
        why = f"whose path has {_CHAIN}" if _CHAIN in path else "with such a name and configurations in its README.md"
        raise UsageError(f"{path}: datasets cannot read a folder {why}; rename it without *, ?, [, ] and ::.")
    base = glob.escape(path)
    return {"data_files": DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)}


def _opened(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file) if file.suffix.lower() == _GZIPPED else file.open("rb"))


def _encoding_fault(file: Path, kind: str) -> str | None:
    """Why a text file is no UTF-8, where its reader would let it pass: UTF-16 as letters with zeros between them."""
    if kind == "parquet":
        return None
    try:
        with _opened(file) as opened:
            beginning = opened.read(_PIECE)
            if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in beginning:
                return "is no UTF-8 text but UTF-16 or binary; save it as UTF-8."
            if kind == "json":  # the reader of which lets other encodings pass, until a cell is looked at
                decoder = codecs.getincrementaldecoder("utf-8")()
                for piece in chain((beginning,), iter(lambda: opened.read(_PIECE), b"")):
                    decoder.decode(piece)
    except UnicodeDecodeError:
        return _bad_line(file, kind)
    except (OSError, EOFError, zlib.error) as error:
        return f"cannot be read: {error}."
    return None


def _bad_line(file: Path, kind: str) -> str | None:
    """The first line that is no UTF-8 or no JSON, if it can be told."""
    if kind == "parquet":
        return None
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if kind == "json" and text and not isinstance(parse_json(text), dict):
                        return None if number == 1 else f"line {number} is no JSON object. Mend it or take it out."
                except UnicodeDecodeError as error:
                    return f"line {number} is no UTF-8 ({error.reason}); save the file as UTF-8."
                except json.JSONDecodeError as error:
                    if number == 1 and ".jsonl" not in file.suffixes:
                        return _bad_place(file)
                    return f"line {number} is no JSON: {error.msg} at column {error.colno}. Mend it or take it out."
    except (OSError, EOFError, zlib.error):
        pass
    return None


def _bad_place(file: Path) -> str | None:
    """Where a JSON file that is one value over several lines ends to be one."""
    with _opened(file) as opened:
        text = opened.read().decode("utf-8-sig", errors="replace")
    try:
        parse_json(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is no JSON: {error.msg} at column {error.colno}."
    return None


def _whole_numbers(rows: Dataset, file: Path) -> Dataset:
    """The rows of a CSV file with whole numbers as they were written; beside blank cells pandas makes floats of them.

    Raises:
        UsageError: pandas has taken the first column for names of rows.
    """
    path = os.path.abspath(file)  # pandas takes some other paths for addresses
    if not isinstance(pd.read_csv(path, nrows=1).index, pd.RangeIndex):
        raise UsageError("its rows have more cells than its header; name every column in the first line.")
    for place, (column, feature) in enumerate(rows.features.items()):
        if getattr(feature, "dtype", None) == "float64" and rows.data.column(column).null_count:
            written = pd.read_csv(path, usecols=[place], dtype=str).iloc[:, 0].dropna()
            if written.str.fullmatch(r"\s*[+-]?\d{1,15}\s*").all():
                rows = rows.cast_column(column, Value("int64"))
    return rows
