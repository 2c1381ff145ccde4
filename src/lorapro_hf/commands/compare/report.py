"""How is a comparison told to people?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lorapro_hf.commands.common.records import write_json
from lorapro_hf.commands.compare.figures import draw
from lorapro_hf.commands.compare.significance import has_scipy
from lorapro_hf.commands.compare.store import Store
from lorapro_hf.commands.compare.summary import UNEVEN, Summary, summarize
from lorapro_hf.optim.memory import readable_bytes
from lorapro_hf.utils.text_files import write_text

FIGURES, MARKDOWN, SUMMARY = "figures", "report.md", "summary.json"
_TEMPLATE = Path(__file__).with_name("report.md.j2")
_NONE = "–"


def write_report(folder: Path) -> Summary:
    """Write `summary.json`, `report.md` and its figures from the results of a folder, and return the summary."""
    store = Store(folder)
    summary, sweep = summarize(store), store.sweep()
    (folder / FIGURES).mkdir(exist_ok=True)
    pictures = draw(summary, [name for name, method in sweep["methods"].items() if method["is_lora_pro"]])
    for name, picture in pictures.items():
        (folder / FIGURES / f"{name}.png").write_bytes(picture)
    write_text(folder / MARKDOWN, _render(summary, sweep, sorted(pictures)))
    write_json(folder / SUMMARY, asdict(summary))
    return summary


def _render(summary: Summary, sweep: dict[str, Any], pictures: list[str]) -> str:
    """The report in GitHub's Markdown, of a summary, the content of `sweep.json` and the names of the figures."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {"cell": _cell, "value": _value}
    environment.filters["size"] = lambda value: _NONE if value is None else readable_bytes(value)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        summary=summary,
        settings=summary.settings,
        methods=sweep["methods"],
        tasks={task["name"]: task for task in summary.settings["tasks"]},
        pictures=pictures,
        folder=FIGURES,
        has_scipy=has_scipy(),
        uneven=UNEVEN - 1,
    )


def _cell(text: object) -> str:
    """Text on one line, without marks of Markdown."""
    plain = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_|<>[]" else letter for letter in plain)


def _value(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)
