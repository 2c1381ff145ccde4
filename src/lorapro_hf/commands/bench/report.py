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

from lorapro_hf.commands.bench.growth import AXES, exponents
from lorapro_hf.commands.bench.results import GrowthPoint, Outcome, Result, Spread, TrainingShare
from lorapro_hf.commands.bench.settings import METHODS, MODELS
from lorapro_hf.commands.common.records import package_version

_VERSIONS = ("lorapro_hf", "torch", "peft", "transformers", "triton", "lora-pro-adamw", "pytorch_optimizer", "numpy")
_WIDE = ["n", "×sum", "kept MB", "largest", "sizes", "kernel counts"]  # a terminal has no room for these
_GROWTH = "Growth of a step with one size, the others fixed (fp32, r = 8 unless it grows; exponent: log-log slope)"
_TRAINING = "Share of a training step (8 × 64 tokens, LoRA r = 8 on all linear layers)"


class ReportTable(NamedTuple):
    """A table of texts, with notes about its rows."""

    title: str
    frame: pandas.DataFrame
    notes: list[str]


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the processor, or its architecture."""
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


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


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "–" if value is None else format(value / unit, form)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _shown(spread: Spread | None) -> str:
    return "–" if spread is None else f"{_short(spread.median)} [{_short(spread.low)}–{_short(spread.high)}]"


def _ratio(took: Spread | None, least_ms: float | None) -> str:
    return "–" if took is None or least_ms is None else f"{took.median / least_ms:.2f}"


def _result_row(result: Result) -> dict[str, str]:
    took, roof = result.step_ms, result.roofline
    bound_ms = None if roof is None else max(roof.memory_ms, roof.compute_ms)
    sum_ms = None if roof is None else roof.memory_ms + roof.compute_ms
    return {
        "method": result.title,
        "step ms": _shown(took),
        "n": "0" if took is None else str(took.count),
        "×AdamW": _number(result.ratio, ".2f"),
        "×roof": _ratio(took, bound_ms),
        "×sum": _ratio(took, sum_ms),
        "state MB": _number(result.state_bytes, ".1f", 1e6),
        "kept MB": _number(result.kept_bytes, ".1f", 1e6),
        "peak MB": _number(result.peak_bytes, ".1f", 1e6),
        "largest": "×".join(map(str, result.largest_shape or ("–",))),
        "kernels": _number(result.kernels, ".0f"),
    }


def _ratio_tables(results: list[Result]) -> list[ReportTable]:
    """A table for each model, rank and dtype."""
    order, tables = list(METHODS), []
    for key in dict.fromkeys((result.workload, result.rank, result.dtype) for result in results):
        group = [result for result in results if (result.workload, result.rank, result.dtype) == key]
        group.sort(key=lambda result: (not result.whole, result.batch, order.index(result.method)))
        notes = [f"{METHODS[result.method].title}: {result.note}" for result in group if result.note]
        notes += [f"{result.title} waits for the device: {result.waits}" for result in group if result.waits]
        title = f"{MODELS[key[0]].title}, r = {key[1]}, {key[2]} factors"
        tables.append(ReportTable(title, pandas.DataFrame(map(_result_row, group)), notes))
    return tables


def _growth_row(points: list[GrowthPoint], of_time: float, of_kernels: float) -> dict[str, str]:
    return {
        "method": METHODS[points[0].method].title,
        "against": AXES[points[0].axis],
        "sizes": ", ".join(str(point.size) for point in points),
        "step ms": ", ".join(_short(point.step_ms.median) for point in points),
        "exponent": f"{of_time:.2f}",
        "kernel counts": ", ".join(str(point.kernels) for point in points),
        "of kernels": f"{of_kernels:.2f}",
    }


def _training_row(share: TrainingShare) -> dict[str, str]:
    return {
        "method": METHODS[share.method].title,
        "precision": share.precision,
        "forward and backward ms": _shown(share.model_ms),
        "step ms": _shown(share.step_ms),
        "share": f"{share.share:.1%}",
    }


def all_tables(outcome: Outcome) -> list[ReportTable]:
    """Every table that has rows."""
    growth = [
        _growth_row([point for point in outcome.growth if (point.method, point.axis) == key], *fitted)
        for key, fitted in exponents(outcome.growth).items()
    ]
    tables = [(_GROWTH, growth), (_TRAINING, [_training_row(share) for share in outcome.training])]
    further = [ReportTable(title, pandas.DataFrame(rows), []) for title, rows in tables if rows]
    return [*_ratio_tables(outcome.results), *further]


def narrow(table: ReportTable) -> ReportTable:
    """A table without empty columns and the least important ones."""
    frame = table.frame.drop(columns=[name for name in _WIDE if name in table.frame])
    return table._replace(frame=frame.loc[:, ~frame.isin(["–"]).all()])


def markdown(outcome: Outcome, tables: list[ReportTable]) -> str:
    """Tables and notes as Markdown."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), keep_trailing_newline=True)
    machines = outcome.machines
    return templates.get_template("report.md.jinja").render(
        about=outcome.environment,
        copy=statistics.median(each.copy_gb_per_s for each in machines) if machines else None,
        matmul=statistics.median(each.matmul_gflop_per_s for each in machines) if machines else None,
        tables=tables,
        notes=outcome.notes,
    )
