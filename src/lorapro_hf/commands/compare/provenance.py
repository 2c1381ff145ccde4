"""Which code and which sessions are the runs from, and can their times be compared?"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

from lorapro_hf.commands.compare.summary import Comparison

SESSION_GAP = timedelta(hours=3)  # without a run: what comes after is another session
UNEVEN = 1.2  # slowest over fastest median step of a method's seeds at one rate: beyond it something else ran


def remarks(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know of where the runs of one comparison come from: a sentence each, or none.

    Args:
        records: Its runs; those from before the source was noted have no `source`.
    """
    found = list(records)
    said = []
    counts: dict[str, int] = {}
    for record in found:
        source = record.get("source") or "not noted"
        counts[source] = counts.get(source, 0) + 1
    if len(counts) > 1:
        listed = ", ".join(f"{source}: {count} runs" for source, count in counts.items())
        said.append(
            f"The runs come from {len(counts)} states of this package's source ({listed}); their keys are equal, so "
            "that the settings were, but what the code did may differ."
        )
    if len(sessions(found)) > 1:
        parts = "; ".join(f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}" for first, last in sessions(found))
        said.append(f"The runs were made in {len(sessions(found))} sessions (UTC {parts}): do not compare their times.")
    return said


def sessions(records: Iterable[Mapping[str, Any]]) -> list[tuple[datetime, datetime]]:
    """Beginning and end of each session: runs with no pause of more than three hours between them."""
    spans = []
    for record in records:
        if record.get("finished_at"):
            end = datetime.fromisoformat(record["finished_at"])
            spans.append((end - timedelta(seconds=record.get("wall_s") or 0.0), end))
    found: list[tuple[datetime, datetime]] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] <= SESSION_GAP:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def step_spread(comparison: Comparison) -> dict[str, Any] | None:
    """How evenly the steps of equal runs went.

    Returns:
        `rates`, at how many rates of methods the step times of several seeds are known; `uneven`, at how many of these
        the slowest seed took more than 1.2 times the fastest; `largest`, the largest such ratio; `best`, the largest
        at the methods' best rates, which are those in the table of costs. `None` without any.
    """
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for row in comparison.rows:
        for rate in row.rates:
            times = [record["step_ms"] for record in rate.records.values() if record.get("step_ms")]
            if len(times) > 1:
                ratios[rate is row.best].append(max(times) / min(times))
    every = ratios[True] + ratios[False]
    if not every:
        return None
    return {
        "rates": len(every),
        "uneven": sum(ratio > UNEVEN for ratio in every),
        "largest": max(every),
        "best": max(ratios[True], default=None),
        "median": statistics.median(every),
    }


def step_remark(comparison: Comparison) -> str | None:
    """The sentence that belongs under the table of costs, if the times are not even."""
    spread = step_spread(comparison)
    if spread is None or not spread["uneven"]:
        return None
    return (
        f"Times are not to be compared: at {spread['uneven']} of {spread['rates']} rates the median step of a method "
        f"differs by more than {UNEVEN - 1:.0%} from seed to seed (by up to ×{spread['largest']:.2g}), so that other "
        "work was on the machine."
    )
