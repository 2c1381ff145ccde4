"""How many functions does a model complete so that they pass their tests?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorapro_hf.commands.common.generation import Completion
from lorapro_hf.commands.evaluate.data import is_file, load_rows
from lorapro_hf.commands.evaluate.prompts import check_style, code_prompt, code_stops
from lorapro_hf.commands.evaluate.sandbox import Sandbox
from lorapro_hf.commands.evaluate.solving import Problem, Sample, Solving, share_of, solve
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.metrics import load_metric

HUMANEVAL = "openai/openai_humaneval"
_COLUMNS = ("task_id", "prompt", "test", "entry_point")


def evaluate_humaneval(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str = HUMANEVAL,
    *,
    allow_code_execution: bool = False,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    prompt_style: str = "plain",
    limit: int | None = None,
    sandbox: Sandbox | None = None,
    solving: Solving | None = None,
) -> dict[str, Any]:
    """Evaluate a causal language model on HumanEval, or on a data set of its form: pass@1, greedy.

    Args:
        model: with an adapter or without.
        tokenizer: the model's.
        dataset: a name on the Hub, or a JSON, JSON lines (also gzipped), CSV or Parquet file with `task_id`, `prompt`,
            `test` (defines `check`) and `entry_point`.
        allow_code_execution: whether the programs that the model writes may be run on this machine, in `sandbox`.
            Nothing happens without it.
        dataset_config: configuration of a data set of the Hub.
        dataset_split: split of a data set of the Hub; `test` by default.
        prompt_style: `plain` (the model goes on with the code), `alpaca` or `chat` (it is asked for the function).
        limit: evaluate the first so many problems only.
        sandbox: where the programs run; by default one with the default limits.
        solving: sizes and files.

    Returns:
        `pass@1` with its standard error, the number of `problems`, the share `unfinished` for which `max_new_tokens`
        did not suffice, and what programs were `not_isolated` from.

    Raises:
        UsageError: code execution is not allowed, or data, prompts or sizes cannot be used.
    """
    if not allow_code_execution:
        raise UsageError(
            "HumanEval runs programs that the model writes on this machine. If you accept that, allow it by "
            "--allow_code_execution; they run with limits and kept apart as far as this system permits."
        )
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} must be at least 1.")
    check_style(prompt_style, tokenizer)
    split = "test" if dataset_split is None and not is_file(dataset) else dataset_split
    rows = load_rows(dataset, _COLUMNS, dataset_config, split, limit)
    sandbox = Sandbox() if sandbox is None else sandbox
    problems = [
        Problem(
            row["task_id"],
            code_prompt(row["prompt"], prompt_style, tokenizer),
            # the limit decides on verdicts, so that those of another one are not to be taken over
            {"head": row["prompt"], **_test(row), "code_timeout": sandbox.limits.seconds},
        )
        for row in rows
    ]
    if len({problem.id for problem in problems}) < len(problems):
        raise UsageError(f"{dataset} has the same task_id twice; each problem needs its own.")

    def judge(asked: Sequence[Problem], texts: Sequence[Completion]) -> list[Sample]:
        programs = [_program(p, text.text, prompt_style) for p, text in zip(asked, texts, strict=True)]
        with ThreadPoolExecutor(max_workers=max(1, min(len(programs), os.cpu_count() or 1))) as pool:
            verdicts = list(pool.map(sandbox.run, programs))
        return [{"passed": verdict.passed, "outcome": verdict.outcome} for verdict in verdicts]

    samples = solve(
        model,
        tokenizer,
        problems,
        judge,
        solving or Solving(),
        code_stops(prompt_style),
        add_special_tokens=prompt_style != "chat",
    )
    passed = [int(sample["passed"]) for sample in samples]
    found = load_metric("accuracy").compute(predictions=passed, references=[1] * len(passed))
    return {
        "task": "humaneval",
        "problems": len(samples),
        "pass@1": found["accuracy"],
        "pass@1_stderr": share_of(samples, "passed")[1],
        "unfinished": 1.0 - share_of(samples, "finished")[0],
        "not_isolated": sandbox.isolation.missing,
    }


def _test(row: dict[str, str]) -> dict[str, str]:
    return {"test": f"{row['test']}\ncheck({row['entry_point']})"}


def _program(problem: Problem, text: str, style: str) -> str:
    # asked for the whole function, the model repeats the head, whose docstring alone is a body already
    between = "\n" if style == "alpaca" else ""
    return f"{problem.more['head']}{between}{text}\n{problem.more['test']}\n"
