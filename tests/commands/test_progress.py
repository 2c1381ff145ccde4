"""Bars at every width of a terminal: counts and times are whole, texts give way."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

import lorapro_hf
from lorapro_hf.commands.common.console import progress_bars

TASKS = [
    ("Training LoRA-Pro efficient", 24, 240, "loss 0.123"),
    ("Evaluating LoRA-Pro full_8bit", 16, 16, "loss 0.123, 12.5% right"),
    ("Runs", 124, 1240, "about 1 h 02 min left"),
    ("code r=8: LoRA-Pro full, sequential, trust region 0.1", 200, 1000, "lr 0.0003, seed 0"),
]


def drawn(width: int) -> list[str]:
    """The line of each task on a terminal of that width."""
    progress = progress_bars(Console(width=width, force_terminal=True, file=io.StringIO()))
    for description, done, total, note in TASKS:
        progress.update(progress.add_task(description, total=total, note=note), completed=done)
    paper = Console(width=width, record=True, file=io.StringIO())
    paper.print(progress.make_tasks_table(progress.tasks))
    return paper.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 90, 120, 200])
def test_counts_and_times_are_whole(width: int):
    lines = drawn(width)
    assert len(lines) == len(TASKS) and all(len(line) <= width for line in lines)
    for line, (_, done, total, _) in zip(lines, TASKS, strict=True):
        assert re.search(rf" {done}/{total} +\d:\d\d:\d\d (\d|-):(\d|-){{2}}:(\d|-){{2}}( |$)", line), line
        assert re.search("[━╸╺]", line)


def test_texts_give_way_and_say_so():
    for line, (description, _, _, note) in zip(drawn(60), TASKS, strict=True):
        assert line.startswith(description) or re.match(rf"{re.escape(description[:10])}.*… ", line)
        assert note in line or line.endswith("…")
    assert all(note in line for line, (_, _, _, note) in zip(drawn(90), TASKS, strict=True))
    for line, (description, _, _, note) in zip(drawn(130), TASKS, strict=True):
        assert line.startswith(f"{description} ") and note in line


def test_all_commands_draw_the_same_bars():
    root = Path(lorapro_hf.__file__).parent
    assert [path.name for path in root.rglob("*.py") if "Progress(\n" in path.read_text()] == ["console.py"]
