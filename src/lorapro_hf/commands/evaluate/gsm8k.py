"""How many word problems does a model solve, GSM8K's or others of its form?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorapro_hf.commands.common.generation import Completion
from lorapro_hf.commands.common.word_problems import word_problems
from lorapro_hf.commands.evaluate.answers import FinalAnswer, judge
from lorapro_hf.commands.evaluate.data import is_file, load_rows
from lorapro_hf.commands.evaluate.prompts import check_style, question_prompt, question_stops
from lorapro_hf.commands.evaluate.solving import Problem, Sample, Solving, share_of, solve
from lorapro_hf.options import UsageError

GSM8K = "openai/gsm8k"
_COLUMNS = ("question", "answer")


def evaluate_gsm8k(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str = GSM8K,
    *,
    dataset_config: str | None = None,
    dataset_split: str | None = None,
    fewshot_dataset: str | None = None,
    num_fewshot: int = 0,
    prompt_style: str = "plain",
    limit: int | None = None,
    solving: Solving | None = None,
) -> dict[str, Any]:
    """Evaluate a causal language model on GSM8K, or on a data set of its form.

    Args:
        model: with an adapter or without.
        tokenizer: the model's.
        dataset: a name on the Hub, or a JSON, JSON lines, CSV or Parquet file with `question` and `answer`, which ends
            with `#### ` and a number.
        dataset_config: configuration of a data set of the Hub; `main` for GSM8K.
        dataset_split: split of a data set of the Hub; `test` by default.
        fewshot_dataset: file with the examples that stand before each problem; by default the split `train` of a data
            set of the Hub. A file as `dataset` needs another here if there are to be examples.
        num_fewshot: how many examples, the first ones that are not the problem itself.
        prompt_style: `plain` (`Question: ... Answer:`), `alpaca` (the instruction template that the LoRA-Pro paper
            trains and evaluates with) or `chat` (the tokenizer's template).
        limit: evaluate the first so many problems only.
        solving: sizes and files.

    Returns:
        `strict_match` and `flexible_extract` as lm-evaluation-harness counts them, each with its standard error, the
        number of `problems`, and the share `unfinished` for which `max_new_tokens` did not suffice.

    Raises:
        UsageError: of data, prompts or sizes that cannot be used.
    """
    if num_fewshot < 0 or (limit is not None and limit < 1):
        raise UsageError(f"num_fewshot={num_fewshot} must be at least 0, limit={limit} at least 1.")
    if num_fewshot and prompt_style == "alpaca":
        raise UsageError("the alpaca prompt has no room for examples: leave num_fewshot out or use another style.")
    if fewshot_dataset is not None and not num_fewshot:
        raise UsageError("fewshot_dataset goes with num_fewshot.")
    check_style(prompt_style, tokenizer)
    local = is_file(dataset)
    config = "main" if dataset == GSM8K and dataset_config is None else dataset_config
    split = "test" if dataset_split is None and not local else dataset_split
    rows = load_rows(dataset, _COLUMNS, config, split, limit)
    examples: list[dict[str, str]] = []
    if num_fewshot:
        if fewshot_dataset is not None:
            examples = load_rows(fewshot_dataset, _COLUMNS, limit=num_fewshot + 1)
        elif local:
            raise UsageError(f"{dataset} is a file: name another with the examples by --fewshot_dataset.")
        else:
            examples = load_rows(dataset, _COLUMNS, config, "train", num_fewshot + 1)
        if len(examples) < num_fewshot:
            raise UsageError(f"there are only {len(examples)} examples; lower --num_fewshot.")
    return _evaluate(
        model,
        tokenizer,
        "gsm8k",
        rows,
        lambda question: [row for row in examples if row["question"] != question][:num_fewshot],
        prompt_style,
        solving or Solving(),
    )


def evaluate_word_problems(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    limit: int = 64,
    solving: Solving | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the arithmetic word problems that `lorapro demo` trains on and holds out.

    Args:
        model: with an adapter or without.
        tokenizer: the model's.
        seed: of the problems: with the demo's seed and number, those that it held out.
        limit: how many problems.
        solving: sizes and files.

    Returns:
        As `evaluate_gsm8k`.

    Raises:
        UsageError: there are not so many problems.
    """
    try:
        rows = word_problems(0, limit, seed=seed)[1].to_list()
    except ValueError as error:
        raise UsageError(f"{error} Lower --limit.") from error
    solving = Solving(max_new_tokens=128) if solving is None else solving
    return _evaluate(model, tokenizer, "word_problems", rows, lambda question: [], "plain", solving)


def _evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Sequence[Mapping[str, str]],
    examples: Callable[[str], Sequence[Mapping[str, str]]],
    style: str,
    solving: Solving,
) -> dict[str, Any]:
    unmarked = [row["answer"] for row in rows if "#### " not in str(row["answer"])]
    if unmarked:
        raise UsageError(f"the answer {unmarked[0]!r} does not end with '#### ' and a number, as GSM8K's do.")
    problems = [
        Problem(
            str(index),
            question_prompt(row["question"], style, examples(row["question"]), tokenizer),
            {"answer": row["answer"]},
        )
        for index, row in enumerate(rows)
    ]
    samples = solve(
        model, tokenizer, problems, _judge, solving, question_stops(style), add_special_tokens=style != "chat"
    )
    metric = FinalAnswer(keep_in_memory=True)
    texts, answers = [sample["text"] for sample in samples], [sample["answer"] for sample in samples]
    found: dict[str, Any] = metric.compute(predictions=texts, references=answers)
    errors = {f"{name}_stderr": share_of(samples, name)[1] for name in found}
    unfinished = 1.0 - share_of(samples, "finished")[0]
    return {"task": task, "problems": len(samples), **found, **errors, "unfinished": unfinished}


def _judge(problems: Sequence[Problem], texts: Sequence[Completion]) -> list[Sample]:
    return [dict(judge(text.text, problem.more["answer"])) for problem, text in zip(problems, texts, strict=True)]
