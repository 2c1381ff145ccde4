"""What does `summary.json` hold?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lorapro_hf.commands.common.records import without_nan
from lorapro_hf.commands.compare.provenance import step_spread
from lorapro_hf.commands.compare.store import keys_of
from lorapro_hf.commands.compare.summary import Comparison, Rate, Row


def content_of(
    sweep: Mapping[str, Any], records: Mapping[str, Any], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """Plain values for JSON, without the curves."""
    keys = {(r["task"], r["rank"], r["method"], r["learning_rate"], r["seed"]): r["key"] for r in sweep["runs"]}
    levels = sweep.get("levels", {})
    content: dict[str, Any] = without_nan(
        {
            "settings": sweep["settings"],
            "environment": environment_of(sweep, records),
            "missing": sum(key not in records for key in keys_of(sweep)),
            "comparisons": [_plain(each, keys, levels.get(each.task)) for each in comparisons],
        }
    )
    return content


def environment_of(sweep: Mapping[str, Any], records: Mapping[str, Any]) -> dict[str, Any]:
    """What the environments of all runs have in common; that of the comparison while there are no runs."""
    used = [records[key]["environment"] for key in keys_of(sweep) if key in records] or [sweep["environment"]]
    return {name: value for name, value in used[0].items() if all(each.get(name) == value for each in used)}


def _plain(comparison: Comparison, keys: Mapping[Any, str], levels: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "task": comparison.task,
        "rank": comparison.rank,
        "gap": comparison.gap,
        "gap_seeds": comparison.gap_seeds,
        "equal_data": comparison.equal_data,
        "levels": levels,
        "step_spread": step_spread(comparison),
        "methods": [_plain_row(row, comparison, keys) for row in comparison.rows],
    }


def _plain_row(row: Row, comparison: Comparison, keys: Mapping[Any, str]) -> dict[str, Any]:
    costs = ("step_ms", "optimizer_ms", "train_s", "setup_s", "state_bytes", "peak_bytes", "trainable")
    return {
        "method": row.method,
        "title": row.title,
        "learning_rate": None if row.best is None else row.best.learning_rate,
        "at_edge": row.at_edge,
        "ties": row.ties,
        "good_range": row.good_range,
        "good_at_edge": row.good_at_edge,
        "test": {metric: _statistics(row.best, metric) for metric in comparison.metrics},
        "gap_closed": row.gap_closed,
        "against_baseline": None if row.against is None else {**asdict(row.against), "t_test_holm": row.t_test_holm},
        "cost": {name: row.median(name) for name in costs},
        "runs": row.counts(),
        "no_better": row.no_better(),
        "rates": [_plain_rate(row, rate, comparison, keys) for rate in row.rates],
    }


def _plain_rate(row: Row, rate: Rate, comparison: Comparison, keys: Mapping[Any, str]) -> dict[str, Any]:
    def key(seed: int) -> str:
        place = [(comparison.task, rank, row.method, rate.learning_rate, seed) for rank in (comparison.rank, None)]
        return next(keys[each] for each in place if each in keys)

    return {
        "learning_rate": rate.learning_rate,
        "validation_loss": rate.validation,
        "status": {str(seed): status for seed, status in rate.statuses.items()},
        "no_better": rate.no_better,
        "keys": {str(seed): key(seed) for seed in rate.statuses},
        "test": {metric: {str(s): v for s, v in rate.values(metric).items()} for metric in comparison.metrics},
    }


def _statistics(rate: Rate | None, metric: str) -> dict[str, float | None] | None:
    values = [] if rate is None else list(rate.values(metric).values())
    if not values:
        return None
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
