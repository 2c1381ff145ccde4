"""How does a command show its progress?"""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_SHORTEST_BAR = 8


class _GivingWay(TextColumn):
    """A text that is cut off with `…` on a narrow line."""

    def __init__(self, format: str) -> None:
        super().__init__(format, table_column=Column())

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def progress_bars(console: Console) -> Progress:
    """Bars with a description, counts, elapsed and remaining time, and the task's field `note`.

    On a narrow terminal the bar gets shorter first, then description and note; counts and times are never cut.
    """
    return Progress(
        _GivingWay("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, width=_SHORTEST_BAR)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _GivingWay("{task.fields[note]}"),
        console=console,
        expand=True,
    )
