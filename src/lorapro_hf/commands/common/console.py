"""How do long commands end early, and where do they write?"""

from __future__ import annotations

from pathlib import Path

from lorapro_hf.options import UsageError

INTERRUPTED = 130  # the exit code after Ctrl-C


def prepare_output(folder: Path) -> None:
    """Make the output folder, before any time is spent.

    Raises:
        UsageError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"Cannot write to --output_dir {str(folder)!r}: {error}. Choose another folder.") from error
