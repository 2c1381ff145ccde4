"""Which layers of a model are new because its checkpoint has no weights for them?"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lorapro_hf.recipes.model import ModelArguments, load_model

logger = logging.getLogger(__name__)
_REPORTS = ("LOAD REPORT", "Some weights of ")  # in the reports of transformers 5 and 4 on missing weights


def load_with_head(
    auto_class: Any, arguments: ModelArguments, head: str | None = None, **kwargs: Any
) -> tuple[Any, set[str]]:
    """Load a model that may need a new head, which one line of log names in place of transformers' report.

    Args:
        auto_class: Such as `AutoModelForSequenceClassification`.
        arguments: The model's name and settings.
        head: Name of the head; by default every layer outside the base model. Other new layers get a warning.
        **kwargs: More keywords for `load_model`.

    Returns:
        The model, and the names of the weights that start at random.
    """
    with _without_reports():
        model, report = load_model(auto_class, arguments, output_loading_info=True, **kwargs)
    resized = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    new = {*report["missing_keys"], *resized}
    others = {key for key in new if not _is_of_head(key, model, head)}
    if new - others:
        logger.info("New in the %s, to be trained whole: %s", type(model).__name__, _layers(new - others))
    if others:
        logger.warning("%s has no weights for %s: they start at random.", arguments.model_name_or_path, _layers(others))
    return model, set(report["missing_keys"])


def layers_without_weights(model: PreTrainedModel, missing_keys: Collection[str]) -> set[str]:
    """Return the layers that start at random: heads, and layers between the base model and the head."""
    prefix = f"{model.base_model_prefix}."
    inside = {key.rpartition(".")[0] for key in missing_keys if key.startswith(prefix)}
    return inside | {key.partition(".")[0] for key in missing_keys if not key.startswith(prefix)}


def _is_of_head(key: str, model: PreTrainedModel, head: str | None) -> bool:
    base = model.base_model_prefix
    if head is not None:
        return key.partition(".")[0] == head
    return hasattr(model, base) and not key.startswith(f"{base}.")


def _layers(keys: Collection[str]) -> str:
    return ", ".join(sorted({key.rpartition(".")[0] for key in keys}))


@contextmanager
def _without_reports() -> Iterator[None]:
    """Drop transformers' report on missing weights."""
    source = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _REPORTS)

    source.addFilter(is_other)
    try:
        yield
    finally:
        source.removeFilter(is_other)
