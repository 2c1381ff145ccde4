"""How is a comparison told to people?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lorapro_hf.commands.common.records import write_json
from lorapro_hf.commands.compare.figures import draw
from lorapro_hf.commands.compare.findings import CELL, sentences, within_noise
from lorapro_hf.commands.compare.significance import has_scipy
from lorapro_hf.commands.compare.store import Store
from lorapro_hf.commands.compare.summary import UNEVEN, Summary, summarize
from lorapro_hf.commands.compare.tables import NONE, of_cell, overview, plain
from lorapro_hf.optim.memory import readable_bytes
from lorapro_hf.utils.text_files import write_text

FIGURES, MARKDOWN, SUMMARY = "figures", "report.md", "summary.json"
_TEMPLATE = Path(__file__).with_name("report.md.j2")


def write_report(folder: Path) -> Summary:
    """Write `summary.json`, `report.md` and its figures from the results of a folder, and return the summary."""
    store = Store(folder)
    summary = summarize(store)
    (folder / FIGURES).mkdir(exist_ok=True)
    for old in (folder / FIGURES).glob("*.png"):
        old.unlink()
    pictures = draw(summary)
    for name, picture in pictures.items():
        (folder / FIGURES / f"{name}.png").write_bytes(picture)
    write_text(folder / MARKDOWN, _render(summary, store.sweep()["methods"], list(pictures)))
    write_json(folder / SUMMARY, asdict(summary))
    return summary


def _render(summary: Summary, methods: dict[str, Any], pictures: list[str]) -> str:
    """The report in GitHub's Markdown, with the methods of `sweep.json` and the names of the figures."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {"cell": plain, "value": _value}
    environment.filters["size"] = lambda value: NONE if value is None else readable_bytes(value)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        summary=summary,
        result=sentences(summary),
        overview=overview(summary).markdown(),
        main=[of_cell(cell, summary.settings).markdown() for cell in summary.comparisons],
        noise=[within_noise(cell, summary.settings) for cell in summary.comparisons],
        explained=CELL,
        settings=summary.settings,
        methods=methods,
        tasks={task["name"]: task for task in summary.settings["tasks"]},
        pictures=pictures,
        folder=FIGURES,
        has_scipy=has_scipy(),
        uneven=UNEVEN - 1,
    )


def _value(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
