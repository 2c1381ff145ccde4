"""Is a value of a YAML of the type that its key wants?"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from lorapro_hf.options import UsageError

_NAME = re.compile(r"[\w.-]+")
_NOUNS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
_NOUNS |= {tuple[str, ...]: "a list of texts", tuple[int, ...]: "a list of whole numbers"}


def require_name(noun: str, name: Any) -> None:
    """Refuse a name that is of no use in files and on the command line."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"The {noun} {name!r} must be named with letters, digits, '_', '-' and '.'.")


def require_mapping(owner: str, key: str, value: Any) -> None:
    """Refuse a value that is neither a mapping from names nor left out."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        raise UsageError(f"{owner}: {key}={value!r} must be a mapping from names to values.")


def typed(owner: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the types that their keys want: `1e-3`, which YAML reads as text, as a number, lists as tuples.

    Args:
        owner: Begins the message.
        values: Entries of a YAML.
        hints: Types by key: plain ones, tuples of them, and unions.

    Raises:
        UsageError: a value is of another type.
    """
    found = {}
    for key, value in values.items():
        try:
            found[key] = _fitted(value, hints[key])
        except (TypeError, ValueError):
            raise UsageError(f"{owner}{key}={value!r} must be {_described(hints[key])}.") from None
    return found


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _fitted(value: Any, hint: Any) -> Any:
    for option in _options(hint):
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_fitted(each, get_args(option)[0]) for each in value)
        if option is float and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
        if type(value) is option and option is not float:
            return value
    raise ValueError


def _described(hint: Any) -> str:
    return " or ".join(_NOUNS.get(option, "a list of numbers") for option in _options(hint))
