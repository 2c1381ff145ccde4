"""How are a script's settings read from flags and from a YAML recipe?"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from lorapro_hf.options import HelpFormatter, UsageError
from lorapro_hf.recipes import folder_of
from lorapro_hf.recipes.yaml_files import read_yaml
from lorapro_hf.utils.text_files import shortened

SCRIPT, EXTENDS = "script", "extends"
_SUFFIXES = (".yaml", ".yml")


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` that also takes a YAML recipe, first or after `--config`; flags override what it says.

    ```bash
    python scripts/run_sft.py configs/smollm2-135m.yaml --learning_rate 1e-5
    ```

    A recipe has one line `flag: value` for each setting, by the names of the flags. Lists are for flags with several
    values, mappings for flags that take JSON. Two keys are the recipe's own: `script` names the program it is for, and
    `extends` another recipe, beside this one or of the package, whose settings it takes over where it has none; `null`
    drops one. Of a list of recipes the later ones go first.

    Args:
        dataclass_types: as in `HfArgumentParser`.
        prog: the script's file name; a recipe for another script is refused.
        **kwargs: as in `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Iterable[Any], prog: str | None = None, **kwargs: Any) -> None:
        prog = prog or Path(sys.argv[0]).name
        usage = f"{prog} [RECIPE.yaml] [--flag value ...]"
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(
            dataclass_types, prog=prog, usage=usage, allow_abbrev=False, conflict_handler="resolve", **kwargs
        )

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The dataclasses, filled in; exits with code 2 and a message where that cannot be done."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        try:
            recipe, overrides = split_recipe(arguments)
            flags = [] if recipe is None else self._flags(recipe)
            *parsed, unknown = self.parse_args_into_dataclasses(
                [*flags, *overrides], return_remaining_strings=True, look_for_args_file=False
            )
        except (ValueError, TypeError) as error:  # settings that contradict each other
            self.error(str(error))
        if unknown:
            self.error(f"{unknown[0]} is no option of {self.prog}{self._alike(unknown[0].split('=')[0])}")
        return tuple(parsed)

    def _flags(self, recipe: Path) -> list[str]:
        settings = read_recipe(recipe)
        script = settings.pop(SCRIPT, self.prog)
        if script != self.prog:
            raise UsageError(f"{recipe} is a recipe for {shortened(str(script))}, not for {self.prog}.")
        share = settings.get("warmup_steps")
        if isinstance(share, float) and share < 1 and "--warmup_ratio" in self._option_string_actions:
            settings["warmup_ratio"] = settings.pop("warmup_steps")  # its name in transformers 4
        for name in settings:
            if f"--{name}" not in self._option_string_actions:
                given = shortened(str(name))
                raise UsageError(f"{recipe}: {given} is no option of {self.prog}{self._alike(f'--{given}')}")
        return as_flags(settings)

    def _alike(self, option: str) -> str:
        names = sorted({name.replace("-", "_").replace("__", "--", 1) for name in self._option_string_actions})
        close = difflib.get_close_matches(option, names, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else "; --help lists them."


def split_recipe(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe of a command line, if it names one, and everything else.

    Raises:
        UsageError: there are two recipes, or `--config` is the last word.
    """
    rest, found = list(arguments), []
    if rest and rest[0].endswith(_SUFFIXES) and not rest[0].startswith("-"):
        found.append(rest.pop(0))
    while "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise UsageError("--config needs the path of a YAML recipe.")
        found.append(rest[at + 1])
        del rest[at : at + 2]
    inline = [word for word in rest if word.startswith("--config=")]
    found += [word.partition("=")[2] for word in inline]
    if len(found) > 1:
        raise UsageError(f"{found[0]} and {found[1]}: one recipe at a time; a recipe may extend another.")
    return (Path(found[0]) if found else None), [word for word in rest if word not in inline]


def read_recipe(path: Path, _above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a recipe, with those of the recipes that it extends.

    Raises:
        UsageError: a file is missing, no YAML mapping, has a key twice, or extends itself.
    """
    path = path.resolve()
    if path in _above:
        raise UsageError(f"{path} extends itself.")
    settings = read_yaml(path, "the recipe")
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must have lines of the form `flag: value`.")
    bases = settings.pop(EXTENDS, None) or []
    inherited: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        beside, shipped = path.parent / base, folder_of("configs") / base
        inherited |= read_recipe(shipped if shipped.is_file() and not beside.is_file() else beside, (*_above, path))
    return {**inherited, **settings}


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command line, so that flags and recipes mean the same."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *(_word(item) for item in value)]
        else:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, dict) else str(value)
