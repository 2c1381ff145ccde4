"""How are all settings of a script written as a recipe that needs no other recipe?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from importlib.metadata import version
from typing import Any

import yaml

from lorapro_hf import __version__

_LEFT_OUT = dict.fromkeys(("token", "hub_token", "push_to_hub_token"), "it is a secret")
_LEFT_OUT |= dict.fromkeys(("resume_from_checkpoint", "local_rank"), "it is for a single run")
_LIBRARIES = ("torch", "transformers", "peft")


def resolved_recipe(script: str, settings: Mapping[str, Any], given: Iterable[str]) -> str:
    """Return the settings of a script as the text of a recipe: those that were given, then the defaults.

    Defaults that are null, false or empty are left out. So are tokens for the Hub and the checkpoint to resume from; a
    comment names them.

    Args:
        script: The name of the program, such as `run_sft.py`.
        settings: All settings by name, as argparse returns them.
        given: Names of the settings that flags or a recipe have set.
    """
    chosen = [*dict.fromkeys(given)]
    seen = {*chosen, *_LEFT_OUT}
    others = [name for name in settings if name not in seen and not _is_empty(settings[name])]
    versions = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    lines = [
        f"# All settings of a training with lorapro_hf {__version__}, {versions}.",
        "#",
        "#   lorapro train recipe.yaml --output_dir runs/again",
        f"script: {script}",
        *(_setting(name, settings[name]) for name in chosen),
        "# defaults",
        *(_setting(name, settings[name]) for name in others),
    ]
    return "\n".join(lines) + "\n"


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def yaml_line(name: str, value: Any) -> str:
    """Return a setting of a recipe as one line of YAML."""
    plain = value.value if isinstance(value, Enum) else value
    style = None if isinstance(plain, list | dict) else False  # lists in one line, long texts in one as well
    return yaml.safe_dump({name: plain}, default_flow_style=style, width=float("inf"), allow_unicode=True).rstrip("\n")


def _setting(name: str, value: Any) -> str:
    return f"# {name} is left out: {_LEFT_OUT[name]}." if name in _LEFT_OUT else yaml_line(name, value)
