"""How are the options of a command declared by the dataclass of its settings?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")
_OPTION = "option"


def option(default: Any, help: str, group: str | None = None, **declared: Any) -> Any:
    """A field of a settings dataclass that is also an option of a command.

    Args:
        default: The default; a tuple takes several values, and the help does not show `None`.
        help: The help text.
        group: The title of the group in `--help`.
        **declared: Further arguments of `add_argument`, such as `type`, `choices` or `metavar`.
    """
    shown = argparse.SUPPRESS if default is None else list(default) if isinstance(default, tuple) else default
    several = {"nargs": "+"} if isinstance(default, tuple) else {}
    return field(default=default, metadata={_OPTION: ({"default": shown, "help": help, **several, **declared}, group)})


def add_options(parser: argparse.ArgumentParser, settings: type) -> dict[str, argparse._ArgumentGroup]:
    """Declare the options of a settings dataclass, in the order of its fields; gives the groups by title."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for each in fields(settings):
        if _OPTION not in each.metadata:
            continue
        declared, group = each.metadata[_OPTION]
        if group is not None and group not in groups:
            groups[group] = parser.add_argument_group(group)
        (parser if group is None else groups[group]).add_argument(f"--{each.name}", **declared)
    return groups


def settings_of(arguments: argparse.Namespace, settings: type[Settings], more: Mapping[str, Any]) -> Settings:
    """The settings that a command line gives; fields of `more` override its options."""
    given = {each.name: getattr(arguments, each.name) for each in fields(settings) if hasattr(arguments, each.name)}  # type: ignore[arg-type]
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return settings(**{**given, **more})
