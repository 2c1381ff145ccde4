"""Which model does a configuration describe? It is built without weights and without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lorapro_hf.commands.common.tasks import TASKS
from lorapro_hf.options import UsageError
from lorapro_hf.utils.private_names import private


def base_on_meta(
    name: str,
    task: str | None,
    *,
    architecture: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel, str]:
    """The model of a folder's or repository's configuration, on the meta device, and its task, a key of `TASKS`.

    By default the task is that of the class `architecture`, or else of the class which the configuration names.
    `settings` are more keywords for the configuration's `from_pretrained`, such as `num_labels` or `gguf_file`.

    Raises:
        UsageError: there is no such configuration, or no such model for the task.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision, **settings)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        nowhere = "" if Path(name).exists() else "there is no folder of that name here, and from the Hub: "
        raise UsageError(f"cannot read the configuration of {name}: {nowhere}{error}") from error
    task = task or _task_of(config, name, architecture)
    auto_class = getattr(transformers, TASKS[task].auto_class)
    dtype = getattr(config, "dtype", None)
    try:
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code), task
    except (ValueError, ImportError, RuntimeError, AttributeError) as error:
        raise UsageError(f"cannot build {name} for the task {task}: {error}") from error


def _task_of(config: PretrainedConfig, name: str, architecture: str | None) -> str:
    named = [architecture] if architecture else [*(getattr(config, "architectures", None) or [])]
    for task, (auto_class, _) in TASKS.items():
        # public names for these mappings come and go between versions of transformers
        mapping: Any = private(getattr(transformers, auto_class), "_model_mapping")
        classes = mapping.get(type(config), ())
        classes = classes if isinstance(classes, tuple | list) else (classes,)
        if any(each.__name__ in named for each in classes):
            return task
    if architecture is not None:
        return _task_of(config, name, None)
    raise UsageError(
        f"{name}: its config.json names {named or 'no architecture'}, which does not tell the task. Add --task, one of "
        f"{', '.join(TASKS)}."
    )
