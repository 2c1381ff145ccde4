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

    Raises:
        UsageError: if a pattern, or a name of `target_modules`, `modules_to_save`, `target_parameters`, `rank_pattern`
            or `alpha_pattern`, matches nothing; the message proposes similar names.
    """
    kind = type(model).__name__
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    listing = f" Its linear layers: {ends_of(linear)}."
    targets: Any = config.target_modules
    if not isinstance(targets, str) and unmatched(targets or (), modules):
        targets = _as_peft_reads(model, config).target_modules
    if isinstance(targets, str):
        if targets != "all-linear" and not _matches(targets, modules):
            raise UsageError(
                f"lora_target_modules: the pattern {targets!r} matches no whole name in {kind}; begin with '.*' to "
                f"match all blocks.{listing}"
            )
        targets = ()
    for option, names, known, proposed, remedy in (
        ("lora_target_modules", targets, modules, linear, listing),
        ("lora_modules_to_save", config.modules_to_save, modules, modules, ""),
        ("lora_target_parameters", getattr(config, "target_parameters", None), parameters, parameters, ""),
    ):
        if wrong := unmatched(names or (), known):
            raise UsageError(f"{option}: {kind} has no {described(wrong, proposed)}.{remedy}")
    packed = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]  # experts
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            matches = re.compile(rf"(.*\.)?({pattern})$").match  # as PEFT matches
            if not any(map(matches, [*modules, *packed])):
                raise UsageError(
                    f"{option}: {kind} has no layer that {pattern!r} matches. Choose the ranks for this model "
                    "(`lorapro ranks`), or correct the name."
                )


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


def _matches(pattern: str, modules: Sequence[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in modules)
    except re.error as error:
        raise UsageError(f"lora_target_modules: {pattern!r} is no regular expression: {error}.") from error


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
