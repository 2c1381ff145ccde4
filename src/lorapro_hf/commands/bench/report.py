"""Which report does a benchmark run show and keep?"""

from __future__ import annotations

import itertools
import os
import platform
import re
import statistics
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader

from lorapro_hf.commands.bench.growth import AXES, curves, fitted_exponent
from lorapro_hf.commands.bench.results import LayerTime, Outcome, Result
from lorapro_hf.commands.bench.settings import METHODS, MODELS
from lorapro_hf.commands.common.records import package_version

_VERSIONS = ("lorapro_hf", "torch", "peft", "transformers", "triton", "lora-pro-adamw", "pytorch_optimizer", "numpy")


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


def _workload(result: Result) -> tuple[str, int, str]:
    return MODELS[result.workload].title, result.rank, result.dtype


def _layers(time: LayerTime) -> tuple[str, int, str]:
    return MODELS[time.workload].title, time.rank, time.dtype


def _place(result: Result) -> tuple[bool, int, int]:
    return not result.whole, result.batch, list(METHODS).index(result.method)


def markdown(outcome: Outcome, wide: bool = True) -> str:
    """The tables and notes as Markdown; without `wide`, only the columns for which a terminal has room."""
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), keep_trailing_newline=True)
    return templates.get_template("report.md.jinja").render(
        wide=wide,
        about=outcome.environment,
        machines=outcome.machines,
        groups=[(*key, sorted(group, key=_place)) for key, group in itertools.groupby(outcome.results, _workload)],
        curves=curves(outcome.growth),
        training=outcome.training,
        layers=[(*key, [*group]) for key, group in itertools.groupby(outcome.layers, _layers)],
        notes=outcome.notes,
        methods=METHODS,
        axes=AXES,
        median=statistics.median,
        exponent=fitted_exponent,
    )
