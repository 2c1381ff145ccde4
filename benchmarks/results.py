"""Writes docs/results.md from the summaries in docs/results and docs/pictures/gradient_gap.json.

    python benchmarks/results.py                # rewrites the page
    python benchmarks/results.py --take small   # before, takes the summary of runs/compare-small: `make compare-small`
    python benchmarks/results.py --check        # exit code 1 if docs/results.md says something else

No figure is typed in, and no run of the comparisons is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE, GAP = DOCS / "results.md", DOCS / "pictures" / "gradient_gap.json"
MAIN = ("small", "long", "ranks")  # of configs/compare, each with a folder in docs/results
WHOLE, LIMITS, COSTS, NEIGHBOURS = "whole", "limits", "costs", "neighbours"  # have sections of their own
LORA, FULL = "lora", "full"
OURS = ("pro_full_linear", "pro_full_paper", "pro_factored_linear")
ANSWERS = {"exact_match", "accuracy"}  # a task has one of these metrics at most
BAD = ("diverged", "failed", "missing")
FIGURES = ("loss.png", "rates.png")  # of MAIN[0], which the page shows
DIGITS = 6
EDGES = {"lowest": " ↓", "highest": " ↑", None: ""}

Summary = Mapping[str, Any]
Method = Mapping[str, Any]


def method(comparison: Summary, name: str) -> Method | None:
    """A method of a comparison, if it is part of it."""
    return next((each for each in comparison["methods"] if each["method"] == name), None)


def title(comparison: Summary) -> str:
    """The name of a comparison."""
    return f"{comparison['task'].replace('_', ' ')}, r = {comparison['rank']}"


def spread(values: Mapping[str, float | None], form: str) -> str:
    """Mean and standard deviation over the seeds."""
    return "±".join(format(values[name], form) for name in ("mean", "std") if values[name] is not None)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = ["| " + " | ".join(line) + " |" for line in (list(header), *map(list, rows))]
    return "\n".join([lines[0], f"|{'---|' * (lines[0].count(' | ') + 1)}", *lines[1:]])


def loss(row: Method) -> str:
    """The test loss at the best rate: bold or italic where every seed is better or worse than with LoRA."""
    test = row["against_baseline"]
    mark = "" if test is None else {test["seeds"]: "**", 0: "*"}.get(test["better"], "")
    return f"{mark}{spread(row['test']['loss'], '.3f')}{mark} ({row['learning_rate']:g}{EDGES[row['at_edge']]})"


def right(row: Method) -> str:
    """The fraction of right answers."""
    return spread(row["test"][min(ANSWERS & row["test"].keys())], ".1%")


def by_method(comparisons: list[Summary], cells: Mapping[str, Callable[[Method], str]]) -> str:
    """A line for each method and columns for each comparison."""
    rows = []
    for name, label in {each["method"]: each["title"] for c in comparisons for each in c["methods"]}.items():
        line = [label]
        for row in (method(comparison, name) for comparison in comparisons):
            missing = "–" if row is None else "none finished"
            line += [missing if row is None or row["learning_rate"] is None else cell(row) for cell in cells.values()]
        rows.append(line)
    return table(["method", *(f"{title(c)}{column}" for c in comparisons for column in cells)], rows)


def without_references(comparison: Summary) -> Summary:
    """The comparison without plain LoRA and full fine-tuning, which the first table shows."""
    return {**comparison, "methods": [row for row in comparison["methods"] if row["method"] not in (LORA, FULL)]}


def answers(comparisons: list[Summary]) -> str:
    """The fraction of right answers of LoRA, LoRA-Pro and full fine-tuning, and the range of all methods."""
    found = [each for each in comparisons if any(ANSWERS & (row["test"] or {}).keys() for row in each["methods"])]
    means = [
        row["test"][min(ANSWERS & row["test"].keys())]["mean"]
        for each in found
        for row in each["methods"]
        if row["learning_rate"] is not None
    ]
    main = [
        {**each, "methods": [row for row in each["methods"] if row["method"] in (LORA, *OURS, FULL)]} for each in found
    ]
    return f"{by_method(main, {'': right})}\n\nAll methods are between {min(means):.1%} and {max(means):.1%}."


def closed(comparisons: list[Summary]) -> str:
    """The fraction of the gap between LoRA and full fine-tuning that LoRA-Pro closes, beside the gap."""
    found = [each for each in comparisons if each["gap"] is not None]
    rows = [["gap", *(f"{each['gap']:.3f}" for each in found)]]
    for name in OURS:
        row_of = [method(each, name) for each in found]
        label = next((row["title"] for row in row_of if row is not None), name)
        rows.append([label, *(_closed(each, row) for each, row in zip(found, row_of, strict=True))])
    return table(["", *map(title, found)], rows)


def _closed(comparison: Summary, row: Method | None) -> str:
    full = method(comparison, FULL)
    if row is None or row["learning_rate"] is None or full is None:
        return "–"
    if row["gap_closed"] is None:
        return "no gap"
    seeds = full["against_baseline"]["seeds"]
    return f"{row['gap_closed']:.0%}" if comparison["gap_seeds"] == seeds else "noise"


def references(comparisons: list[Summary]) -> str:
    """The reference losses of each task, and the tasks on which a unigram model beats tuned LoRA."""
    noted = {each["task"]: each for each in comparisons if each.get("levels")}
    rows, beaten = [], []
    for task, comparison in noted.items():
        found, base = comparison["levels"], method(comparison, LORA)
        rows.append([task.replace("_", " "), f"{found['untrained']:.3f}", f"{found['frequencies']:.3f}"])
        if base is not None and found["frequencies"] < base["test"]["loss"]["mean"]:
            beaten.append(
                f"{task.replace('_', ' ')} ({found['frequencies']:.3f} to {base['test']['loss']['mean']:.3f})"
            )
    text = table(["task", "untrained model", "unigram model"], rows)
    if beaten:
        text += (
            f"\n\nThe unigram model beats tuned LoRA on {' and '.join(beaten)}: that task measures how fast a model "
        )
        text += "returns to token frequencies, and little else."
    return text


def costs(comparison: Summary) -> str:
    """Time and memory of each method."""
    rows = [
        [
            row["title"],
            f"{row['cost']['step_ms']:.0f}",
            f"{row['cost']['optimizer_ms']:.1f}",
            f"{row['cost']['state_bytes'] / 2**20:.1f}",
        ]
        for row in comparison["methods"]
        if row["learning_rate"] is not None
    ]
    return table(["method", "step, ms", "optimizer, ms", "state, MiB"], rows)


def neighbours(comparison: Summary) -> str:
    """The test loss of each method beside an optimizer, with AdamW and with LoRA-Pro."""
    rows = []
    for row in comparison["methods"]:
        name = row["method"]
        ours = method(comparison, "pro_full_linear" if name == LORA else f"pro_{name}")
        if not name.startswith("pro_"):
            losses = (
                "–" if x is None else f"{x['test']['loss']['mean']:.3f} ({x['learning_rate']:g}{EDGES[x['at_edge']]})"
                for x in (row, ours)
            )
            rows.append([row["title"], *losses])
    return table(["method", "AdamW", "LoRA-Pro full"], rows)


def evenness(comparison: Summary) -> str:
    """How far times can be trusted, by how far they differ where nothing differs but the seed."""
    spread = comparison["step_spread"]
    if spread is None or spread["best"] is None:
        return "With one seed there is no telling how far the times can be trusted."
    text = f"From seed to seed the median step of a method differs by up to {spread['best'] - 1:.0%}"
    return f"{text}: other work was on the machine, and smaller differences say nothing." * bool(spread["uneven"]) or (
        f"{text}."
    )


def all_runs(summaries: Mapping[str, Summary]) -> str:
    """The number of runs and how they ended, in a sentence's part; a run in several comparisons counts once."""
    found: dict[str, tuple[str, bool, set[str]]] = {}
    for folder, summary in summaries.items():
        for rate in (rate for c in summary["comparisons"] for row in c["methods"] for rate in row["rates"]):
            for seed, key in rate["keys"].items():
                folders = found[key][2] if key in found else set()
                found[key] = (rate["status"][seed], int(seed) in rate["no_better"], folders | {folder})
    statuses = [status for status, _, _ in found.values()]
    bad = ", ".join(f"{statuses.count(kind)} {kind}" for kind in BAD)
    shared = sum(len(folders) > 1 for _, _, folders in found.values())
    several = f" ({shared} of them in more than one comparison)" if shared else ""
    no_better = sum(worse for _, worse, _ in found.values())
    ended = f"{no_better} ended no better than they began, by their training loss"
    return f"{len(found)} runs{several}, of which {bad}; {ended}"


def page(summaries: Mapping[str, Summary], gap: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        summaries: By the names of the comparisons.
        gap: The figures of the gap of the gradients.
    """
    main = [each for name in MAIN for each in summaries[name]["comparisons"]]
    first, cost = summaries[MAIN[0]], summaries[COSTS]
    shared = set.intersection(*(set(summaries[name]["environment"].items()) for name in MAIN))
    return PAGE_TEXT.format(
        runs=all_runs({name: summaries[name] for name in (*MAIN, LIMITS)}),
        seeds=len(first["settings"]["seeds"]),
        losses=by_method(main, {"": loss}),
        references=references(main),
        answers=answers(main),
        closed=closed(main),
        gap=gap,
        whole=by_method(summaries[WHOLE]["comparisons"], {", test loss": loss, ", right answers": right}),
        limits=by_method([without_references(each) for each in summaries[LIMITS]["comparisons"]], {"": loss}),
        neighbours=neighbours(summaries[NEIGHBOURS]["comparisons"][0]),
        costs=costs(cost["comparisons"][0]),
        timed=title(cost["comparisons"][0]),
        steps=cost["settings"]["tasks"][0]["steps"],
        evenness=evenness(cost["comparisons"][0]),
        environment=", ".join(f"{k} {v}" for k, v in first["environment"].items() if (k, v) in shared),
    )


PAGE_TEXT = """# Results

<!-- Written by benchmarks/results.py from the summaries in results and pictures/gradient_gap.json. -->

Methods are trained at several learning rates under {seeds} seeds, on the same batches in the same order: {runs}. \
These are short trainings of small models on two CPU cores. They show how fast methods learn at their own best rate, \
not how a large model ends. Nobody has run `configs/compare/gpu.yaml` or `configs/paper/` on large models yet.

`make compare-small` and its siblings make the runs again and rewrite this page. The summaries have all rates and \
seeds: [small](results/small/summary.json), [long](results/long/summary.json), [ranks](results/ranks/summary.json), \
[whole](results/whole/summary.json), [limits](results/limits/summary.json), [costs](results/costs/summary.json), \
[neighbours](results/neighbours/summary.json).

## Test loss

Mean ± standard deviation at the learning rate (in brackets) with the best validation loss. **Bold**: better than \
tuned LoRA on every seed; *italic*: worse on every seed. ↓, ↑: the rate ends its grid, so a better one may lie beyond. \
The first blocks of SmolLM2-135M, with a smaller vocabulary, learn word problems and code; MiniLM learns docstrings.

{losses}

Reference losses:

{references}

## Gap closed

The table shows how far LoRA-Pro gets from tuned LoRA's test loss (0 %) to that of full fine-tuning (100 %). "noise": \
not every seed shows a gap; "no gap": full fine-tuning is not better.

{closed}

In two trainings that [measure the gradients](diagnostics.md#plots), the equivalent gradient was closer to the true \
one than plain LoRA's in {gap[closer]} of {gap[measured]} measurements, and the sequential step equalled its formula \
up to {gap[largest_step_error]:.1e}.

## Right answers

The accuracy on docstrings at the same rates:

{answers}

## The whole model

The whole SmolLM2-135M is trained on other word problems for the 24 steps of `make demo`, and writes the answers \
itself. The limit of 0.03 would shorten most of these steps, so LoRA-Pro has a wider limit here.

{whole}

## The limit of a step

These are limits of the [trust region](how_it_works.md#linear-and-sequential) in mode `full`. That of the other \
comparisons, 0.03, was chosen on these same tasks: the modes `full` and `factored` have one more tuned setting than \
the other methods.

{limits}

## Methods beside LoRA-Pro

The [methods](methods.md) with AdamW and with LoRA-Pro, on MiniLM's docstrings for 60 steps (test loss, one seed). \
Seeds differ by 0.035, so that LoRA-SB alone is clearly behind.

{neighbours}

## Cost

The times are medians of {steps} steps on {timed}, in one process, at the best rate. {evenness} \
[Memory and speed](speed.md) has the times of large models.

{costs}

## Curves

![Loss against steps, small](results/small/figures/loss.png)

![Test loss against learning rate, small](results/small/figures/rates.png)

Versions: {environment}.
"""


def summary(name: str) -> Summary:
    """The summary of a comparison."""
    found: Summary = json.loads((DOCS / "results" / name / "summary.json").read_text(encoding="utf-8"))
    return found


def take(name: str) -> None:
    """Keep the summary of a comparison's last run, without spaces and with fewer digits, and the figures shown."""
    source, kept = ROOT / "runs" / f"compare-{name}", DOCS / "results" / name
    found = json.loads((source / "summary.json").read_text(encoding="utf-8"))
    # the folder may have been copied from one that names a machine
    found["settings"]["output_dir"] = source.relative_to(ROOT).as_posix()
    kept.mkdir(parents=True, exist_ok=True)
    content = json.dumps(shortened(found), separators=(",", ":"), allow_nan=False)
    (kept / "summary.json").write_text(f"{content}\n", encoding="utf-8")
    for figure in FIGURES if name == MAIN[0] else ():
        (kept / "figures").mkdir(exist_ok=True)
        shutil.copy(source / "figures" / figure, kept / "figures")


def shortened(value: Any) -> Any:
    """The same content with each number rounded to a few significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list):
        return [shortened(each) for each in value]
    return {key: shortened(each) for key, each in value.items()} if isinstance(value, dict) else value


def main(check: bool, taken: str | None = None) -> int:
    """Write the page, or say whether it is up to date."""
    if taken is not None:
        take(taken)
    made = page(
        {name: summary(name) for name in (*MAIN, WHOLE, LIMITS, COSTS, NEIGHBOURS)}, json.loads(GAP.read_text("utf-8"))
    )
    if check:
        return int(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not up to date, and leave it")
    parser.add_argument("--take", metavar="NAME", help="keep the summary and figures of runs/compare-NAME first")
    arguments = parser.parse_args()
    sys.exit(main(arguments.check, arguments.take))
