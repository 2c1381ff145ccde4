"""How does a folder appear whole or not at all?"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorapro_hf.options import UsageError


def require_free(output: Path, overwrite: bool, used: Iterable[str]) -> None:
    """Refuse an output folder with files, unless it holds a model that may be replaced.

    Args:
        output: the folder.
        overwrite: whether a model in it may be replaced.
        used: the names of adapter and base model, which must not lie in it.

    Raises:
        UsageError: the folder exists and is not empty.
    """
    if not (output.exists() or output.is_symlink()) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{output} exists and is not empty: name a new folder, or replace it by --overwrite.")
    if not (output / "config.json").is_file():
        raise UsageError(f"{output} holds no model (config.json), so that --overwrite leaves it: name a new folder.")
    for folder in (Path.cwd(), *map(Path, used)):
        if folder.exists() and folder.resolve().is_relative_to(output.resolve()):
            raise UsageError(f"--overwrite would remove {folder}, which is in use: name a new folder as OUT.")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, which takes its name and its place at the end, and is removed after an exception.

    Raises:
        UsageError: the folder cannot be made.
    """
    output = output.absolute()
    draft, old = (output.with_name(f".{output.name}.{secrets.token_hex(4)}.{end}") for end in ("part", "old"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}. Choose another folder as OUT.") from error
    try:
        yield draft
        if output.exists():
            output.rename(old)
        draft.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
