"""Which numbers does the log of a training hold: losses by step, evaluations, the final result?"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


def split_at_end(log_history: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any] | None]:
    """Return the entries logged during the training and those after it, `None` while the training goes on."""
    ends = [i for i, entry in enumerate(log_history) if "train_runtime" in entry]
    if not ends:
        return list(log_history), None
    return list(log_history[: ends[-1]]), list(log_history[ends[-1] + 1 :])


def final_evaluation(log_history: Sequence[Mapping[str, Any]], best_step: int | None = None) -> dict[str, float]:
    """Return the metrics of the saved weights, without `eval_`.

    Args:
        log_history: `trainer.state.log_history`.
        best_step: The step whose weights were loaded at the end of the training, if it was not the last.
    """
    before, after = split_at_end(log_history)
    during, later = _evaluations(before), _evaluations(after or [])
    if later:
        return later[max(later)]
    if after is not None and best_step in during:
        return during[best_step]
    return during[max(during)] if during else {}


def evaluations_by_step(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the evaluations of a log, each with step, epoch and the last training loss before it."""
    losses, epochs = logged_numbers(log_history, "loss"), logged_numbers(log_history, "epoch")
    rows = []
    for step, metrics in sorted(_evaluations(log_history).items()):
        epoch = {"epoch": epochs[step]} if step in epochs else {}
        before = [at for at in losses if at <= step]
        loss = {"training loss": losses[max(before)]} if before else {}
        rows.append({"step": step, **epoch, **loss, **metrics})
    return rows


def logged_numbers(log_history: Iterable[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Return the numbers logged under a name by step; the last one of a step counts."""
    pairs = ((_step(entry), _as_number(entry.get(name))) for entry in log_history)
    return {step: value for step, value in pairs if step is not None and value is not None}


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries whose values are numbers, without lists, texts, `None` and the like."""
    converted = {name: _as_number(value) for name, value in values.items()}
    return {name: value for name, value in converted.items() if value is not None}


def number(value: Any) -> str:
    """Return a number as a table shows it: rounded to four decimals, small ones to three digits."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    return f"{value:.4f}".rstrip("0").rstrip(".") if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def _evaluations(entries: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    by_step: dict[int, dict[str, float]] = {}
    for entry in entries:
        names = (name for name in entry if name.startswith("eval_") and not name.endswith(_NO_METRICS))
        metrics = numbers_of({name.removeprefix("eval_"): entry[name] for name in names})
        step = _step(entry)
        if metrics and step is not None:
            by_step.setdefault(step, {}).update(metrics)
    return by_step


def _step(entry: Mapping[str, Any]) -> int | None:
    step = _as_number(entry.get("step"))
    return int(step) if step is not None and math.isfinite(step) else None


def _as_number(value: Any) -> float | None:
    """Return a number of Python or NumPy, or a tensor with one element, as `float`; `None` for everything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # several elements, or too many digits for a float
        return None
