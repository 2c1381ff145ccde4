"""Is what a YAML says of the right kind, and known to whom it is meant for?"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig
from transformers import get_scheduler

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.options import UsageError

_NAME = re.compile(r"[\w.-]+")
_SET_BY_US = {"r", "lora_alpha", "target_modules", "task_type"}
# What the functions of `optimizers.BUILDERS` take beside the learning rate, by their names.
_ADAMW = {"betas", "eps", "weight_decay", "amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused"}
_KEYWORDS: Mapping[str, set[str]] = {
    "adamw": _ADAMW,
    "loraplus": _ADAMW | {"loraplus_lr_ratio", "loraplus_weight_decay", "loraplus_lr_embedding"},
    "lorafa": {"weight_decay", "use_rslora"},
    "riemannian": _ADAMW | {"reg"},
}
_NUMBERS = ("int", "float", int, float)  # types of the fields of LoraConfig, which may be written as text
_FLAGS = {"amsgrad", "maximize", "capturable", "differentiable", "use_rslora"}


def require_name(what: str, name: Any) -> None:
    """Refuse a name that is of no use in files and on the command line."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"The {what} {name!r} must be named with letters, digits, '_', '-' and '.'.")


def require_mapping(owner: str, key: str, value: Any) -> None:
    """Refuse what is neither a mapping from names nor left out."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        raise UsageError(f"{owner}: {key}={value!r} must be a mapping from names to values.")


def number(owner: str, key: str, value: Any) -> float:
    """A finite number; YAML reads `1e-3` as text, which is one here.

    Raises:
        UsageError: it is something else.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UsageError(f"{owner}{key}={value!r} must be a number.")
    return found


def require_types(owner: str, values: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Refuse values that are not of the types that their keys want; `bool` is no `int` here."""
    for key, wanted in kinds.items():
        if key in values and type(values[key]) not in wanted:
            names = {str: "a text", bool: "true or false", int: "a whole number", type(None): "null"}
            raise UsageError(f"{owner}: {key}={values[key]!r} must be {' or '.join(names[kind] for kind in wanted)}.")


def require_settings(name: str, optimizer: str, settings: Mapping[str, Any]) -> None:
    """Refuse keywords that the optimizer of a method does not know, or that are of the wrong kind.

    Args:
        name: Of the method.
        optimizer: Which of `optimizers.BUILDERS` makes it.
        settings: Its keywords. LoRA-Pro's are those of `LoRAProConfig`, whose own messages are passed on.
    """
    if optimizer == "lorapro":
        unknown = sorted(set(settings) - {each.name for each in fields(LoRAProConfig)})
        if unknown:
            known = ", ".join(each.name for each in fields(LoRAProConfig))
            raise UsageError(f"Method {name}: optimizer has {unknown}, unknown to LoRA-Pro, which knows {known}.")
        try:
            rule_of(LoRAProConfig(**settings))
        except (TypeError, ValueError) as error:
            raise UsageError(f"Method {name}: {error}") from error
        return
    # nothing is known of what a program adds to `optimizers.BUILDERS`
    known_here = _lorarite_keywords() if optimizer == "lorarite" else _KEYWORDS.get(optimizer, set())
    unknown = sorted(set(settings) - known_here) if known_here else []
    if unknown:
        raise UsageError(f"Method {name}: optimizer has {unknown}, unknown to it; it knows {sorted(known_here)}.")
    for key, value in settings.items() if known_here else ():
        if isinstance(value, str):
            raise UsageError(
                f"Method {name}: optimizer.{key}={value!r} is text; YAML wants numbers with a point, such as 1.0e-8, "
                "and true or false without quotes."
            )
        if key in _FLAGS and not isinstance(value, bool):
            raise UsageError(f"Method {name}: optimizer.{key}={value!r} must be true or false.")
        if isinstance(value, list | tuple) != (key == "betas") or (key == "betas" and len(value) != 2):
            wanted = "two numbers in a list" if key == "betas" else "one value"
            raise UsageError(f"Method {name}: optimizer.{key}={value!r} must be {wanted}.")
        for part in value if key == "betas" else (value,):
            if not isinstance(part, bool | None):
                number(f"Method {name}: optimizer.", key, part)


def _lorarite_keywords() -> set[str]:
    try:
        from pytorch_optimizer import LoRARite
    except ImportError:  # told when it is to be trained; a report needs no optimizer
        return set()
    return set(inspect.signature(LoRARite.__init__).parameters) - {"self", "params", "lr", "kwargs"}


def require_adapter(name: str, adapter: Mapping[str, Any]) -> None:
    """Refuse keywords that `LoraConfig` does not know, that are the comparison's own, or flags that are none."""
    known = {each.name: each for each in fields(LoraConfig)}
    unknown = sorted(key for key in adapter if key not in known or key in _SET_BY_US)
    if unknown:
        raise UsageError(
            f"Method {name}: adapter has {unknown}, which LoraConfig does not know or the comparison itself sets "
            "(ranks, scaling, target_modules)."
        )
    for key, value in adapter.items():
        if known[key].type in ("bool", bool) and not isinstance(value, bool):
            raise UsageError(f"Method {name}: adapter.{key}={value!r} must be true or false.")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (is_number and not math.isfinite(value)) or (known[key].type in _NUMBERS and not is_number):
            raise UsageError(f"Method {name}: adapter.{key}={value!r} must be a number, such as 0.1 or 1.0e-1.")


def require_schedule(name: str, steps: int, warmup: int) -> None:
    """Refuse a schedule that needs more than the number of steps, by trying it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        scheduler = get_scheduler(name, optimizer, warmup, steps)
        optimizer.step()
        scheduler.step()
    except Exception as error:
        raise UsageError(
            f"schedule={name!r} cannot be used here, where a schedule knows steps and warm-up alone ({error}); choose "
            "linear, cosine, constant or the like."
        ) from error
