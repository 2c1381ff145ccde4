"""What are the steps of an evaluation, and how are its results written?"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
import peft
import torch
import transformers
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.utils import handle_non_serializable, make_table, setup_logging
from transformers.utils import logging as transformers_logging

import lorapro_hf
from lorapro_hf.commands.evaluate.model import load_model
from lorapro_hf.commands.evaluate.tasks import load_tasks
from lorapro_hf.options import UsageError

_NOT_A_SETTING = {"run", "command", "task", "json", "is_program"}


def run_evaluation(arguments: argparse.Namespace) -> int:
    """Load, evaluate, print and write the results, and return the exit code 0.

    Raises:
        UsageError: arguments that cannot be followed.
    """
    transformers_logging.disable_progress_bar()
    setup_logging(logging.ERROR)
    samples_file = arguments.output.with_suffix(".samples.jsonl")
    _require_writable(arguments.output, samples_file)
    started = time.perf_counter()
    if arguments.confirm_run_unsafe_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # the metric code_eval asks for it besides
    tasks = load_tasks(arguments)
    lm = load_model(arguments)
    transformers.set_seed(DEFAULT_OTHER_SEED)  # for tasks that sample their answers
    found = evaluate(
        lm=lm,
        task_dict=tasks,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=True,
        confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
    )
    if found is None or os.environ.get("LOCAL_RANK", "0") != "0":  # one of several processes reports
        return 0
    results = summary(arguments.task, found)
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["settings"] = {name: value for name, value in vars(arguments).items() if name not in _NOT_A_SETTING}
    packages = (lorapro_hf, lm_eval, torch, transformers, peft)
    results["versions"] = {package.__name__: package.__version__ for package in packages}
    text = json.dumps(results, indent=2, default=handle_non_serializable)
    print(text if arguments.json else make_table(found))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    samples = [{"task": task, **row} for task, rows in found["samples"].items() for row in rows]
    lines = [json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) for sample in samples]
    samples_file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"Results: {arguments.output}\nAnswers: {samples_file}", file=sys.stderr)
    return 0


def summary(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the task or group `name` in lm-eval's results; several tasks also have theirs in `subtasks`."""
    tasks = {task: count["effective"] for task, count in found["n-samples"].items()}
    own = next(iter(tasks)) if len(tasks) == 1 else name
    results: dict[str, Any] = {
        "task": name,
        "problems": sum(tasks.values()),
        "num_fewshot": found["n-shot"].get(own),
        **figures(found["results"].get(own, {})),
    }
    if len(tasks) > 1:
        results["subtasks"] = {task: {"problems": tasks[task], **figures(found["results"][task])} for task in tasks}
    return results


def figures(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """Each figure of a task and its standard error, `None` where there is none.

    lm-eval's keys are `metric,filter`. A metric with one filter keeps its name; with several filters, which read the
    same answer in different ways, the filters name the figures: `exact_match,strict-match` is `strict_match`.
    """
    values = {tuple(key.split(",", 1)): value for key, value in entry.items() if "," in key}
    filters = Counter(metric for metric, _ in values)
    named: dict[str, float | None] = {}
    for (metric, way), value in values.items():
        name, error, _ = metric.partition("_stderr")
        if filters[metric] > 1:
            name = way.replace("-", "_") if name == "exact_match" else f"{name},{way}"
        named[name + error] = float(value) if isinstance(value, (int, float)) else None
    return named


def _require_writable(output: Path, samples: Path) -> None:
    """Refuse a file that cannot or should not be written before any time is spent."""
    for file in (output, samples):
        if file.exists():
            raise UsageError(f"{file} exists already: name another file by --output, or remove it.")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UsageError(f"cannot write to --output {output}: {folder} is no writable folder. Choose another file.")
