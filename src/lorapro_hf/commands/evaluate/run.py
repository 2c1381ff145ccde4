"""What happens in `lorapro evaluate`, one thing after the other?"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from rich.console import Console
from transformers.utils import logging as transformers_logging

import lorapro_hf
from lorapro_hf.commands.common.models import load, this_process
from lorapro_hf.commands.common.progress import progress_bars
from lorapro_hf.commands.evaluate.gsm8k import evaluate_gsm8k, evaluate_word_problems
from lorapro_hf.commands.evaluate.humaneval import evaluate_humaneval
from lorapro_hf.commands.evaluate.sandbox import Limits, Sandbox
from lorapro_hf.commands.evaluate.solving import Solving
from lorapro_hf.options import UsageError

_SHARED = ("dataset", "dataset_config", "dataset_split", "prompt_style", "limit")
_OWN = {
    "gsm8k": (*_SHARED, "num_fewshot", "fewshot_dataset"),
    "humaneval": (*_SHARED, "allow_code_execution"),
    "word_problems": ("seed", "limit"),
}
_TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "gsm8k": evaluate_gsm8k,
    "humaneval": evaluate_humaneval,
    "word_problems": evaluate_word_problems,
}
_MODEL = ("adapter", "dtype", "load_in_4bit", "gguf_file", "trust_remote_code")
_NOT_A_SETTING = {"run", "command", "task", "json", "resume"}
_LINES = 10  # of progress where there is no terminal


def run_evaluation(arguments: argparse.Namespace) -> int:
    """Load, evaluate, and write and print the results.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: of arguments that cannot be followed.
        KeyboardInterrupt: on Ctrl-C; the answers that are there are kept.
    """
    transformers_logging.disable_progress_bar()
    process = this_process()
    console = Console(stderr=True, quiet=not process.is_main_process)
    samples_file = arguments.output.with_suffix(".samples.jsonl")
    _prepare(arguments.output, samples_file, arguments.resume)
    process.wait_for_everyone()  # before one of them writes
    started = time.perf_counter()
    options: dict[str, Any] = {name: getattr(arguments, name) for name in _OWN[arguments.task]}
    if arguments.task == "humaneval":
        options["sandbox"] = sandbox = Sandbox(Limits(seconds=arguments.code_timeout))
        if sandbox.isolation.missing:
            missing = ", ".join(sandbox.isolation.missing)
            console.print(f"Warning: on this system programs are not kept from: {missing}.", style="yellow")
    with console.status("Loading the model"):
        model_options = {name: getattr(arguments, name) for name in _MODEL}
        model, tokenizer = load(arguments.model_name_or_path, **model_options)
    try:
        with _progress(console, f"Solving {arguments.task}") as (start, advance):
            solving = Solving(
                batch_size=arguments.batch_size,
                max_new_tokens=arguments.max_new_tokens,
                samples_file=samples_file,
                resume=arguments.resume,
                start=start,
                advance=advance,
            )
            found = _TASKS[arguments.task](model, tokenizer, **options, solving=solving)
    except KeyboardInterrupt:
        if samples_file.exists():
            console.print(f"Stopped. {samples_file} has the answers so far; --resume goes on with them.")
        raise
    if process.is_main_process:
        _report(found, arguments, samples_file, time.perf_counter() - started)
    process.destroy_process_group()
    return 0


def _prepare(output: Path, samples: Path, resume: bool) -> None:
    """Refuse what cannot be written, before any time is spent."""
    if samples.exists() and not resume:
        raise UsageError(f"{samples} is there already: go on with it by --resume, or name another file by --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to --output {output}: {error}. Choose another file.") from error
    with suppress(FileNotFoundError):  # another process has been quicker
        if output.stat().st_size == 0:
            output.unlink()


@contextmanager
def _progress(console: Console, title: str) -> Iterator[tuple[Any, Any]]:
    """Two functions, one told how many problems there are and one how many have just been solved."""
    if console.is_terminal:
        with progress_bars(console) as bars:
            task = bars.add_task(title, total=None, note="")
            yield lambda count: bars.update(task, total=count), lambda count: bars.advance(task, count)
        return
    total, done = 0, 0

    def start(count: int) -> None:
        nonlocal total
        total = count
        console.print(f"{title}: {total} problems", highlight=False)

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if done * _LINES // total > before * _LINES // total:
            console.print(f"{title}: {done} of {total}", highlight=False)

    yield start, advance


def _report(found: Mapping[str, Any], arguments: argparse.Namespace, samples: Path, seconds: float) -> None:
    settings = {name: value for name, value in vars(arguments).items() if name not in _NOT_A_SETTING}
    versions = {"lorapro_hf": lorapro_hf.__version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "peft": peft.__version__}
    results = {**found, "seconds": round(seconds, 1), "settings": settings, "versions": versions}
    text = json.dumps(results, indent=2, default=str)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(f"Results: {arguments.output}\nAnswers: {samples}", file=sys.stderr)
    if arguments.json:
        print(text)
        return
    print(f"{found['task']}: {found['problems']} problems in {seconds:.0f} s")
    for name in ("strict_match", "flexible_extract", "pass@1"):
        if name in found:
            error = found[f"{name}_stderr"]
            print(f"  {name:<18} {found[name]:7.2%}{'' if error is None else f' ± {error:.2%}'}")
    if found["unfinished"]:
        print(f"  {'unfinished':<18} {found['unfinished']:7.2%} (raise --max_new_tokens)")
