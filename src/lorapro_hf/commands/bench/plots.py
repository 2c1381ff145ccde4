"""How do the figures of a benchmark run look?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas

from lorapro_hf.commands.bench.growth import AXES
from lorapro_hf.commands.bench.results import GrowthPoint, Outcome
from lorapro_hf.commands.bench.settings import BASELINE, METHODS, MODELS
from lorapro_hf.commands.common.plots import as_png, new_figure

_DPI = 60


def plot_ratios(path: Path, outcome: Outcome) -> bool:
    """Draw each method's time over fused AdamW's at the smallest rank, by model and dtype; False if there is none."""
    measured = [result for result in outcome.results if result.ratio is not None and result.method != BASELINE]
    if not measured:
        return False
    rank = min(result.rank for result in measured)
    shown = [result for result in measured if result.rank == rank]
    frame = pandas.DataFrame(map(asdict, shown)).assign(title=[result.title for result in shown])
    dtypes, workloads = list(dict.fromkeys(frame["dtype"])), list(dict.fromkeys(frame["workload"]))
    figure = new_figure(5.2 * len(workloads), 3 * len(dtypes))
    panels: Any = figure.subplots(len(dtypes), len(workloads), squeeze=False, sharex=True)
    for (dtype, workload), group in frame.groupby(["dtype", "workload"], sort=False):
        panel = panels[dtypes.index(dtype)][workloads.index(workload)]
        bars = panel.barh(group["title"], group["ratio"])
        panel.bar_label(
            bars, [f" {ratio:.3g}" if ratio < 100 else f" {ratio:.0f}" for ratio in group["ratio"]], fontsize=7
        )
        panel.set(xscale="log", title=f"{MODELS[workload].title}, {dtype} factors, r = {rank}")
        panel.tick_params(axis="y", labelsize=7)
        panel.invert_yaxis()
        panel.axvline(1, color="black", linewidth=1)
        panel.margins(x=0.2)
    for panel in panels[-1]:
        panel.set_xlabel("time of a step over fused AdamW's (log scale)")
    path.write_bytes(as_png(figure, _DPI))
    return True


def plot_growth(path: Path, growth: list[GrowthPoint]) -> bool:
    """Draw the time of a step against layers, m, n and r; False if it was not measured."""
    if not growth:
        return False
    frame = pandas.DataFrame(
        [(point.axis, point.size, METHODS[point.method].title, point.step_ms.median) for point in growth],
        columns=["axis", "size", "method", "ms"],
    )
    figure = new_figure(4 * len(AXES), 3.5)
    for place, (axis, label) in enumerate(AXES.items(), start=1):
        panel = figure.add_subplot(1, len(AXES), place)
        values = frame[frame["axis"] == axis].pivot_table(index="size", columns="method", values="ms", sort=False)
        for method in values.sort_index():
            panel.plot(values.index, values[method], "o-", label=method)
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="ms a step")
        panel.set_xticks(values.index, [str(size) for size in values.index])
        panel.minorticks_off()
        panel.grid(alpha=0.2)
        panel.legend(fontsize=6)
    path.write_bytes(as_png(figure, _DPI))
    return True
