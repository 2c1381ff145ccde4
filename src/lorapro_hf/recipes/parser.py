"""How are a script's settings read from flags and from a YAML recipe?"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from lorapro_hf.options import HelpFormatter, UsageError
from lorapro_hf.recipes import folder_of
from lorapro_hf.recipes.resolved import resolved_recipe
from lorapro_hf.recipes.yaml_files import read_yaml
from lorapro_hf.utils.text_files import shortened

SCRIPT, EXTENDS = "script", "extends"
PRINT_CONFIG, DRY_RUN = "--print_config", "--dry_run"
_SUFFIXES = (".yaml", ".yml")


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` that also takes a YAML recipe, first or after `--config`; flags override the recipe.

    ```bash
    python scripts/run_sft.py configs/smollm2-135m.yaml --learning_rate 1e-5
    ```

    A recipe has a line `flag: value` for each setting: a list for flags with several values, a mapping for flags that
    take JSON. Its key `script` names its program, which must be `prog`. Its key `extends` names one or more recipes,
    beside this one or of the package, from which it inherits settings; later recipes win, and `null` removes a setting.

    `--print_config` prints all settings as a recipe and ends the program. After `parse` they are in `resolved`.
    A program that sets `can_dry_run` heeds `dry_run`, whether the command line has `--dry_run`.
    """

    resolved = ""
    dry_run = False

    def __init__(
        self, dataclass_types: Iterable[Any], prog: str | None = None, can_dry_run: bool = False, **kwargs: Any
    ) -> None:
        prog = prog or Path(sys.argv[0]).name
        usage = f"{prog} [RECIPE.yaml] [--flag value ...]"
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(
            dataclass_types, prog=prog, usage=usage, allow_abbrev=False, conflict_handler="resolve", **kwargs
        )
        self.add_argument(PRINT_CONFIG, action="store_true", help="Print all settings as a recipe, and stop.")
        if can_dry_run:
            told = "Show examples, memory and the time of a step, and stop; writes nothing."
            self.add_argument(DRY_RUN, action="store_true", help=told)

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Return the dataclasses with their settings; bad settings end the program with exit code 2."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        try:
            recipe, overrides = split_recipe(arguments)
            flags = [] if recipe is None else self._flags(recipe)
            *parsed, switches, unknown = self.parse_args_into_dataclasses(
                [*flags, *overrides], return_remaining_strings=True, look_for_args_file=False
            )
            if unknown:
                raise UsageError(f"{unknown[0]} is no option of {self.prog}{self._alike(unknown[0].split('=')[0])}")
        except (ValueError, TypeError) as error:
            self.error(str(error))
        self.resolved = self._resolve([*flags, *overrides])
        self.dry_run = getattr(switches, "dry_run", False)
        if switches.print_config:
            if os.environ.get("RANK", "0") == "0":
                print(self.resolved, end="")
            raise SystemExit(0)
        return tuple(parsed)

    def _resolve(self, words: Sequence[str]) -> str:
        """Return the recipe of all settings; the dataclasses may have changed theirs while they were made."""
        settings = vars(self.parse_known_args(words)[0])
        names = {each.name for kind in self.dataclass_types for each in fields(kind)}
        options = (self._option_string_actions.get(word.partition("=")[0]) for word in words)
        given = [option.dest for option in options if option is not None and option.dest in names]
        return resolved_recipe(self.prog, {name: settings[name] for name in settings if name in names}, given)

    def _flags(self, recipe: Path) -> list[str]:
        settings = read_recipe(recipe)
        script = settings.pop(SCRIPT, self.prog)
        if script != self.prog:
            raise UsageError(f"{recipe} is a recipe for {shortened(str(script))}, not for {self.prog}.")
        warmup = settings.get("warmup_steps")
        if isinstance(warmup, float) and warmup < 1 and "--warmup_ratio" in self._option_string_actions:
            settings["warmup_ratio"] = settings.pop("warmup_steps")  # transformers 4
        for name in settings:
            if f"--{name}" not in self._option_string_actions:
                given = shortened(str(name))
                raise UsageError(f"{recipe}: {given} is no option of {self.prog}{self._alike(f'--{given}')}")
        return as_flags(settings)

    def _alike(self, option: str) -> str:
        names = sorted({name.replace("-", "_").replace("__", "--", 1) for name in self._option_string_actions})
        if "clip" in option and "--max_grad_norm" in names:
            return (
                "; --max_grad_norm limits the norm of all gradients, and --lora_pro_rite_clip takes its place in rite."
            )
        close = difflib.get_close_matches(option, names, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else "; --help lists them."


def split_recipe(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the recipe of a command line, if there is one, and all other words; `UsageError` for two recipes."""
    is_first = bool(words) and words[0].endswith(_SUFFIXES) and not words[0].startswith("-")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        options, rest = parser.parse_known_args(words[is_first:])
    except argparse.ArgumentError as error:
        raise UsageError("--config needs the path of a YAML recipe.") from error
    recipes = [*words[:is_first], *options.config]
    if len(recipes) > 1:
        raise UsageError(f"{recipes[0]} and {recipes[1]}: one recipe at a time; a recipe may extend another.")
    return (Path(recipes[0]) if recipes else None), rest


def read_recipe(path: Path, _above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a recipe, including the inherited ones.

    Raises:
        UsageError: if a file is missing, is no YAML mapping, has a key twice, or extends itself.
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
    """Return settings as words of a command line."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, list):
            words += [f"--{name}", *(_word(item) for item in value)]
        elif value is not None:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, dict) else str(value)
