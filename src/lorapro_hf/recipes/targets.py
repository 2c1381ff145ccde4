"""Which names in an adapter's settings match nothing in a model, and which names come close?"""

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
    """Refuse names that match nothing in a base model; PEFT ignores them as long as another name matches.

    Args:
        model: The base model without an adapter.
        config: The adapter's settings.

    Raises:
        UsageError: if a pattern, or a name of `target_modules`, `modules_to_save` or `target_parameters`, matches
            nothing.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    targets = config.target_modules
    linear = f" Its linear layers: {ends_of(_linear_layers(model))}."
    if isinstance(targets, str):
        if targets != "all-linear":
            _require_match(type(model).__name__, targets, modules, linear)
    elif unmatched(targets or (), modules):
        targets = _as_peft_reads(model, config).target_modules
        if not isinstance(targets, str):
            _refuse("lora_target_modules", model, targets, modules, _linear_layers(model), linear)
    _refuse("lora_modules_to_save", model, config.modules_to_save, modules, modules)
    _refuse("lora_target_parameters", model, getattr(config, "target_parameters", None), parameters, parameters)


def unmatched(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Return the names that are neither a known name nor the end of one."""
    return sorted(name for name in names if not any(f".{each}".endswith(f".{name}") for each in known))


def described(wrong: Sequence[str], known: Sequence[str]) -> str:
    """Return `q_porj (did you mean q_proj?)` for each wrong name."""
    texts = []
    for name in wrong:
        near = difflib.get_close_matches(name, _ends(known, name.count(".") + 1))
        texts.append(f"{name} (did you mean {' or '.join(near)}?)" if near else name or "''")
    return ", ".join(texts)


def ends_of(names: Sequence[str]) -> str:
    """Return the last parts of names, each once, as one text."""
    ends = _ends(names, 1)
    return ", ".join(ends[:_LISTED]) + (f" and {len(ends) - _LISTED} more" if len(ends) > _LISTED else "")


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _refuse(
    option: str,
    model: nn.Module,
    names: Iterable[str] | None,
    known: Collection[str],
    proposed: Sequence[str],
    remedy: str = "",
) -> None:
    wrong = unmatched(names or (), known)
    if wrong:
        raise UsageError(f"{option}: {type(model).__name__} has no {described(wrong, proposed)}.{remedy}")


def _require_match(kind: str, pattern: str, modules: Sequence[str], remedy: str) -> None:
    try:
        matches = any(re.fullmatch(pattern, name) for name in modules)
    except re.error as error:
        raise UsageError(f"lora_target_modules: {pattern!r} is no regular expression: {error}.") from error
    if not matches:
        raise UsageError(
            f"lora_target_modules: the pattern {pattern!r} matches no whole name in {kind}; begin with '.*' to match "
            f"all blocks.{remedy}"
        )


def _ends(names: Sequence[str], parts: int) -> list[str]:
    """Return that many last parts of each name, and one more if the last part is a number."""
    split = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(name[-parts - name[-1].isdigit() :]) for name in split))


def _as_peft_reads(model: Any, config: LoraConfig) -> LoraConfig:
    """Return the settings with the names of this version of transformers, to which PEFT converts older names."""
    try:
        from peft.utils import transformers_weight_conversion as renaming

        converted = copy.deepcopy(config)
        conversions = renaming.get_model_conversion_mapping(model)
        renaming.convert_peft_config_for_transformers(converted, model=model, conversions=conversions)
    except (ImportError, AttributeError):  # an older PEFT, or a model that is not of transformers
        return config
    return converted
