"""Which settings of a new adapter does a file hold, such as that of `lorapro ranks`?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import parse_json, read_settings_text, shown

PATTERNS = ("rank_pattern", "alpha_pattern")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and value > 0, "a whole number from 1 on"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (_is_number, "a number"),
    "use_rslora": (_is_bool, "true or false"),
    "use_dora": (_is_bool, "true or false"),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or a name"),
    "target_modules": (lambda value: isinstance(value, str) or _is_list(value), "a name or a list of names"),
    "target_parameters": (_is_list, "a list of names"),
    "modules_to_save": (_is_list, "a list of names"),
}


def read_adapter_file(path: str) -> dict[str, Any]:
    """Return the settings that a JSON file holds, by PEFT's names.

    Raises:
        UsageError: the file cannot be read, or holds another setting or a value of another kind.
    """
    try:
        content = parse_json(read_settings_text(Path(path)))
    except json.JSONDecodeError as error:
        raise UsageError(f"--lora_config {path} is no JSON: {error.msg} in line {error.lineno}.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"--lora_config {path}: {getattr(error, 'strerror', None) or error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"--lora_config {path} must hold a JSON object of LoraConfig's settings.")
    for name, value in content.items():
        if name not in (*_KINDS, *PATTERNS):
            raise UsageError(
                f"--lora_config {path}: leave out {shown(name)}; the file may hold {', '.join((*_KINDS, *PATTERNS))}."
            )
        if name in PATTERNS:
            _require_pattern(path, name, value)
        elif not _KINDS[name][0](value):
            raise UsageError(f"--lora_config {path}: {name} is {shown(value)}, not {_KINDS[name][1]}.")
    return content


def _require_pattern(path: str, name: str, value: Any) -> None:
    is_value, kind = _KINDS["r" if name == "rank_pattern" else "lora_alpha"]
    if not isinstance(value, dict):
        raise UsageError(f"--lora_config {path}: {name} is {shown(value)}, not an object of names and values.")
    for pattern, each in value.items():
        if not is_value(each):
            raise UsageError(f"--lora_config {path}: {name} of {shown(pattern)} is {shown(each)}, not {kind}.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--lora_config {path}: {shown(pattern)} in {name} is no pattern: {error}.") from error
