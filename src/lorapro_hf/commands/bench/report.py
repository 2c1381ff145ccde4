"""Which tables does a benchmark run show and keep?"""

from __future__ import annotations

import os
import platform
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import torch
from jinja2 import Environment, FileSystemLoader
from rich import box
from rich.table import Table
from rich.text import Text

from lorapro_hf.commands.bench.growth import AXES, exponents
from lorapro_hf.commands.bench.results import GrowthPoint, Outcome, Result, Spread, TrainingShare
from lorapro_hf.commands.bench.settings import METHODS, MODELS
from lorapro_hf.commands.common.records import package_version

MB = 1e6
_VERSIONS = ("lorapro_hf", "torch", "peft", "transformers", "triton", "lora-pro-adamw", "pytorch_optimizer", "numpy")
_WIDE = ["n", "×sum", "kept MB", "largest", "sizes", "kernel counts", "note"]  # Markdown alone has room for these


class ReportTable(NamedTuple):
    """A table of texts."""

    title: str
    frame: pandas.DataFrame


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the processor, or its architecture."""
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of the GPU or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(device: torch.device) -> str:
    """A folder name for the device: `nvidia-h200`, `amd-epyc-2-threads`."""
    text = device_name(device) + (f" {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions."""
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: package_version(name) for name in _VERSIONS},
    }


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _shown(spread: Spread | None) -> str:
    return "–" if spread is None else f"{_short(spread.median)} [{_short(spread.low)}–{_short(spread.high)}]"


def _megabytes(size: int | None) -> str:
    return _number(None if size is None else size / MB, ".1f")


def _result_row(result: Result) -> dict[str, str]:
    took, roof = result.step_ms, result.roofline
    over = (None, None) if took is None or roof is None else (took.median / roof.bound_ms, took.median / roof.sum_ms)
    waits = None if result.waits is None else f"waits for the device: {result.waits}"
    return {
        "method": result.title,
        "step ms": _shown(took),
        "n": "0" if took is None else str(took.count),
        "×AdamW": _number(result.ratio, ".2f"),
        "×roof": _number(over[0], ".2f"),
        "×sum": _number(over[1], ".2f"),
        "state MB": _megabytes(result.state_bytes),
        "kept MB": _megabytes(result.kept_bytes),
        "peak MB": _megabytes(result.peak_bytes),
        "largest": "×".join(map(str, result.largest_shape or ("–",))),
        "kernels": _number(result.kernels, "d"),
        "note": "; ".join(text for text in (result.note, waits) if text).replace("|", "/"),
    }


def ratio_tables(results: list[Result]) -> list[ReportTable]:
    """A table for each model, rank and dtype."""
    order = list(METHODS)
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.workload, result.rank, result.dtype), []).append(result)
    tables = []
    for (name, rank, dtype), group in groups.items():
        group.sort(key=lambda result: (not result.whole, result.batch, order.index(result.method)))
        title = f"{MODELS[name].title}, r = {rank}, {dtype} factors"
        tables.append(ReportTable(title, pandas.DataFrame(map(_result_row, group))))
    return tables


def growth_table(growth: list[GrowthPoint]) -> list[ReportTable]:
    """Fitted exponents of time and kernels."""
    rows = []
    for (method, axis), (of_time, of_kernels) in exponents(growth).items():
        points = [point for point in growth if (point.method, point.axis) == (method, axis)]
        rows.append(
            {
                "method": METHODS[method].title,
                "against": AXES[axis],
                "sizes": ", ".join(str(point.size) for point in points),
                "step ms": ", ".join(_short(point.step_ms.median) for point in points),
                "exponent": f"{of_time:.2f}",
                "kernel counts": ", ".join(str(point.kernels) for point in points),
                "of kernels": f"{of_kernels:.2f}",
            }
        )
    title = "Growth of a step with one size, the others fixed (fp32, r = 8 unless it grows; exponent: log-log slope)"
    return [ReportTable(title, pandas.DataFrame(rows))] if rows else []


def training_table(shares: list[TrainingShare]) -> list[ReportTable]:
    """The optimizer's share of a training step."""
    rows = [
        {
            "method": METHODS[share.method].title,
            "precision": share.precision,
            "forward and backward ms": _shown(share.model_ms),
            "step ms": _shown(share.step_ms),
            "share": f"{share.share:.1%}",
        }
        for share in shares
    ]
    title = "Share of a training step (8 × 64 tokens, LoRA r = 8 on all linear layers)"
    return [ReportTable(title, pandas.DataFrame(rows))] if rows else []


def all_tables(outcome: Outcome) -> list[ReportTable]:
    """Every table that has rows."""
    return [*ratio_tables(outcome.results), *growth_table(outcome.growth), *training_table(outcome.training)]


def rich_table(table: ReportTable) -> Table:
    """A table for the terminal, without empty columns and the widest."""
    frame, caption = table.frame, ""
    if "note" in frame:
        noted = frame[frame["note"] != ""]
        caption = "\n".join(f"{row.method}: {row.note}" for row in noted.itertuples())
    frame = frame.drop(columns=[name for name in _WIDE if name in frame])
    frame = frame.loc[:, ~frame.isin(["", "–"]).all()]
    shown = Table(title=table.title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for name in frame:
        numeric = frame[name].str.match(r"^(–|-?[\d.]+%?( \[.*)?)$").all()
        shown.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in frame.itertuples(index=False, name=None):
        shown.add_row(*row)
    shown.caption = Text(caption)
    return shown


def markdown(outcome: Outcome) -> str:
    """The tables and notes as Markdown."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), keep_trailing_newline=True)
    machines = outcome.machines
    return templates.get_template("report.md.jinja").render(
        about=outcome.environment,
        copy=statistics.median(each.copy_gb_per_s for each in machines) if machines else None,
        matmul=statistics.median(each.matmul_gflop_per_s for each in machines) if machines else None,
        tables=all_tables(outcome),
        notes=outcome.notes,
    )
