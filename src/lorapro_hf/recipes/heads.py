"""Which layers of a model are new, because its checkpoint has no weights for them?"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lorapro_hf.recipes.model import ModelArguments, load_model

logger = logging.getLogger(__name__)
_REPORTS = ("LOAD REPORT", "Some weights of ")  # in what transformers 5 and 4 say of weights without a counterpart


def load_with_head(
    auto_class: Any, arguments: ModelArguments, head: str | None = None, **kwargs: Any
) -> tuple[Any, set[str]]:
    """As `load_model`, for a task that may need a new head: one line names it, in place of transformers' report.

    The report stands if anything else is new.

    Args:
        auto_class: such as `AutoModelForSequenceClassification`.
        arguments: which model.
        head: its name; by default all that is outside of the base model belongs to it.
        **kwargs: as in `load_model`.

    Returns:
        The model, and the names of the weights that start at random because the checkpoint has none.
    """
    with _held_reports() as reports:
        model, loaded = load_model(auto_class, arguments, output_loading_info=True, **kwargs)
        others = {key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]}  # of another size
        new = {*loaded["missing_keys"], *others}
        if all(_is_of_head(key, model, head) for key in new):
            reports.clear()
            if new:
                layers = ", ".join(sorted({key.rpartition(".")[0] for key in new}))
                logger.info("New in the %s, to be trained whole: %s", type(model).__name__, layers)
    return model, set(loaded["missing_keys"])


def _is_of_head(key: str, model: PreTrainedModel, head: str | None) -> bool:
    base = model.base_model_prefix
    if head is not None:
        return key.partition(".")[0] == head
    return hasattr(model, base) and not key.startswith(f"{base}.")


@contextmanager
def _held_reports() -> Iterator[list[logging.LogRecord]]:
    """Hold the reports of transformers back; the ones that are left in the list at the end are made then."""
    speaker, held = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        is_report = any(words in record.getMessage() for words in _REPORTS)
        if is_report:
            held.append(record)
        return not is_report

    speaker.addFilter(hold)
    try:
        yield held
    finally:
        speaker.removeFilter(hold)
        for record in held:
            speaker.handle(record)


def layers_without_weights(model: PreTrainedModel, missing_keys: Collection[str]) -> set[str]:
    """The layers that start at random because the checkpoint has none: heads, and what leads from the model to them.

    Args:
        model: as loaded.
        missing_keys: of `from_pretrained(..., output_loading_info=True)`.
    """
    prefix = f"{model.base_model_prefix}."
    inside = {key.rpartition(".")[0] for key in missing_keys if key.startswith(prefix)}
    return inside | {key.partition(".")[0] for key in missing_keys if not key.startswith(prefix)}
