"""Writes docs/results.md and its pictures from the summaries in docs/results and docs/pictures/gradient_gap.json.

    python benchmarks/results.py                # rewrites page and pictures
    python benchmarks/results.py --take small   # before, takes the summary of runs/compare-small: `make compare-small`
    python benchmarks/results.py --check        # exit code 1 if docs/results.md says something else

No figure is typed in, and no run of the comparisons is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from results_parts import facts
from results_parts.summaries import Cell, cells_of, default_of, read

from lorapro_hf.commands.compare.findings import Standing, listed, ours_of, standings
from lorapro_hf.commands.compare.summary import Summary
from lorapro_hf.commands.compare.tables import spread

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE, KEPT, GAP = DOCS / "results.md", DOCS / "results", DOCS / "pictures" / "gradient_gap.json"
TABLED = ("small", "long", "whole", "held_out")  # of configs/compare, each with a folder in docs/results
NEIGHBOURS, COSTS = "neighbours", "costs"  # have sections of their own
PICTURES = {
    "loss": "Training loss against step, mean over the seeds",
    "methods": "Final and early loss over tuned LoRA's, with standard errors",
    "rates": "Test loss against learning rate, under the tuning seeds",
    "cost": "Test loss against optimizer state (and time of a step, where nothing else ran)",
}
ANSWERS = ("exact_match", "accuracy")  # a task has one of these metrics at most
DIGITS = 6
COLUMNS = 4  # of a table, beside the method

PAGE_TEXT = """# Results

<!-- Written by benchmarks/results.py from the summaries in results and pictures/gradient_gap.json. -->

Small models were trained on CPU cores ({runs}). [Every method is tuned alike](compare.md#a-fair-comparison). Figures \
are means ± standard errors over the reported seeds, on data that chose no rate. A cell is a task at one rank and \
number of steps. "Better" and "worse" mean a paired difference from tuned LoRA of more than two standard errors. \
Nobody has run `configs/compare/gpu.yaml` or `configs/paper/` yet.{absent}

## In short

{short}

In two trainings that [measure the gradients](diagnostics.md#plots), the equivalent gradient was closer to the true \
one than plain LoRA's in {gap[closer]} of {gap[measured]} measurements.

## Targets

{targets}

## Losses

Each entry has the final test loss, the early loss (training loss of the first quarter of the steps) and the right \
answers. **Bold**: better than tuned LoRA; *italic*: worse.

{tables}

## Pictures

{pictures}

## Methods beside LoRA-Pro

{neighbours}

RunLoRA and LoRA-FAIR change no training step of a client; [their figures](methods.md#fused-layers) are times.

## Two published claims

**LoRA-TSD's table has LoRA-Pro below AdamW** on six classification tasks, all methods started from gradients. Our \
closest cells, LoRA-Pro against AdamW from the same start:

{starts}

**[arXiv 2602.04998](https://arxiv.org/abs/2602.04998) finds tuned LoRA equal to its variants.** {variants}

## Cost

{costs}

## One command for each figure

{commands}

Versions: {environment}.
"""


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    head, *lines = [list(header), *map(list, rows)]
    return "\n".join(f"|{'|'.join(line)}|" for line in (head, ["---"] * len(head), *lines))


def bullets(lines: Sequence[str], otherwise: str) -> str:
    """A list of Markdown."""
    return "\n".join(f"- {line}" for line in lines) if lines else otherwise


def entry(cell: Cell, name: str) -> str:
    """The figures of a method in a cell: bold where better than LoRA, italic where worse."""
    row = next((row for row in cell.found.methods if row.method == name), None)
    if row is None:
        return "–"
    if not row.test:
        return "none finished"
    lines = []
    for figure, kind in ((row.test["loss"], "loss"), (row.early, "early")):
        verdict = cell.found.verdicts[kind]
        mark = "**" if name in verdict.better else "*" if name in verdict.worse else ""
        text = "–" if figure is None else spread(figure) if kind == "loss" else f"{figure.mean:.3f}"
        lines.append(f"{mark}{text.replace(' ', '')}{mark}")
    right = [f"{row.test[answers].mean:.1%}" for answers in ANSWERS if answers in row.test]
    return "<br>".join([lines[0], ", ".join([lines[1], *right])])


def tables(cells: Sequence[Cell]) -> str:
    """A table for each number of steps: a row for each method, a column for each task and rank."""
    parts = []
    most = max(cells, key=lambda cell: len(cell.found.methods))
    titles = {row.method: row.title for cell in (most, *cells) for row in cell.found.methods}
    order = [*(name for name in titles if name != facts.FULL), facts.FULL]
    for steps in dict.fromkeys(cell.found.steps for cell in cells):
        parts.append(f"### {steps:,} steps")
        for columns in _that_fit([cell for cell in cells if cell.found.steps == steps]):
            there = {row.method for cell in columns for row in cell.found.methods}
            header = ["method", *(f"{cell.found.task}<br>r = {cell.found.rank}" for cell in columns)]
            rows = [[titles[name], *(entry(cell, name) for cell in columns)] for name in order if name in there]
            parts.append(table(header, rows))
    return "\n\n".join(parts)


def _that_fit(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The columns of tables that fit a page: those with few methods get one of their own."""
    if len(cells) <= COLUMNS:
        return [[*cells]]
    most = max(len(cell.found.methods) for cell in cells)
    kinds = [[cell for cell in cells if (2 * len(cell.found.methods) > most) is many] for many in (True, False)]
    return [kind[place : place + COLUMNS] for kind in kinds for place in range(0, len(kind), COLUMNS)]


def short(cells: Sequence[Cell], ours: Sequence[str]) -> str:
    """The best of LoRA-Pro, today's default and the best of the others: how good, and at what cost."""
    found = standings([cell.found for cell in cells], facts.LORA, facts.FULL)
    defaults = {cell.default for cell in cells} - {None}
    lines = [_standing(each, "The default, ") for each in found if each.method in defaults]
    for names, start in ((ours, "Lowest of LoRA-Pro's modes, "), (facts.PEERS[1:], "Lowest of the peers, ")):
        own = [each for each in found if each.method in names]
        most = max((each.cells for each in own), default=0)
        # a method of few cells has other rivals
        best = next((each for each in own if 2 * each.cells >= most and each.final is not None), None)
        if best is not None and best.method not in defaults:
            lines.append(_standing(best, start))
    full = next((each for each in found if each.method == facts.FULL and each.final is not None), None)
    if full is not None:
        lines.append(f"Full fine-tuning ends at ×{full.final:.2f} LoRA's loss, with ×{full.state or 0:.0f} its state.")
    behind = [each.title for each in found if each.worse > each.better and each.method in ours]
    lines.append(f"More often worse than better than tuned LoRA: {listed(behind)}.")
    return bullets(lines, "")


def _standing(each: Standing, start: str) -> str:
    ratios = {"final": each.final, "early": each.early, "early to full fine-tuning's": each.early_of_reference}
    ratios |= {"time of a step": each.time, "state": each.state}
    shown = ", ".join(f"{name} ×{value:.2f}" for name, value in ratios.items() if value is not None)
    counts = f"better in {each.better}, level in {each.level}, worse in {each.worse} of {each.cells} cells"
    return f"{start}{each.title}: {counts} (means beside LoRA: {shown})."


def costs(found: Summary | None) -> str:
    """Time and memory of each method, and how far the times can be trusted."""
    if found is None:
        return "`make compare-costs` has not been run in this form."
    (cell, *_) = found.comparisons
    size = lambda row: "–" if row.cost["state_bytes"] is None else f"{row.cost['state_bytes'] / 2**20:.1f}"  # noqa: E731
    time = lambda row, name: "–" if row.cost[name] is None else f"{row.cost[name]:.1f}"  # noqa: E731
    rows = [[row.title, time(row, "step_ms"), time(row, "optimizer_ms"), size(row)] for row in cell.methods if row.test]
    spread_ = cell.step_spread
    sure = "" if spread_ is None or spread_.best is None else f" Seeds differ by up to {spread_.best - 1:.0%}."
    text = f"Medians of {cell.steps} steps on {cell.task.replace('_', ' ')}, r = {cell.rank}, in one process.{sure}"
    return f"{text}\n\n{table(['method', 'step, ms', 'optimizer, ms', 'state, MiB'], rows)}"


def shown_cells(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each picture: of each task the longest for curves and rates, the one with most methods else."""
    tasks = list(dict.fromkeys(cell.found.task for cell in cells))
    by_task = [[cell for cell in cells if cell.found.task == task] for task in tasks]
    longest = [max(own, key=lambda cell: (cell.found.steps, len(cell.found.methods))) for own in by_task]
    widest = [max(own, key=lambda cell: (len(cell.found.methods), cell.found.steps)) for own in by_task]
    return {"loss": longest, "methods": widest, "rates": longest, "cost": widest}


def all_ours(summaries: Mapping[str, Summary]) -> list[str]:
    """The names of all methods that are LoRA-Pro."""
    return list(dict.fromkeys(name for summary in summaries.values() for name in ours_of(summary)))


def draw(cells: Sequence[Cell], summaries: Mapping[str, Summary]) -> dict[str, bytes]:
    """The four pictures over all comparisons."""
    from lorapro_hf.commands.compare.figures import View, pictures_of

    tuning = [seed for summary in summaries.values() for seed in summary.settings["tuning_seeds"]]
    defaults = [cell.default for cell in cells if cell.default is not None]
    made = {}
    for name, chosen in shown_cells(cells).items():
        found = [cell.found for cell in chosen]
        view = View(
            found, facts.LORA, facts.FULL, all_ours(summaries), tuning, [cell.found for cell in cells], defaults
        )
        made |= pictures_of(view, [name])
    return made


def page(found: Mapping[str, Summary], gap: Mapping[str, Any]) -> str:
    """The whole page, from the comparisons that there are."""
    tabled = {name: found[name] for name in TABLED if name in found}
    cells = cells_of(tabled)
    ours = all_ours(found)
    absent = [name for name in (*TABLED, NEIGHBOURS, COSTS) if name not in found]
    started = {name: found[name] for name in (*TABLED, NEIGHBOURS) if name in found}
    environments = [summary.environment for summary in found.values()]
    shared = environments[0] if environments else {}
    shared = {key: value for key, value in shared.items() if all(each.get(key) == value for each in environments)}
    none = "No comparison has been run in this form."
    alone = {name: default_of(summary) or "" for name, summary in started.items()}
    alone |= {NEIGHBOURS: facts.alone(found[NEIGHBOURS])} if NEIGHBOURS in found else {}
    lines = facts.neighbours(found[NEIGHBOURS]) if NEIGHBOURS in found else []
    pictures = [f"{text}:\n\n![{text}](results/{name}.png)" for name, text in PICTURES.items()] if cells else []
    return PAGE_TEXT.format(
        runs=facts.all_runs(found),
        absent=f" Not run in this form: {', '.join(absent)}." if absent else "",
        short=short(cells, ours) if cells else none,
        gap=gap,
        targets=bullets(facts.targets(cells, ours), none) if cells else none,
        tables=tables(cells) if cells else none,
        pictures="\n\n".join(pictures) or none,
        neighbours=bullets(lines, "`make compare-neighbours` has not been run in this form."),
        starts=bullets(facts.starts(cells_of(started), alone), "No cell has a start in both yet."),
        variants=facts.variants(cells) or "No cell has both yet.",
        costs=costs(found.get(COSTS)),
        commands=commands(found),
        environment=", ".join(f"{key} {value}" for key, value in shared.items()) or "none",
    )


def commands(found: Mapping[str, Summary]) -> str:
    """The command that makes each comparison's figures again, and this page."""
    rows = []
    for name in (*TABLED, NEIGHBOURS, COSTS):
        places = "none yet"
        if name in found:
            tasks = dict.fromkeys(cell.task.replace("_", " ") for cell in found[name].comparisons)
            places = f"{', '.join(tasks)} ([all rates and seeds](results/{name}/summary.json))"
        rows.append([f"`make compare-{name}`", places])
    rows.append(["`python benchmarks/results.py`", "the pictures and this page, from the summaries"])
    return table(["command", "figures"], rows)


def take(name: str) -> None:
    """Keep the summary of a comparison's last run, without spaces and with fewer digits."""
    source, kept = ROOT / "runs" / f"compare-{name}", KEPT / name
    found = json.loads((source / "summary.json").read_text(encoding="utf-8"))
    # the folder may have been copied from one that names a machine
    found["settings"]["output_dir"] = source.relative_to(ROOT).as_posix()
    kept.mkdir(parents=True, exist_ok=True)
    content = json.dumps(shortened(found), separators=(",", ":"), allow_nan=False)
    (kept / "summary.json").write_text(f"{content}\n", encoding="utf-8")


def shortened(value: Any) -> Any:
    """The same content with each number rounded to a few significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list):
        return [shortened(each) for each in value]
    return {key: shortened(each) for key, each in value.items()} if isinstance(value, dict) else value


def main(check: bool, taken: str | None = None) -> int:
    """Write the page and its pictures, or say whether the page is up to date."""
    if taken is not None:
        take(taken)
    read_all = {name: read(KEPT / name) for name in (*TABLED, NEIGHBOURS, COSTS)}
    found = {name: summary for name, summary in read_all.items() if summary is not None}
    made = page(found, json.loads(GAP.read_text(encoding="utf-8")))
    if check:
        return int(PAGE.read_text(encoding="utf-8") != made)
    tabled = {name: found[name] for name in TABLED if name in found}
    for name, picture in (draw(cells_of(tabled), tabled) if tabled else {}).items():
        (KEPT / f"{name}.png").write_bytes(picture)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not up to date, and leave it")
    parser.add_argument("--take", metavar="NAME", help="keep the summary of runs/compare-NAME first")
    arguments = parser.parse_args()
    sys.exit(main(arguments.check, arguments.take))
