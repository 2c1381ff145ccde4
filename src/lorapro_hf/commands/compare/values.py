"""Is a value of a YAML of the type that its key wants?"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from lorapro_hf.options import UsageError

_NOUNS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
_NOUNS |= {tuple[str, ...]: "a list of texts", tuple[int, ...]: "a list of whole numbers"}


def require_name(noun: str, name: Any) -> None:
    """Refuse a name that cannot stand in files and on the command line."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"The {noun} {name!r} must be named with letters, digits, '_', '-' and '.'.")


def require_mapping(owner: str, key: str, value: Any) -> None:
    """Refuse a value that is neither a mapping from names nor left out."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        raise UsageError(f"{owner}: {key}={value!r} must be a mapping from names to values.")


def typed(owner: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a YAML as the types of `hints`; others raise `UsageError`, whose message begins with `owner`.

    A list becomes a tuple, and `1e-3`, which YAML reads as text, a number. Hints are plain types, tuples and unions.
    """
    converted = {}
    for key, value in values.items():
        options = get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
        try:
            converted[key] = _converted(value, options)
        except (TypeError, ValueError):
            nouns = " or ".join(_NOUNS.get(option, "a list of numbers") for option in options)
            raise UsageError(f"{owner}{key}={value!r} must be {nouns}.") from None
    return converted


def _converted(value: Any, options: tuple[Any, ...]) -> Any:
    for option in options:
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_converted(each, get_args(option)[:1]) for each in value)
        if option is float and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
        if type(value) is option and option is not float:
            return value
    raise ValueError
