"""What does a user get to read of a comparison?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorapro_hf.commands.compare.content import content_of
from lorapro_hf.commands.compare.document import Block, Heading, Picture, Table, Text, as_html, as_markdown
from lorapro_hf.commands.compare.figures import draw
from lorapro_hf.commands.compare.provenance import remarks, step_remark
from lorapro_hf.commands.compare.significance import has_scipy, smallest_p
from lorapro_hf.commands.compare.store import DIVERGED, FAILED, Store, keys_of
from lorapro_hf.commands.compare.summary import MISSING, Comparison, Rate, Row, summarize
from lorapro_hf.optim.memory import readable_bytes
from lorapro_hf.utils.text_files import write_text

FIGURES, MARKDOWN, HTML, SUMMARY = "figures", "report.md", "report.html", "summary.json"
_NONE = "–"
_LORA_RITE = {"clip_unmagnified_grad": 1.0, "update_skipping": 1.0}  # what pytorch_optimizer does unless told otherwise


def write_report(store: Store, folder: Path) -> dict[str, Any]:
    """Write `report.md` with its figures, `report.html` and `summary.json` from what is stored, and nothing else.

    In another folder than that of the store all runs are copied beside them.

    Args:
        store: Where the results are.
        folder: Where the report goes; it is made if need be.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        UsageError: if there is no comparison in the store.
    """
    sweep, records = store.sweep(), store.records()
    comparisons = summarize(sweep, records)
    pictures: dict[str, bytes] = {}
    blocks: list[Block] = [*_introduction(sweep, records)]
    for comparison in comparisons:
        blocks += _section(sweep, comparison, pictures)
    blocks += _unfinished(sweep, records)
    blocks += _environments(sweep, records)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / FIGURES / f"{name}.png").write_bytes(picture)
    write_text(folder / MARKDOWN, as_markdown(blocks, FIGURES))
    write_text(folder / HTML, as_html(blocks, pictures))
    content = content_of(sweep, records, comparisons)
    write_text(folder / SUMMARY, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if folder.resolve() != store.folder.resolve():
        store.copy_to(folder)
    return content


def _introduction(sweep: Mapping[str, Any], records: Mapping[str, Any]) -> list[Block]:
    settings = sweep["settings"]
    seeds = len(settings["seeds"])
    base, goal = (sweep["methods"].get(settings[name], {}).get("title", _NONE) for name in ("baseline", "reference"))
    clip = "no clipping"
    if settings["max_grad_norm"]:
        free = [method["title"] for method in sweep["methods"].values() if not method.get("clips", True)]
        clip = f"gradients clipped to norm {settings['max_grad_norm']:g}, those of a classifier on top apart"
        clip += f" (not those of {', '.join(free)})" if free else ""
    looks_first = [
        method["title"]
        for method in sweep["methods"].values()
        if (method.get("adapter") or {}).get("init_lora_weights") == "lora_ga"
    ]
    blocks: list[Block] = [
        Heading(1, "Comparison of methods"),
        Text(
            f"Every method trains the same layers on the same batches in the same order for as many steps: "
            f"{settings['schedule']} schedule with {settings['warmup']:.0%} warm-up, no weight decay, {clip}, alpha = "
            f"{settings['scaling']:g} r, {settings['precision']}. Seeds {', '.join(map(str, settings['seeds']))} "
            "decide order, initial values and dropout. A classifier on top is trained by an AdamW of its own at "
            "one rate for all."
            + (f" {', '.join(looks_first)} sees its first batches once more, before it starts." if looks_first else "")
            + "".join(map(_own_limits, sweep["methods"].values()))
        ),
        Text(
            "Each method stands at its own best learning rate: the one with the lowest mean loss over the seeds on the "
            "validation set, out of those at which all seeds finished. The figures are of the test set, which decided "
            "nothing; mean ± standard deviation over the seeds. ↓ and ↑ behind a rate: it is the lowest or the highest "
            "of its grid, so that a better one may lie beyond; behind a range of good rates likewise. ≈: other rates "
            "are worse by no more than the standard error of the best. ✗: runs that diverged or failed; nothing is "
            "left out. †: runs that finished no better than they began, the mean training loss of their last quarter "
            "not below that of their first step; such a rate is taken only if there is no other, and is in no range "
            "of good ones. Peak memory covers setup and "
            "evaluation too; on a CPU it is that of the whole process, Python and the model included."
        ),
        Text(
            f"Gap closed: how far the test loss is on the way from {base} (0 %) to {goal} (100 %). Against {base}, "
            f"seed by seed: the mean difference of the test losses, on how many seeds the method is better, and "
            f"two-sided p-values of the paired t-test (raw and corrected by Holm for the number of methods) and of "
            f"Wilcoxon's signed-rank test. With {seeds} seed{'' if seeds == 1 else 's'} Wilcoxon's p-value cannot be "
            f"below {smallest_p(seeds):.2g}, whatever the methods do, and the t-test rests on the differences being "
            "normal." + ("" if has_scipy() else " The p-values are missing: scipy is not installed.")
        ),
    ]
    missing = _missing(sweep, records)
    if missing:
        blocks.append(
            Text(f"The comparison is not complete: {missing} of {len(keys_of(sweep))} runs are still to come.")
        )
    return blocks


def _own_limits(method: Mapping[str, Any]) -> str:
    """A sentence on what a method does to long gradients and steps by itself."""
    if method.get("optimizer") != "lorarite":
        return ""
    limits = {**_LORA_RITE, **{name: method["settings"][name] for name in _LORA_RITE if name in method["settings"]}}
    listed = ", ".join(f"{name}={value:g}" for name, value in limits.items())
    return f" {method['title']} clips its own gradients and skips steps that are too long ({listed}; 0 for neither)."


def _section(sweep: Mapping[str, Any], comparison: Comparison, pictures: dict[str, bytes]) -> list[Block]:
    task = next(task for task in sweep["settings"]["tasks"] if task["name"] == comparison.task)
    size = "" if task["layers"] is None else f", its first {task['layers']} layers"
    size += ", its vocabulary cut to the tokens of the data" if task["cut_vocabulary"] else ""
    model = task["model"] or ("all-MiniLM-L6-v2" if task["kind"] == "classification" else "SmolLM2-135M-Instruct")
    data = (
        task["dataset"]
        or {
            "questions": "arithmetic word problems",
            "text": "modules of Python's standard library, whole packages held out",
            "classification": f"docstrings of {task['classes']} packages of Python's standard library",
        }[task["kind"]]
    )
    blocks: list[Block] = [
        Heading(2, f"{comparison.task}, rank {comparison.rank}"),
        Text(
            f"{model}{size}; {data}. {task['steps']} steps of {task['batch_size']} examples of at most "
            f"{task['max_length']} tokens; {task['validation_size']} examples for validation, {task['test_size']} for "
            "the test."
        ),
        *(
            []
            if comparison.equal_data
            else [Text("WARNING: the runs did not all have the same examples, or those of a seed the same batches.")]
        ),
        Text(_gap(sweep, comparison)),
        *_levels(sweep, comparison),
        _quality(comparison),
        _cost(comparison),
        *(Text(remark) for remark in [step_remark(comparison)] if remark is not None),
    ]
    for name, (caption, picture) in draw(
        comparison, [name for name, method in sweep["methods"].items() if method["is_lora_pro"]]
    ).items():
        pictures[f"{comparison.name}-{name}"] = picture
        blocks.append(Picture(f"{comparison.name}-{name}", f"{caption}: {comparison.task}, rank {comparison.rank}"))
    return [*blocks, Heading(3, "All rates"), _all_rates(comparison)]


def _gap(sweep: Mapping[str, Any], comparison: Comparison) -> str:
    titles = [sweep["methods"].get(name, {}).get("title", name) for name in (comparison.baseline, comparison.reference)]
    if comparison.gap is None:
        return f"No gap to close is known: {titles[0]} or {titles[1]} has no finished rate."
    seeds = len(sweep["settings"]["seeds"])
    text = (
        f"Gap from {titles[0]} to {titles[1]}: {comparison.gap:.4g} in test loss, on {comparison.gap_seeds} of {seeds}"
    )
    text += " seeds."
    if comparison.gap <= 0:
        return f"{text} {titles[1]} is not better here, so that there is nothing to close."
    return text if comparison.gap_seeds == seeds else f"{text} It is within the noise: read the shares accordingly."


def _levels(sweep: Mapping[str, Any], comparison: Comparison) -> list[Block]:
    """What the losses can be read by; nothing where it was not noted."""
    levels = sweep.get("levels", {}).get(comparison.task)
    if levels is None:
        return []
    kind = next(task["kind"] for task in sweep["settings"]["tasks"] if task["name"] == comparison.task)
    what = "classes" if kind == "classification" else "tokens, with one added to each count,"
    return [
        Text(
            f"Levels of the test loss: {levels['untrained']:.4f} untrained; {levels['frequencies']:.4f} for whoever "
            f"knows nothing but the frequencies of the {what} in the training set."
        )
    ]


def _quality(comparison: Comparison) -> Table:
    header = ["method", "learning rate", *(f"test {name.replace('_', ' ')}" for name in comparison.metrics)]
    header += ["gap closed", "difference", "better on", "p (t)", "p (Holm)", "p (Wilcoxon)", "✗", "†"]
    rows = []
    for row in comparison.rows:
        counts = row.counts()
        bad = counts[DIVERGED] + counts[FAILED]
        test = row.against
        closed = {comparison.baseline: 0.0, comparison.reference: 1.0}.get(row.method, row.gap_closed)
        if comparison.gap is None or comparison.gap <= 0 or row.best is None:
            closed = None
        rows.append(
            [
                row.title,
                _rate(row),
                *(_spread(row.best, metric) for metric in comparison.metrics),
                _NONE if closed is None else f"{closed:.0%}",
                _NONE if test is None else f"{test.difference:+.4f}",
                _NONE if test is None else f"{test.better}/{test.seeds}",
                _p(None if test is None else test.t_test),
                _p(row.t_test_holm),
                _p(None if test is None else test.wilcoxon),
                *(f"{count}/{sum(counts.values())}" if count else "0" for count in (bad, row.no_better())),
            ]
        )
    return Table(header, rows)


def _cost(comparison: Comparison) -> Table:
    header = ["method", "step, ms", "of it optimizer, ms", "training, s", "setup, s", "state", "peak memory"]
    header += ["trained parameters", "rates within 2 % of the best validation loss"]
    rows = []
    for row in comparison.rows:
        numbers = [row.median(name) for name in ("step_ms", "optimizer_ms", "train_s", "setup_s")]
        sizes = [row.median(name) for name in ("state_bytes", "peak_bytes")]
        trainable = row.median("trainable")
        rows.append(
            [
                row.title,
                *(_NONE if number is None else f"{number:.1f}" for number in numbers),
                *(_NONE if size is None else readable_bytes(size) for size in sizes),
                _NONE if trainable is None else f"{int(trainable):,}",
                _range(row),
            ]
        )
    return Table(header, rows)


def _range(row: Row) -> str:
    if row.good_range is None:
        return _NONE
    low, high = row.good_range
    beyond = "".join({"lowest": " ↓", "highest": " ↑"}[end] for end in row.good_at_edge)
    return (f"{low:g}" if low == high else f"{low:g} to {high:g} (×{high / low:.3g})") + beyond


def _all_rates(comparison: Comparison) -> Table:
    rows = []
    for row in comparison.rows:
        for rate in row.rates:
            losses = rate.values("loss")
            tests = [
                f"{losses[seed]:.4f}{' †' if seed in rate.no_better else ''}" if seed in losses else status
                for seed, status in rate.statuses.items()
            ]
            mark = " (best)" if rate is row.best else ""
            validation = _NONE if rate.validation is None else f"{rate.validation:.4f}"
            rows.append([row.title, f"{rate.learning_rate:g}{mark}", validation, ", ".join(tests)])
    return Table(["method", "learning rate", "validation loss, mean", "test loss, seed by seed"], rows)


def _unfinished(sweep: Mapping[str, Any], records: Mapping[str, Any]) -> list[Block]:
    """Every run that did not come to its end."""
    rows = []
    for run in sweep["runs"]:
        record = records.get(run["key"])
        if record is None or record["status"] not in (DIVERGED, FAILED):
            continue
        step = record.get("diverged_at")
        why = record.get("error") or (f"loss not finite at step {step}" if step else "held-out loss not finite")
        rank = "" if run["rank"] is None else f" r={run['rank']}"
        title = sweep["methods"][run["method"]]["title"]
        rows.append([f"{run['task']}{rank}: {title}", f"{run['learning_rate']:g}", str(run["seed"]), why[:300]])
    heading = Heading(2, "Runs that diverged or failed")
    failed = any(key in records and records[key]["status"] == FAILED for key in keys_of(sweep))
    hint = [Text("lorapro compare YAML --retry_failed trains those again that failed.")] if failed else []
    return [heading, *hint, Table(["run", "learning rate", "seed", "what happened"], rows) if rows else Text("None.")]


def _environments(sweep: Mapping[str, Any], records: Mapping[str, Any]) -> list[Block]:
    used = [records[key]["environment"] for key in keys_of(sweep) if key in records]
    different = [each for place, each in enumerate(used) if each not in used[:place]] or [sweep["environment"]]
    blocks: list[Block] = [Heading(2, "Environment")]
    if len(different) > 1:
        blocks.append(Text("The runs were made in different environments; compare their times with care."))
    blocks += [Text(remark) for remark in remarks(records[key] for key in keys_of(sweep) if key in records)]
    return blocks + [Text(", ".join(f"{name} {value}" for name, value in each.items())) for each in different]


def _missing(sweep: Mapping[str, Any], records: Mapping[str, Any]) -> int:
    return sum(key not in records for key in keys_of(sweep))


def _rate(row: Row) -> str:
    if row.best is None:
        return "none finished" if not row.counts()[MISSING] else _NONE
    edge = {"lowest": " ↓", "highest": " ↑"}.get(row.at_edge or "", "")
    return f"{row.best.learning_rate:g}{edge}" + "".join(f" ≈{value:g}" for value in row.ties)


def _spread(rate: Rate | None, metric: str) -> str:
    values = [] if rate is None else list(rate.values(metric).values())
    if not values:
        return _NONE
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def _p(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2g}"
