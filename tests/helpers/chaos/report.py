"""The report of a chaos run: a table of what was tried and how it ended, and the cases that failed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from .cases import TRICKS, Result
from .verdicts import FAILURES, MEANINGS, SILENT, VERDICTS


def write_report(folder: Path, results: list[Result], seed: int, versions: str) -> Path:
    """Write `results.json` and `report.md`, and return the latter."""
    rows = {"seed": seed, "versions": versions, "cases": [result.as_dict() for result in results]}
    (folder / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    file = folder / "report.md"
    file.write_text(markdown(results, seed, versions), encoding="utf-8")
    return file


def markdown(results: list[Result], seed: int, versions: str) -> str:
    """The report as Markdown."""
    failed = [result for result in results if result.verdict in FAILURES]
    lines = ["# Chaos run", "", f"Seed {seed}; {versions}.", "", f"**{summary(results)}**", ""]
    lines += [*_table(results), "", "## Endings", ""]
    lines += [f"- **{verdict}**: {MEANINGS[verdict]}" for verdict in VERDICTS]
    lines += ["", "## Tricks", ""]
    lines += [f"- **{name}**: {trick.__doc__}" for name, trick in TRICKS.items()]
    if failed:
        lines += ["", "## Failures", ""]
        lines += [
            f"- {result.verdict}: {result.tried}. {result.detail} Again: `{repeat(result, seed)}`" for result in failed
        ]
    return "\n".join(lines) + "\n"


def summary(results: list[Result]) -> str:
    """Number of cases, silent differences and other failures in one line."""
    count = Counter(result.verdict for result in results)
    others = [
        f"{count[verdict]} {verdict}" for verdict in VERDICTS if verdict in FAILURES - {SILENT} and count[verdict]
    ]
    return ", ".join([f"{len(results)} cases", f"{count[SILENT]} silent differences", *others])


def repeat(result: Result, seed: int) -> str:
    """The command that repeats a case."""
    return f'make chaos ARGS="--seed {seed} --only {result.name}"'


def _table(results: list[Result]) -> list[str]:
    count = Counter((_row(result), result.verdict) for result in results)
    shown = [verdict for verdict in VERDICTS if verdict not in FAILURES or any(key[1] == verdict for key in count)]
    if SILENT not in shown:
        shown.append(SILENT)
    lines = ["| engine | trick | cases | " + " | ".join(shown) + " |", "|---|---|" + "---:|" * (len(shown) + 1)]
    for row in sorted({_row(result) for result in results}):
        of_row = [count[row, verdict] for verdict in shown]
        lines.append(f"| {row[0]} | {row[1]} | {sum(of_row)} | " + " | ".join(str(n or "") for n in of_row) + " |")
    sums = [sum(count[row, verdict] for row in {key[0] for key in count}) for verdict in shown]
    lines.append(f"| **all** | | {len(results)} | " + " | ".join(map(str, sums)) + " |")
    return lines


def _row(result: Result) -> tuple[str, str]:
    engine, trick, _ = result.name.split(":")
    return engine, trick
