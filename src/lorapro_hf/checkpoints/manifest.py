"""Which files did a save write into a checkpoint, and are they still the same?

A `Trainer` with LoRA-Pro writes the manifest last. The manifest lists the size and the checksums of each file. So a
file of another save, a file that was cut off and a flipped bit are found before a training resumes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from lorapro_hf import __version__
from lorapro_hf.checkpoints.adapters import WEIGHTS
from lorapro_hf.checkpoints.files import BY_ENGINE, METHODS, OPTIMIZER, RNG, SCALER, SCHEDULER, STATE
from lorapro_hf.utils.text_files import write_text

MANIFEST = "lorapro_manifest.json"
_FORMAT = 1
_MAX_BYTES = 2**26  # about a hundred are needed for each file
# CRC-32 takes less time than torch takes to write; threads share the pieces of a large file.
_PIECE, _READ = 2**26, 2**22
_OF_STATE = (OPTIMIZER, SCHEDULER, SCALER, RNG, METHODS, *BY_ENGINE)
_BESIDE_IT = ("zero_to_fp32.py", ".nfs*", "*.tmp")  # a program of DeepSpeed's, and files that pass
_SHARD = re.compile(r"(adapter_model|model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


@dataclass(frozen=True)
class SavedFile:
    """The size in bytes of a file, and the checksum of each piece of 64 MiB."""

    size: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The files of one save by their paths, after how many steps, and who wrote them."""

    global_step: int
    processes: int
    engine: str | None
    files: dict[str, SavedFile]


def clear(folder: Path) -> None:
    """Remove an older checkpoint's state from the folder of a new one, first the file that marks it as finished.

    More ranks or another engine may have written the older one. Their files would stay among those of the new save.
    """
    for pattern in (STATE, MANIFEST, *_OF_STATE):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_manifest(folder: Path, global_step: int, processes: int, engine: str | None = None) -> None:
    """Write the manifest of a checkpoint whose files are all written; it appears whole or not at all."""
    files = {path.relative_to(folder).as_posix(): _as_saved(path) for path in _to_list(folder)}
    content = asdict(Manifest(global_step, processes, engine, files))
    write_text(folder / MANIFEST, json.dumps({"format": _FORMAT, "lorapro_hf": __version__, **content}, indent=1))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint, which older versions and other trainers do not write.

    Raises:
        ValueError: it is damaged, or of a later version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES >> 20} MB")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError("it is cut off, or was never JSON") from error
    try:
        return _parsed(content)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("it does not list files as LoRA-Pro does") from error


def find_change(folder: Path, manifest: Manifest, checksums: bool = True) -> str | None:
    """The first file that is missing, changed, or of another save; `None` if there is none.

    Files that no training resumes from may be changed and added. Random states of other nodes may be added. Without
    `checksums` no file is read.
    """
    missing = [name for name in manifest.files if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    for path in _to_list(folder):
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files and not path.match("rng_state_*"):
            return f"{name} is of another save (it is not listed in {MANIFEST})"
    for name, saved in manifest.files.items():
        file = folder / name
        if file.stat().st_size != saved.size:
            return f"{name} is of another save or damaged ({file.stat().st_size} bytes instead of {saved.size})"
    for name, saved in manifest.files.items() if checksums else ():
        if _as_saved(folder / name) != saved:
            return f"{name} is of another save or damaged (its checksum differs from that in {MANIFEST})"
    return None


def _parsed(content: dict[str, Any]) -> Manifest:
    if content["format"] > _FORMAT:
        raise ValueError(f"it was written by lorapro_hf {str(content['lorapro_hf'])[:20]}, later than {__version__}")
    files = {name: SavedFile(int(each["size"]), tuple(each["crc32"])) for name, each in content["files"].items()}
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"it lists {name[:80]!r}, which is not in the checkpoint")
    return Manifest(int(content["global_step"]), int(content["processes"]), content["engine"], files)


def _to_list(folder: Path) -> Iterator[Path]:
    """The files that a training resumes from: the trainer's state, an optimizer's, an engine's, and weights."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (str(name) == STATE or _is_state(name) or _is_weights(name.name)) and path.is_file():
            yield path


def _is_state(path: PurePath) -> bool:
    is_beside = any(fnmatchcase(path.name, pattern) for pattern in _BESIDE_IT)
    return not is_beside and any(fnmatchcase(path.parts[0], pattern) for pattern in _OF_STATE)


def _is_weights(name: str) -> bool:
    return name in WEIGHTS or name.endswith(".index.json") or _SHARD.fullmatch(name) is not None


def _as_saved(file: Path) -> SavedFile:
    known = file.stat()
    return _read_through(file, known.st_size, known.st_mtime_ns, known.st_ino)


@lru_cache(maxsize=4096)
def _read_through(file: Path, size: int, *_: int) -> SavedFile:
    """The checksums of a file, which is read once unless it has changed since."""
    pieces = range(0, size, _PIECE)
    with ThreadPoolExecutor(min(len(pieces) or 1, os.cpu_count() or 1, 8)) as pool:
        return SavedFile(size, tuple(pool.map(partial(_crc32, file), pieces)))


def _crc32(file: Path, start: int) -> int:
    checksum = 0
    with file.open("rb") as stream:
        stream.seek(start)
        for _ in range(_PIECE // _READ):
            checksum = zlib.crc32(stream.read(_READ), checksum)
    return checksum
