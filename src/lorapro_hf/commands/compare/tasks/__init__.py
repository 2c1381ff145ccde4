"""The tasks: models, data and metrics. Built-in ones need no network."""

from __future__ import annotations

import re

from lorapro_hf.commands.compare.settings import TaskSettings
from lorapro_hf.commands.compare.tasks.base import LoadedTask
from lorapro_hf.options import UsageError

# Messages shared with the demo name its options; a task has them as keys, one under another name.
_KEYS = {"eval_size": "validation_size or test_size"}


def load_task(settings: TaskSettings) -> LoadedTask:
    """Load the model and the data of a task.

    Raises:
        UsageError: model or data are missing or useless; it names the task and the keys of the YAML.
    """
    try:
        return _load(settings)
    except UsageError as error:
        text = re.sub(r"`--(\w+) ([^`]+)`", r"`\1: \2`", str(error))
        text = re.sub(r"(?<![\w/.-])--(\w+)", lambda option: f"`{_KEYS.get(option[1], option[1])}`", text)
        text = text.replace("The demo's model", "The model of a task without `model`")
        named = re.search(rf"\btask {re.escape(settings.name)}(?![\w.-])", text, re.IGNORECASE)
        raise UsageError(text if named else f"Task {settings.name}: {text}") from error


def _load(settings: TaskSettings) -> LoadedTask:
    if settings.kind == "questions":
        from lorapro_hf.commands.compare.tasks.questions import load_questions

        return load_questions(settings)
    if settings.kind == "text":
        from lorapro_hf.commands.compare.tasks.text import load_text

        return load_text(settings)
    from lorapro_hf.commands.compare.tasks.classification import load_classification

    return load_classification(settings)
