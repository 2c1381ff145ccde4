"""Which names in an adapter's settings match nothing in a model, and which ones were meant?"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorapro_hf.options import UsageError

_LISTED = 12


def require_known_names(model: nn.Module, config: LoraConfig) -> None:
    """Refuse names that match nothing in a base model; PEFT passes over them as long as one other name matches.

    Args:
        model: the base model, without an adapter.
        config: the adapter.

    Raises:
        UsageError: a name of `target_modules`, `modules_to_save` or `target_parameters` matches nothing, or a pattern.
    """
    modules = [name for name, _ in model.named_modules() if name]
    targets = config.target_modules
    if isinstance(targets, str):
        if targets != "all-linear":
            _require_match(model, targets, modules)
    elif unmatched(targets or (), modules):
        converted = _as_peft_reads(model, config)
        if not isinstance(converted.target_modules, str):
            _refuse(
                "lora_target_modules", model, unmatched(converted.target_modules or (), modules), linear_layers(model)
            )
    packed = getattr(config, "target_parameters", None) or ()
    parameters = [name for name, _ in model.named_parameters()]
    _refuse("lora_modules_to_save", model, unmatched(config.modules_to_save or (), modules), modules)
    _refuse("lora_target_parameters", model, unmatched(packed, parameters), parameters)


def unmatched(names: Iterable[str], known: Collection[str]) -> list[str]:
    """The names that are neither a known name nor its end."""
    return sorted(name for name in names if not any(f".{each}".endswith(f".{name}") for each in known))


def linear_layers(model: nn.Module) -> list[str]:
    """The names of a model's linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def described(wrong: Sequence[str], known: Sequence[str]) -> str:
    """`q_porj (did you mean q_proj?)` for each wrong name."""
    texts = []
    for name in wrong:
        near = difflib.get_close_matches(name, _ends(known, name.count(".") + 1))
        texts.append(f"{name} (did you mean {' or '.join(near)}?)" if near else name or "''")
    return ", ".join(texts)


def ends_of(names: Sequence[str]) -> str:
    """The last parts of names, each once."""
    ends = _ends(names, 1)
    return ", ".join(ends[:_LISTED]) + (f" and {len(ends) - _LISTED} more" if len(ends) > _LISTED else "")


def _refuse(option: str, model: nn.Module, wrong: Sequence[str], known: Sequence[str]) -> None:
    if wrong:
        here = f" Its linear layers: {ends_of(linear_layers(model))}." if option == "lora_target_modules" else ""
        raise UsageError(f"{option}: {type(model).__name__} has no {described(wrong, known)}.{here}")


def _require_match(model: nn.Module, pattern: str, modules: Sequence[str]) -> None:
    try:
        found = any(re.fullmatch(pattern, name) for name in modules)
    except re.error as error:
        raise UsageError(f"lora_target_modules: {pattern!r} is no regular expression: {error}.") from error
    if not found:
        raise UsageError(
            f"lora_target_modules: the pattern {pattern!r} matches no whole name in {type(model).__name__}. Its linear "
            f"layers: {ends_of(linear_layers(model))}; begin with '.*' for those of all blocks."
        )


def _ends(names: Sequence[str], parts: int) -> list[str]:
    """So many last parts of each name, more where the last one is a number."""
    found = []
    for name in names:
        own = name.split(".")
        found.append(".".join(own[-parts - own[-1].isdigit() :]))
    return list(dict.fromkeys(found))


def _as_peft_reads(model: Any, config: LoraConfig) -> LoraConfig:
    """The adapter with the names that its model has in this version of transformers, where PEFT renames them."""
    try:
        from peft.utils import transformers_weight_conversion as renaming

        found = copy.deepcopy(config)
        conversions = renaming.get_model_conversion_mapping(model)
        renaming.convert_peft_config_for_transformers(found, model=model, conversions=conversions)
    except (ImportError, AttributeError):  # an older version, or no model of transformers
        return config
    return found
