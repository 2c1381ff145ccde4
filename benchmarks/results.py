"""What did the comparison show, in words and against what was promised? Writes docs/results.md.

    python benchmarks/results.py           # the last step of: make compare-small, compare-ranks and so on
    python benchmarks/results.py --check   # exit code 1 if docs/results.md says something else

Everything comes from the summaries in `docs/results`, which `lorapro compare` wrote, and
`docs/pictures/gradient_gap.json`, which `docs/pictures/gradient_gap.py` wrote: no figure is typed in, and no run of
the comparison is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorapro_hf.config import TRUST_REGION
from lorapro_hf.optim.memory import readable_bytes

DOCS = Path(__file__).parents[1] / "docs"
PAGE, GAP = DOCS / "results.md", DOCS / "pictures" / "gradient_gap.json"
REPORTS = {  # of configs/compare, each with a folder in docs/results
    "small": "word problems and code under the first blocks of SmolLM2-135M, with a vocabulary cut to size, and "
    "docstrings under MiniLM",
    "long": "the word problems of `small` with four times as many steps",
    "ranks": "the docstrings at a lower and a higher rank, with PEFT's LoRA-FA and Riemannian optimizers",
}
WHOLE = "whole"  # another report, of a limit of its own
LIMITS = "limits"  # and one of one method alone
COSTS = "costs"  # and one for the times, made by one process on an idle machine
LORA, FULL = "lora", "full"
OURS = ("pro_full_linear", "pro_full_paper")  # the default and the paper's own step
FACTORED = "pro_factored_linear"
SHARES = {"exact_match", "accuracy"}  # metrics of which a task has one at most
SHARE, STEP = 0.8, 3.0  # of the gap to close; the factor between neighbors of a grid

Summary = Mapping[str, Any]
Method = Mapping[str, Any]


def method(comparison: Summary, name: str) -> Method | None:
    """A method's row if it finished at some rate."""
    found = next((each for each in comparison["methods"] if each["method"] == name), None)
    return found if found is not None and found["learning_rate"] is not None else None


def compared(comparison: Summary, name: str) -> bool:
    """Whether a method is part of it."""
    return any(each["method"] == name for each in comparison["methods"])


def title(comparison: Summary) -> str:
    """How a comparison is called."""
    return f"{comparison['task'].replace('_', ' ')}, r = {comparison['rank']}"


def spread(values: Mapping[str, float | None], form: str) -> str:
    """Mean and standard deviation over the seeds."""
    return " ± ".join(format(values[name], form) for name in ("mean", "std") if values[name] is not None)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def losses(comparisons: list[Summary]) -> str:
    """The test loss of every method on every task at its own best rate."""
    return by_method(
        comparisons, lambda row: f"{spread(row['test']['loss'], '.3f')} ({row['learning_rate']:g}{edge(row)})"
    )


def answers(comparisons: list[Summary]) -> str:
    """The share of right answers where there are some."""
    found = [each for each in comparisons if any(SHARES & row["test"].keys() for row in each["methods"])]
    return by_method(found, lambda row: spread(row["test"][min(SHARES & row["test"].keys())], ".1%"))


def by_method(comparisons: list[Summary], cell: Callable[[Method], str]) -> str:
    """A line for every method and a column for every task."""
    rows = []
    for name, label in {each["method"]: each["title"] for c in comparisons for each in c["methods"]}.items():
        cells = []
        for comparison in comparisons:
            row = method(comparison, name)
            missing = "none finished" if compared(comparison, name) else "–"
            cells.append(missing if row is None else cell(row))
        rows.append([label, *cells])
    return table(["method", *map(title, comparisons)], rows)


def edge(row: Method) -> str:
    """A mark where a better rate may lie beyond the grid."""
    return {"lowest": " ↓", "highest": " ↑"}.get(row["at_edge"] or "", "")


def against_lora(comparison: Summary) -> str:
    """Who is better than LoRA and who is worse, on how many seeds."""
    parts: dict[str, list[str]] = {"better": [], "worse": [], "apart": []}
    for row in comparison["methods"]:
        test = row["against_baseline"]
        if test is None:
            continue
        every = {test["seeds"]: "better", 0: "worse"}.get(test["better"], "apart")
        parts[every].append(f"{row['title']} ({test['difference']:+.3f})")
    words = {
        "better": "Better than tuned LoRA on every seed",
        "worse": "worse on every seed",
        "apart": "now better, now worse",
    }
    said = [f"{words[kind]}: {', '.join(names) if names else 'none'}" for kind, names in parts.items()]
    return f"**{title(comparison)}.** " + "; ".join(said) + "."


def levels(comparisons: list[Summary]) -> str:
    """What the losses can be read by, and what that says of a task; nothing where it was not noted."""
    noted = {each["task"]: each for each in reversed(comparisons) if each.get("levels")}
    if not noted:
        return ""
    words, empty = [], []
    for task, comparison in reversed(noted.items()):
        found = comparison["levels"]
        words.append(
            f"{task.replace('_', ' ')}: untrained {found['untrained']:.3f}, frequencies {found['frequencies']:.3f}"
        )
        base = method(comparison, LORA)
        if base is not None and found["frequencies"] < base["test"]["loss"]["mean"]:
            empty.append(f"{task.replace('_', ' ')} ({found['frequencies']:.3f} to {base['test']['loss']['mean']:.3f})")
    text = (
        "Levels to read them by, of the model before its training and of one that knows only how frequent each token, "
        f"or class, is in the training set: {'; '.join(words)}."
    )
    if empty:
        text += (
            f" The frequencies alone do better than tuned LoRA on {' and '.join(empty)}: that measures how fast a "
            "model gets back to token frequencies, and little else."
        )
    return f"\n\n{text}"


def costs(comparison: Summary) -> str:
    """What each method takes."""
    rows = []
    for row in comparison["methods"]:
        cost = row["cost"]
        if row["learning_rate"] is None:
            continue
        rows.append(
            [
                row["title"],
                f"{cost['step_ms']:.0f}",
                f"{cost['optimizer_ms']:.1f}",
                readable_bytes(cost["state_bytes"]),
                f"{int(cost['trainable']):,}",
            ]
        )
    return table(["method", "step, ms", "of it optimizer, ms", "optimizer state", "trained parameters"], rows)


def evenness(comparison: Summary) -> str:
    """How far times can be trusted, by how far they differ where nothing differs but the seed."""
    spread = comparison["step_spread"]
    if spread is None or spread["best"] is None:
        return "one process. With one seed there is no telling how far the times can be trusted."
    text = f"from seed to seed the median step of a method differs by up to {spread['best'] - 1:.0%}"
    if spread["uneven"]:
        return f"one process; {text}, so that other work was on the machine, and smaller differences say nothing."
    return f"one process, nothing else running; {text}."


def targets(comparisons: list[Summary], gap: Mapping[str, Any]) -> str:
    """What was promised, what came out, and whether the promise is kept."""
    rows = [
        [
            "equivalent gradient closer to the true one than plain LoRA's, on every layer and step measured",
            f"closer in {gap['closer']} of {gap['measured']} measurements",
            verdict(gap["closer"] == gap["measured"]),
        ],
        [
            "sequential step: equal to its formula to 1e-5 in float32, from the first on",
            f"largest error {gap['largest_step_error']:.1e} in {gap['measured_steps']} steps",
            verdict(gap["largest_step_error"] <= 1e-5),
        ],
    ]
    for name in OURS:
        rows += [closed(comparisons, name), not_worse(comparisons, name)]
    rows.append(factored(comparisons))
    for name in OURS:
        rows += [near_full(comparisons, name), as_wide(comparisons, name)]
    return table(["target", "measured", ""], rows)


def verdict(kept: bool | None) -> str:
    """In a word; `None` if no task has decided."""
    return "not decided" if kept is None else "met" if kept else "**missed**"


def name_of(comparisons: list[Summary], name: str) -> str:
    """A method's title."""
    return next(str(each["title"]) for c in comparisons for each in c["methods"] if each["method"] == name)


def judged(
    comparisons: list[Summary], names: tuple[str, ...], what: str, judge: Any, unless: str = "none finished"
) -> list[str]:
    """A row of the targets out of one judgment a task: words and whether the target is kept, `None` for neither."""
    words, kept = [], []
    for comparison in comparisons:
        if not all(compared(comparison, name) for name in names):
            continue
        rows = [method(comparison, name) for name in names]
        said, fine = (unless, False) if None in rows else judge(comparison, *rows)
        words.append(f"{title(comparison)}: {said}")
        kept.append(fine)
    decided = [fine for fine in kept if fine is not None]
    return [what, "; ".join(words), verdict(all(decided) if decided else None)]


def closed(comparisons: list[Summary], name: str) -> list[str]:
    """The share of the gap that is closed."""

    def judge(comparison: Summary, row: Method, base: Method, full: Method) -> tuple[str, bool | None]:
        gap, seeds = comparison["gap"], full["against_baseline"]["seeds"]
        if row["gap_closed"] is None:
            return "full fine-tuning is not better than LoRA, no gap to close", None
        if comparison["gap_seeds"] < seeds:
            said = f"gap within the noise ({gap:.3f}, on {comparison['gap_seeds']} of {seeds} seeds)"
            beyond = row["test"]["loss"]["mean"] - full["test"]["loss"]["mean"]
            return said + (f", and better than full fine-tuning too ({beyond:+.3f})" if beyond < 0 else ""), None
        return f"{row['gap_closed']:.0%} of {gap:.3f}", row["gap_closed"] >= SHARE

    what = f"{name_of(comparisons, name)}: at least {SHARE:.0%} of the gap from LoRA to full fine-tuning closed"
    return judged(comparisons, (name, LORA, FULL), what, judge)


def not_worse(comparisons: list[Summary], name: str) -> list[str]:
    """The mean loss beside that of LoRA."""

    def judge(comparison: Summary, row: Method, base: Method) -> tuple[str, bool]:
        difference = row["test"]["loss"]["mean"] - base["test"]["loss"]["mean"]
        return f"{difference:+.3f}", difference <= 0

    what = f"{name_of(comparisons, name)}: never worse than tuned LoRA (difference of the mean losses)"
    return judged(comparisons, (name, LORA), what, judge)


def factored(comparisons: list[Summary]) -> list[str]:
    """Factored mode beside full mode, both with their default step."""

    def judge(comparison: Summary, row: Method, dense: Method) -> tuple[str, bool]:
        difference = row["test"]["loss"]["mean"] - dense["test"]["loss"]["mean"]
        deviation = dense["test"]["loss"]["std"] or 0.0
        share = row["cost"]["state_bytes"] / dense["cost"]["state_bytes"]
        return f"{difference:+.3f} ({deviation:.3f}), {share:.1%} of the state", difference <= deviation

    what = "factored mode: no further above full mode than one standard deviation of its seeds (in brackets)"
    return judged(comparisons, (FACTORED, OURS[0]), what, judge)


def near_full(comparisons: list[Summary], name: str) -> list[str]:
    """The best rate beside that of full fine-tuning."""

    def judge(comparison: Summary, row: Method, full: Method) -> tuple[str, bool]:
        ratio = row["learning_rate"] / full["learning_rate"]
        said = f"{row['learning_rate']:g}{edge(row)} and {full['learning_rate']:g}{edge(full)}"
        return said, 1 / STEP * 0.9 <= ratio <= STEP * 1.2

    what = f"{name_of(comparisons, name)}: best rate within one step of the grid (×{STEP:g}) of full fine-tuning's"
    return judged(comparisons, (name, FULL), what, judge)


def as_wide(comparisons: list[Summary], name: str) -> list[str]:
    """How far the rate may be off, beside LoRA."""

    def judge(comparison: Summary, row: Method, base: Method) -> tuple[str, bool | None]:
        if row["good_range"] is None or base["good_range"] is None:
            return "no rate at which every seed ended better than it began", None if row["good_range"] else False
        own, of_base = (each["good_range"][1] / each["good_range"][0] for each in (row, base))
        ends = [
            "".join(mark for end, mark in (("lowest", " ↓"), ("highest", " ↑")) if end in each["good_at_edge"])
            for each in (row, base)
        ]
        if own == of_base == 1:
            return f"both one rate of the grid{''.join(dict.fromkeys(filter(None, ends)))}", None
        return f"×{own:.3g}{ends[0]} and ×{of_base:.3g}{ends[1]}", own >= of_base * 0.99

    what = f"{name_of(comparisons, name)}: rates within 2 % of the best validation loss reach as far as LoRA's"
    return judged(comparisons, (name, LORA), what, judge)


def run_counts(comparisons: list[Summary]) -> dict[str, tuple[str, bool, set[str]]]:
    """How every run ended, by its key: status, whether no better than it began, and the reports that it is in."""
    found: dict[str, tuple[str, bool, set[str]]] = {}
    for comparison in comparisons:
        for rate in (rate for row in comparison["methods"] for rate in row["rates"]):
            for seed, key in rate["keys"].items():
                reports = found[key][2] if key in found else set()
                found[key] = (rate["status"][seed], int(seed) in rate["no_better"], reports | {comparison["folder"]})
    return found


def all_runs(comparisons: list[Summary]) -> str:
    """How many runs there are and how they ended, in a sentence's part."""
    counts = list(run_counts(comparisons).values())
    shared = sum(len(reports) > 1 for _, _, reports in counts)
    statuses = [status for status, _, _ in counts]
    bad = ", ".join(f"{statuses.count(kind)} {kind}" for kind in BAD)
    of_several = f" ({shared} of them in more than one of the reports)" if shared else ""
    no_better = sum(worse for _, worse, _ in counts)
    worse_off = f"{no_better} ended no better than they began, by their training loss"
    return f"{len(counts)} runs{of_several}, of which {bad}; {worse_off}"


def curves(comparisons: list[Summary]) -> str:
    """The pictures of each comparison."""
    return "\n\n".join(
        f"![{caption}, {title(c)}](results/{c['folder']}/figures/{c['task']}-r{c['rank']}-{figure}.png)"
        for c in comparisons
        for figure, caption in FIGURES.items()
    )


def page(
    summaries: Mapping[str, Summary], whole: Summary, limits: Summary, cost: Summary, gap: Mapping[str, Any]
) -> str:
    """The whole page.

    Args:
        summaries: Of the reports, by their folder.
        whole: Of the report on the whole model.
        limits: Of the report on other limits.
        cost: Of the report on the costs.
        gap: The figures of the gap of the gradients.
    """
    comparisons = [
        {**each, "folder": folder} for folder, summary in summaries.items() for each in summary["comparisons"]
    ]
    first = next(iter(summaries.values()))
    shared = set.intersection(*(set(each["environment"].items()) for each in summaries.values()))
    environment = ", ".join(f"{key} {value}" for key, value in first["environment"].items() if (key, value) in shared)
    return PAGE_TEXT.format(
        runs=all_runs([*comparisons, *({**each, "folder": LIMITS} for each in limits["comparisons"])]),
        seeds=len(first["settings"]["seeds"]),
        reports="\n".join(
            f"- `make compare-{name}`, [report](results/{name}/report.md): {REPORTS[name]}." for name in summaries
        ),
        losses=losses(comparisons),
        levels=levels(comparisons),
        answers=answers(comparisons),
        against="\n\n".join(map(against_lora, comparisons)),
        targets=targets(comparisons, gap),
        whole=losses(whole["comparisons"]),
        whole_answers=answers(whole["comparisons"]),
        whole_against=against_lora(whole["comparisons"][0]),
        whole_figures=curves([{**each, "folder": WHOLE} for each in whole["comparisons"]]),
        limits=losses(limits["comparisons"]),
        default=f"{TRUST_REGION:g}",
        costs=costs(cost["comparisons"][0]),
        timed=title(cost["comparisons"][0]),
        steps=cost["settings"]["tasks"][0]["steps"],
        timed_seeds=len(cost["settings"]["seeds"]),
        evenness=evenness(cost["comparisons"][0]),
        figures=curves(comparisons),
        environment=environment,
    )


BAD = ("diverged", "failed", "missing")
FIGURES = {"loss": "Loss against steps", "rate-loss": "Final loss against learning rate"}
PAGE_TEXT = """# Results

<!-- Written by benchmarks/results.py from the summaries in results and pictures/gradient_gap.json. -->

Methods are trained at several learning rates and under {seeds} seeds, with the same batches in the same order: \
{runs}. All of them are in the reports, seed by seed:

{reports}

They are short trainings of small models, made to fit on two CPU cores: they show how fast methods learn at their own \
best rate, not how a large model ends after thousands of steps. For that there are `configs/compare/gpu.yaml` and the \
recipes in `configs/paper/`; nobody has run them with this package yet.

## Test loss

Mean ± standard deviation over the seeds at each method's own best learning rate (in brackets), chosen on other data. \
↓ and ↑: that rate is the lowest or the highest of its grid, so that a better one may lie beyond.

{losses}{levels}

## Right answers

Answers that match exactly, and for the docstrings accuracy, at the same rates: the loss has chosen them.

{answers}

## Against LoRA

Differences of the mean test losses, negative where a method is better. With {seeds} seeds no test of ranks can be \
significant; the report has the p-values.

{against}

## Targets

What this package set out to reach, and what was measured. A gap that not every seed shows is within the noise and \
decides nothing, nor do ranges of rates that are both narrower than a step of the grid; ↓ and ↑ behind a range: it \
reaches the end of the grid.

{targets}

The first two rows are from two trainings of SmolLM2-135M that [measure the gap](diagnostics.md#looking-at-it).

## The whole model

Other word problems under the whole of SmolLM2-135M, which writes the answers itself; the 24 steps of `make demo`: \
`make compare-whole`, [report](results/whole/report.md). So few steps are over before the default limit lets go, so \
that LoRA-Pro has a wider one here.

{whole}

Answers that match exactly:

{whole_answers}

{whole_against}

{whole_figures}

## The limit of a step

LoRA-Pro's full mode with other limits of the [trust region](how_it_works.md#linear-and-sequential) on the tasks of \
`compare-small`: `make compare-limits`, [report](results/limits/report.md).

{limits}

The default limit, {default}, was chosen on these same tasks, by validation loss and by how wide the range of usable \
rates is. LoRA-Pro's full and factored modes so have one more tuned setting than the other methods beside them.

## Cost

{timed}: medians of {timed_seeds} seeds at the rate that was best in `compare-small`, {steps} steps each, from a \
[report](results/costs/report.md) of its own: `lorapro compare costs --report_dir \
docs/results/costs`, {evenness} [Memory and speed](speed.md) has the times of large \
models.

{costs}

## Curves

{figures}

Versions: {environment}. The machines are in the reports.
"""


def summary(name: str) -> Summary:
    """What a comparison found."""
    found: Summary = json.loads((DOCS / "results" / name / "summary.json").read_text(encoding="utf-8"))
    return found


def main(check: bool) -> int:
    """Write the page, or say whether it is up to date."""
    gap = json.loads(GAP.read_text(encoding="utf-8"))
    made = page({name: summary(name) for name in REPORTS}, summary(WHOLE), summary(LIMITS), summary(COSTS), gap)
    if check:
        return int(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not up to date, and leave it")
    sys.exit(main(parser.parse_args().check))
