"""The command line of `lorapro train`: how a recipe runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from lorapro_hf.commands.common.processes import IS_POSIX, become, supervise
from lorapro_hf.options import UsageError, at_least_one
from lorapro_hf.recipes import COMMAND, folder_of
from lorapro_hf.recipes.shipped import described, find

TRAIN = """Train from a recipe: a YAML file with a script and its settings. Flags after the recipe override them.
With --num_processes or --accelerate_config the script runs under `accelerate launch`."""
TRAIN_EXAMPLES = """examples:
  lorapro train --list
  lorapro train smollm2-135m.yaml --learning_rate 1e-5
  lorapro train my_recipe.yaml --lora_pro_mode efficient --output_dir runs/mine
  lorapro train --print_config my_recipe.yaml > resolved.yaml
  lorapro train --num_processes 8 --accelerate_config fsdp2 llama-3.1-8b.yaml
  lorapro train run_sft.py --help
"""
_NO_RECIPES = ("accelerate", "compare", "smoke")


def add_train(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `lorapro train`."""
    parser.add_argument("--list", action="store_true", help="list the recipes and scripts that come with the package")
    parser.add_argument("--num_processes", type=at_least_one, help="processes to launch, usually one for each device")
    parser.add_argument(
        "--accelerate_config",
        metavar="NAME|FILE",
        help="ddp (the default of several processes), fsdp2, zero1, zero2, zero3 or a file of `accelerate config`",
    )
    parser.add_argument("--print_config", action="store_true", help="print all settings as a recipe, and stop")
    parser.add_argument(
        "--dry_run", action="store_true", help="show examples, memory and the time of a step, and stop; writes nothing"
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or a recipe or script of the package")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="...", help="flags of the script")
    parser.set_defaults(run=train)


def train(arguments: argparse.Namespace) -> int:
    """Run the script and return its exit code."""
    if arguments.list:
        print(described({**_recipes(), **_scripts()}))
        return 0
    if arguments.recipe is None:
        raise UsageError("name a recipe or a script; --list shows those that come with the package.")
    for word in arguments.overrides:
        option = word.split("=")[0]
        if option in ("--num_processes", "--accelerate_config"):
            raise UsageError(f"{option} is for the launcher, not for the script: put it before {arguments.recipe}.")
    script, words = _resolve(arguments.recipe)
    switches = ["--print_config"] * arguments.print_config + ["--dry_run"] * arguments.dry_run
    launcher = [sys.executable] if arguments.print_config else _launcher(arguments)
    command = [*launcher, str(script), *words, *arguments.overrides, *switches]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", COMMAND: shlex.join(_said(arguments))}
    if arguments.is_program and IS_POSIX and not _is_launched(arguments):
        become(command, environment)  # a signal to this process reaches the training
    return supervise(command, environment)


def _said(arguments: argparse.Namespace) -> list[str]:
    """Return the words of this command line that start the training."""
    options = ("num_processes", "accelerate_config")
    given = {f"--{name}": getattr(arguments, name) for name in options if getattr(arguments, name) is not None}
    launch = [str(word) for pair in given.items() for word in pair]
    return ["lorapro", "train", *launch, arguments.recipe, *arguments.overrides]


def _is_launched(arguments: argparse.Namespace) -> bool:
    return arguments.num_processes is not None or arguments.accelerate_config is not None


def _launcher(arguments: argparse.Namespace) -> list[str]:
    if not _is_launched(arguments):
        return [sys.executable]
    # without a configuration accelerate starts a single process on a machine without devices
    name = arguments.accelerate_config or "ddp"
    shipped = folder_of("configs") / "accelerate" / f"{name}.yaml"
    config = shipped if shipped.is_file() else Path(name)
    if not config.is_file():
        known = ", ".join(path.stem for path in sorted(shipped.parent.glob("*.yaml")))
        raise UsageError(f"--accelerate_config {name}: neither a file nor one of {known}.")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if config == shipped:
        # the recipe sets the precision, and trainings on one machine need different ports
        command += ["--mixed_precision", "no", "--main_process_port", "0"]
    if arguments.num_processes is not None:
        command += ["--num_processes", str(arguments.num_processes)]
    return command


def _resolve(name: str) -> tuple[Path, list[str]]:
    """Return the script to run and the words that name the recipe."""
    from lorapro_hf.recipes.parser import SCRIPT, read_recipe

    if name.endswith(".py"):
        return _find(name, "scripts"), []
    recipe = _find(name, "configs")
    script = read_recipe(recipe).get(SCRIPT)
    if script is None:
        raise UsageError(f"{recipe} names no script; add a line such as `script: run_sft.py`.")
    return _find(str(script), "scripts"), [str(recipe)]


def _find(name: str, folder: str) -> Path:
    return find(name, folder_of(folder), [*_recipes(), *_scripts()], "lorapro train --list")


def _recipes() -> dict[str, Path]:
    configs = folder_of("configs")
    found = {path.relative_to(configs): path for path in sorted(configs.rglob("[!_]*.yaml"))}
    return {name.as_posix(): path for name, path in found.items() if name.parts[0] not in _NO_RECIPES}


def _scripts() -> dict[str, Path]:
    return {path.name: path for path in sorted(folder_of("scripts").glob("run_*.py"))}
