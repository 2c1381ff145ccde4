"""How does a report look as text? The template `report.txt.jinja` says it, and these are its filters."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorapro_hf.checkpoints.adapters import PREFIX
from lorapro_hf.checkpoints.manifest import MANIFEST
from lorapro_hf.checkpoints.resume import newest_complete
from lorapro_hf.commands.inspect.report import Checkpoint, Report
from lorapro_hf.config import LoRAProConfig
from lorapro_hf.hub.describe import layer_kind
from lorapro_hf.optim.memory import readable_bytes


def text(report: Report, every_pair: bool = False) -> str:
    """A report as text; with `every_pair` it names each pair instead of grouping them by shape."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {
        "aligned": _aligned,
        "few": _few,
        "in_bytes": lambda count: "not known" if count is None else readable_bytes(count),
        "kinds": _kinds,
        "name": lambda folder: Path(folder).name,
        "number": lambda value: "–" if value is None else f"{value:g}",
        "resumed": _resumed,
        "state": _state,
        "step": _step,
        "wrapped": lambda line: textwrap.indent(textwrap.fill(line, 108, break_on_hyphens=False), "  "),
    }
    templates.tests["search"] = lambda option, part: part in option
    template = templates.get_template("report.txt.jinja")
    return template.render(report=report, every_pair=every_pair, manifest=MANIFEST, prefix=PREFIX).rstrip("\n")


def _aligned(table: str) -> str:
    """Rows of cells, separated by ` | `, as columns; those whose heading ends in `>` are numbers."""
    columns = min(line.count(" | ") for line in table.splitlines())  # a name in the last cell may hold the separator
    rows = [line.split(" | ", columns) for line in table.splitlines()]
    is_number = [cell.endswith(">") for cell in rows[0]]
    rows[0] = [cell.removesuffix(">") for cell in rows[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, is_number, strict=True)
        lines.append("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells))
    return "".join(f"  {line.rstrip()}\n" for line in lines)


def _few(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _kinds(names: Sequence[str]) -> str:
    """`q_proj, o_proj` for the names of their layers."""
    return _few(list(dict.fromkeys(layer_kind(name.split(" ")[0]) for name in names)), 8)


def _step(found: Checkpoint) -> str:
    if found.step is None:
        return "–"
    return f"{found.step} of {found.max_steps}" if found.max_steps else f"{found.step}"


def _state(found: Checkpoint) -> str:
    if not found.settings:
        starts_anew = found.optimizer == "none" and found.flaw is None
        return "none: moments and schedule start anew" if starts_anew else found.optimizer
    settings = found.settings
    parts = [found.optimizer]
    if "mode" in settings:
        parts.append(f"mode {settings['mode']}")
        defaults = {setting.name: setting.default for setting in fields(LoRAProConfig)} | {"mode": settings["mode"]}
        parts += [f"{name}={value}" for name, value in settings.items() if defaults.get(name, value) != value]
    return ", ".join([*parts, f"{found.stepped_tensors} tensors", f"learning rate {settings['learning_rate']:.3g}"])


def _resumed(found: Sequence[Checkpoint]) -> str:
    """What `resume_from_checkpoint=True` does with these checkpoints, the newest first."""
    flaws = {Path(each.folder): each.flaw for each in found}
    newest = next(iter(flaws))
    try:
        whole, _ = newest_complete(newest.parent, list(flaws), flaws.__getitem__)
    except ValueError:
        return "is refused, since none of them is complete: start again"
    if whole is None:
        return "starts the training anew, since no save was finished"
    if whole == newest:
        return f"goes on from {whole.name}, the newest"
    return f"passes over {newest.name} and goes on from {whole.name}, the newest complete one"
