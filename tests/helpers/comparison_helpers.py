"""Small comparisons for the tests of `lorapro compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorapro_hf.commands.compare.command import add_compare
from lorapro_hf.commands.compare.plan import PlannedRun, next_runs, plan
from lorapro_hf.commands.compare.settings import CompareSettings, settings_of
from lorapro_hf.commands.compare.store import RunRecord
from lorapro_hf.commands.compare.sweep import Sweep
from lorapro_hf.commands.compare.workers import Worker

CONFIGS = Path(__file__).parents[2] / "configs" / "compare"
CPU = torch.device("cpu")
SIZES = {"model": "tiny-random", "steps": 3, "batch_size": 2, "validation_size": 4, "test_size": 4, "ranks": [2]}
TINY = {"kind": "questions", "max_length": 512, **SIZES}
CLASSES = {"kind": "classification", "classes": 2, "max_length": 16, **SIZES, "batch_size": 4}


def content(**more: Any) -> dict[str, Any]:
    """Without more, untuned and with the recipe of the plain loops of the tests."""
    recipe = {"schedule": "cosine", "warmup": 0.0, "max_grad_norm": 0.0}
    compared = {"methods": {"lora": [1e-2], "full": [1e-2]}, "tasks": {"tiny": dict(TINY)}}
    return {"seeds": [0], "tuning_seeds": [], **recipe, **compared, **more}


def settings(folder: Path, **more: Any) -> CompareSettings:
    return settings_of(content(output_dir=str(folder), **more))


def sweep_of(chosen: CompareSettings, **more: Any) -> Sweep:
    return Sweep(chosen, Worker(), CPU, more.pop("console", Console(quiet=True)), **more)


def run_all(chosen: CompareSettings, **more: Any) -> Sweep:
    sweep = sweep_of(chosen, **more)
    sweep.run()
    return sweep


def runs_of(chosen: CompareSettings) -> list[PlannedRun]:
    """The first runs of all cells."""
    return [run for cell in plan(chosen) for run in next_runs(cell, {})]


def only(method: str, rate: float = 1e-2, **more: Any) -> PlannedRun:
    return runs_of(settings_of(content(methods={method: [rate]}, **more)))[0]


def record_of(run: PlannedRun, **more: Any) -> RunRecord:
    scores = {"validation": {"loss": 1.0}, "test": {"loss": 1.0}}
    shown = {"scores": scores, "losses": [2.0, 1.0], "wall_s": 1.0, "environment": {"device": "cpu"}}
    return RunRecord(**{**run.entry(), "status": "finished", **shown, **more})


def command_line(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_compare(parser)
    parsed = parser.parse_args(list(arguments))
    return int(parsed.run(parsed))
