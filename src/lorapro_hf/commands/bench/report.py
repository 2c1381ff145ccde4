"""What does the user get to see and keep of a benchmark run?"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from lorapro_hf.commands.bench.growth import AXES, exponents
from lorapro_hf.commands.bench.results import MB, Outcome, Result, Share, quartiles
from lorapro_hf.commands.bench.settings import METHODS, MODELS, BenchSettings
from lorapro_hf.commands.bench.targets import median_rates, targets_of

_VERSIONS = ("lorapro_hf", "torch", "peft", "transformers", "triton", "lora-pro-adamw", "pytorch_optimizer", "numpy")
_WIDE = ("n", "×sum", "kept MB", "largest", "calls", "sizes", "kernel counts")
_FIGURES = ("step ms", "n", "×AdamW", "×roof", "×sum", "state MB", "kept MB", "peak MB", "largest", "kernels", "calls")
_CAPTION = (
    "step: median of optimizer.step() alone with the quartiles; n: timed steps; ×AdamW: ratio of the medians within a "
    "batch, in which the methods take turns; state, kept: memory of the moments and of all that the optimizer keeps; "
    "peak: most memory of a step beyond parameters, gradients and what is kept; ×roof, ×sum: step over the roofline of "
    "dense moments, max(memory, flops) and their sum; kernels: innermost operators that compute, one on a list of "
    "tensors counting once; on CUDA kernels; calls: operators that Python called."
)


class Section(NamedTuple):
    """A table in plain text, for the terminal and for Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    caption: str = ""


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of the processor, as well as it can be told."""
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """What the figures belong to: the GPU, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(device: torch.device) -> str:
    """A folder name for the device: `nvidia-h200`, `amd-epyc-2-threads`."""
    text = device_name(device) + (f" {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions, without the date."""
    versions: dict[str, str | None] = {}
    for name in _VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def _number(value: float | None, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def spread(samples: Sequence[float]) -> str:
    """Median and quartiles."""
    if not samples:
        return "–"
    low, middle, high = quartiles(samples)
    return f"{_short(middle)} [{_short(low)}–{_short(high)}]"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / MB:.1f}"


def _row(result: Result) -> tuple[str, ...]:
    roof = result.roofline if result.samples_ms else None
    median = result.median_ms or 0.0
    return (
        result.title + ("" if result.whole else " (one block)"),
        spread(result.samples_ms),
        str(len(result.samples_ms)),
        _number(result.ratio, ".2f"),
        _number(None if roof is None else median / roof.bound_ms, ".2f"),
        _number(None if roof is None else median / roof.sum_ms, ".2f"),
        _megabytes(result.state_bytes),
        _megabytes(result.kept_bytes),
        _megabytes(result.peak_bytes),
        "–" if result.largest_shape is None else "×".join(map(str, result.largest_shape)),
        "–" if result.kernels is None else f"{result.kernels}",
        "–" if result.calls is None else f"{result.calls}",
        result.note or "",
    )


def ratio_sections(outcome: Outcome) -> list[Section]:
    """A table for each model, rank and dtype."""
    columns = ("method", *_FIGURES, "note")
    order = list(METHODS)
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for result in outcome.results:
        groups.setdefault((result.workload, result.rank, result.dtype), []).append(result)
    sections = []
    for (name, rank, dtype), results in groups.items():
        results.sort(key=lambda result: (not result.whole, result.batch, order.index(result.method)))
        rows = [_row(result) for result in results]
        sections.append(Section(f"{MODELS[name].title}, r = {rank}, {dtype} factors", columns, rows))
    if sections:
        sections[-1] = sections[-1]._replace(caption=_CAPTION)
    return sections


def growth_section(outcome: Outcome) -> list[Section]:
    """Fitted exponents of time and kernels."""
    fitted = exponents(outcome.growth)
    if not fitted:
        return []
    rows = []
    for (method, axis), (of_time, of_kernels) in fitted.items():
        points = [p for p in outcome.growth if (p.method, p.axis) == (method, axis) and p.samples_ms]
        sizes = ", ".join(str(point.size) for point in points)
        times = ", ".join(_short(quartiles(point.samples_ms)[1]) for point in points)
        kernels = ", ".join(str(point.kernels) for point in points)
        rows.append((METHODS[method].title, AXES[axis], sizes, times, f"{of_time:.2f}", kernels, f"{of_kernels:.2f}"))
    columns = ("method", "against", "sizes", "step ms", "exponent", "kernel counts", "of kernels")
    caption = "exponent: slope in log-log scale; where m, n or r grows, the others and the layers stay as they are."
    return [Section("Growth of a step (fp32, r = 8 unless it grows)", columns, rows, caption)]


def training_section(shares: Sequence[Share]) -> list[Section]:
    """The optimizer's share of a training step."""
    rows = [
        (METHODS[s.method].title, s.precision, spread(s.model_ms), spread(s.step_ms), f"{s.share:.1%}")
        for s in shares
        if s.share is not None
    ]
    if not rows:
        return []
    caption = next((share.note for share in shares if share.note), "")
    columns = ("method", "precision", "forward and backward ms", "step ms", "share")
    return [
        Section("Share of a training step (8 × 64 tokens, LoRA r = 8 on all linear layers)", columns, rows, caption)
    ]


def targets_section(outcome: Outcome, device: torch.device) -> list[Section]:
    """The targets beside what was measured."""
    rows = [(t.name, t.wanted, t.measured, t.verdict) for t in targets_of(outcome, device_name=device_name(device))]
    rates = median_rates(outcome)
    caption = f"Set for two CPU threads, SmolLM2-135M all-linear, r = 8, fp32; here {torch.get_num_threads()} threads."
    if rates is not None:
        caption += f" Copy {rates[0]:.1f} GB/s (read and written), fp32 matmul {rates[1]:.0f} GFLOP/s."
    return [Section("Targets", ("", "target", "measured", ""), rows, caption)]


def all_sections(outcome: Outcome, device: torch.device) -> list[Section]:
    """Every table that has rows."""
    sections = [*ratio_sections(outcome), *growth_section(outcome), *training_section(outcome.shares)]
    return [*sections, *targets_section(outcome, device)]


def rich_table(section: Section) -> Table:
    """A section for the terminal: without empty columns and without those that Markdown has room for."""
    table = Table(title=section.title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    caption = [section.caption] if section.caption else []
    keep = []
    for place, name in enumerate(section.columns):
        if name == "note":
            caption[:0] = [f"{row[0]}: {row[place]}" for row in section.rows if row[place]]
        elif name not in _WIDE and any(row[place] not in ("", "–") for row in section.rows):
            keep.append(place)
            numeric = all(re.match(r"^(–|[\d.]+%?( \[.*)?)$", row[place]) for row in section.rows)
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*(row[place] for place in keep))
    table.caption = Text("\n".join(caption))
    return table


def markdown(sections: Sequence[Section], outcome: Outcome, device: torch.device) -> str:
    """All sections as Markdown."""
    about = environment(device)
    known = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    lines = [
        "# Benchmark",
        "",
        f"{about['device']}, {about['threads']} threads; Python {about['python']}, {known}.",
        "",
    ]
    for section in sections:
        lines += [f"## {section.title}", "", f"| {' | '.join(section.columns)} |", "|---" * len(section.columns) + "|"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in section.rows]
        lines += ["", *([section.caption, ""] if section.caption else [])]
    if outcome.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in outcome.notes), ""]
    return "\n".join(lines)


def write_json(path: Path, settings: BenchSettings, outcome: Outcome, device: torch.device) -> None:
    """Write settings, environment, every sample and what follows from them."""
    results = [{**asdict(r), "title": r.title, "median_ms": r.median_ms, "ratio": r.ratio} for r in outcome.results]
    fitted = [
        {"method": method, "axis": axis, "time": of_time, "kernels": of_kernels}
        for (method, axis), (of_time, of_kernels) in exponents(outcome.growth).items()
    ]
    content = {
        "settings": {**asdict(settings), "output_dir": None},
        "environment": environment(device),
        "targets": [asdict(target) for target in targets_of(outcome, device_name=device_name(device))],
        "results": results,
        "machine": [asdict(machine) for machine in outcome.machines],
        "growth": [asdict(point) for point in outcome.growth],
        "exponents": fitted,
        "training": [{**asdict(share), "share": share.share} for share in outcome.shares],
        "notes": outcome.notes,
        "stopped": outcome.stopped,
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
