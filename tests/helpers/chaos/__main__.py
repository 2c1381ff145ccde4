"""The chaos run: `make chaos`, or `PYTHONPATH=tests/helpers python -m chaos`."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from rich.console import Console

from killable import Nursery
from lorapro_hf.commands.common.console import progress_bars
from lorapro_hf.options import HelpFormatter, UsageError, at_least_one

from .cases import ON_REQUEST, TRICKS, Lab, Result, try_case
from .report import repeat, summary, write_report
from .settings import RANKS
from .verdicts import FAILURES

TRAININGS = "trainings"  # the folder of what has been tried; cases that have held are deleted


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser("make chaos", description=__doc__, formatter_class=HelpFormatter)
    options.add_argument("--minutes", type=float, default=20.0, help="how long cases are started")
    options.add_argument("--cases", type=at_least_one, help="stop after so many; by default only the time counts")
    options.add_argument("--seed", type=int, help="draw the same cases again; by default another one each time")
    options.add_argument(
        "--only",
        default="",
        help="engine, engine:trick or engine:trick:number, such as ddp:torn; `:torn` for all engines",
    )
    options.add_argument("--output_dir", type=Path, default=Path("runs/chaos"), help="for the report")
    return options


def pools(only: str) -> dict[str, list[str]]:
    """The tricks to draw from, for each engine.

    Raises:
        UsageError: `only` names no engine or no trick.
    """
    engine, trick, _ = [*only.split(":"), "", ""][:3]
    if (engine and engine not in RANKS) or (trick and trick not in TRICKS):
        raise UsageError(f"--only {only}: the engines are {', '.join(RANKS)}, the tricks {', '.join(TRICKS)}.")
    tricks = [trick] if trick else [name for name in TRICKS if name not in ON_REQUEST]
    return dict.fromkeys([engine] if engine else RANKS, tricks)


def draw(only: str, seed: int, spent: dict[str, float]) -> Iterator[str]:
    """Names of cases without end: the engine that has had least time, its tricks in rounds of random order."""
    chosen = pools(only)
    if only.count(":") == 2:
        yield only
        return
    rounds = {engine: _rounds(tricks, Random(f"{seed}/{engine}")) for engine, tricks in chosen.items()}
    while True:
        engine = min(chosen, key=lambda name: spent.get(name, 0.0))
        yield f"{engine}:{next(rounds[engine])}"


def _rounds(tricks: list[str], random: Random) -> Iterator[str]:
    for number in itertools.count():
        for trick in random.sample(tricks, len(tricks)):
            yield f"{trick}:{number}"


def run(options: argparse.Namespace, seed: int, console: Console, results: list[Result]) -> None:
    """Run cases until the time is used, and add each result to `results`."""
    spent: dict[str, float] = {}
    end = time.monotonic() + 60 * options.minutes
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
    lab, bars = Lab(Nursery(), options.output_dir.resolve() / TRAININGS), progress_bars(console)
    bar = bars.add_task("chaos", total=options.cases, note="")
    try:
        with bars:
            for name in itertools.islice(draw(options.only, seed, spent), options.cases):
                if time.monotonic() > end:
                    break
                bars.update(bar, note=name)
                started = time.monotonic()
                result = try_case(lab, name, seed)
                engine = name.split(":")[0]
                spent[engine] = spent.get(engine, 0.0) + time.monotonic() - started
                results.append(result)
                bars.update(bar, advance=1)
                style = "red" if result.verdict in FAILURES else None
                console.print(
                    f"{name}: {result.tried}: {result.verdict} ({result.seconds:.0f} s)", style=style, markup=False
                )
    except KeyboardInterrupt:
        console.print("stopped; the report has the cases until now")
    finally:
        lab.nursery.close()


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if a case has failed."""
    options = parser().parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True)
    seed = options.seed if options.seed is not None else Random().randrange(10**6)
    try:
        pools(options.only)
    except UsageError as error:
        parser().error(str(error))
    shutil.rmtree(options.output_dir / TRAININGS, ignore_errors=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    console.print(f"seed {seed}")
    results: list[Result] = []
    try:
        run(options, seed, console, results)
    finally:
        report = write_report(options.output_dir, results, seed, _versions())
    failed = [result for result in results if result.verdict in FAILURES]
    for result in failed:
        console.print(f"{result.verdict}: {result.detail}\n  {repeat(result, seed)}", style="red", markup=False)
    console.print(f"{summary(results)}; {report}")
    return bool(failed)


def _versions() -> str:
    import importlib.metadata as metadata

    names = ("torch", "transformers", "accelerate", "peft", "deepspeed")
    found = [f"{name} {metadata.version(name)}" for name in names]
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
