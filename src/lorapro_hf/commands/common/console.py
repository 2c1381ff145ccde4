"""How does a long command show its progress, where does it write, and how does it end early?"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from lorapro_hf.options import UsageError

INTERRUPTED = 130  # the exit code after Ctrl-C
_SHORTEST_BAR = 8


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


class _GivingWay(progress.TextColumn):
    """A text that is cut off with `…` on a narrow line."""

    def render(self, task: progress.Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def progress_bars(console: Console) -> progress.Progress:
    """Bars with a description, counts, elapsed and remaining time, and the task's field `note`.

    On a narrow terminal the bar gets shorter first, then description and note; counts and times are never cut.
    """
    return progress.Progress(
        _GivingWay("{task.description}", table_column=Column()),
        progress.BarColumn(bar_width=None, table_column=Column(ratio=1, width=_SHORTEST_BAR)),
        progress.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
        progress.TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _GivingWay("{task.fields[note]}", table_column=Column()),
        console=console,
        expand=True,
    )


@contextmanager
def ctrl_c(handler: Any) -> Iterator[None]:
    """Handle Ctrl-C with `handler`; outside the main thread, where Python handles no signals, change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
