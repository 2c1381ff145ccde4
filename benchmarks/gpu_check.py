"""Checks LoRA-Pro on one GPU, in at most eight minutes on an H100 or H200; builds nothing and downloads nothing.

    make gpu-check                                       # in the environment .venv, which must be there
    PYTHONPATH=src python benchmarks/gpu_check.py        # in any environment with torch, transformers and peft
    PYTHONPATH=src python benchmarks/gpu_check.py --device cpu --tiny    # to see that the check runs

Every mode beside dense float64 oracles and the Triton kernels by themselves; steps that must not wait for the device
and that a CUDA graph records; fused layers beside dense products; ten steps of `LoRAProTrainer`, alone and under DDP;
and times of steps and of fused layers on the shapes of real models. Each part is a process of its own, so that a
failure of one leaves the others alone. On a GPU the correctness parts run at the same time, then the times alone.
`gpu_check.json` and `gpu_check.md` in the output folder are written anew after each part; `parts/` beside them holds
what each part printed.

Exit codes: 0 all numbers are right, 1 a number is wrong or a part failed, 2 nothing could run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_parts.record import Findings, Record, read_findings

from lorapro_hf.commands.bench.report import environment, slug
from lorapro_hf.commands.common.records import write_json
from lorapro_hf.utils.text_files import write_text

TOGETHER = 0.55  # of the time, for all parts but the last
GRACE = 25.0  # seconds after its time until a part is killed
ROOT = Path(__file__).parent


def _oracles(rank: int, record: Record) -> None:
    from gpu_parts.oracles import check_modes

    check_modes(record, rank)


def _kernels(record: Record) -> None:
    from gpu_parts.kernels import check_kernels

    check_kernels(record)


def _steps(record: Record) -> None:
    from gpu_parts.steps import check_steps

    check_steps(record)


def _layers(record: Record) -> None:
    from gpu_parts.layers import check_layers

    check_layers(record)


def _training(record: Record) -> None:
    from gpu_parts.training import check_training

    check_training(record)


def _ddp(record: Record) -> None:
    from gpu_parts.training import check_ddp

    check_ddp(record)


def _compile(rank: int, record: Record) -> None:
    from gpu_parts.times import compile_ahead

    compile_ahead(record, rank)


def _times(record: Record) -> None:
    from gpu_parts.times import measure_times

    measure_times(record)


# The most important first. All but the last run at the same time; imports wait until a part runs.
PARTS: Mapping[str, Callable[[Record], None]] = {
    **{f"oracles-{rank}": partial(_oracles, rank) for rank in (4, 16, 64, 80)},
    "kernels": _kernels,
    "steps": _steps,
    "layers": _layers,
    "training": _training,
    "ddp": _ddp,
    **{f"compile-{rank}": partial(_compile, rank) for rank in (8, 64, 256)},
    "times": _times,
}


class Options(NamedTuple):
    """The options of a run."""

    device: str
    tiny: bool
    minutes: float
    output_dir: Path
    parts: tuple[str, ...]


class Running(NamedTuple):
    """A part that has been started."""

    part: str
    process: subprocess.Popen[bytes] | None  # `None` if it has ended already
    until: float


Start = Callable[[str, Options, float], Running]


def file_of(part: str, options: Options) -> Path:
    """The file with the findings of a part."""
    return options.output_dir / "parts" / f"{part}.json"


def run_here(part: str, options: Options, until: float) -> Running:
    """Run a part in this process."""
    record = Record(file_of(part, options), torch.device(options.device), options.tiny, until)
    record.attempt(part, lambda: PARTS[part](record))
    return Running(part, None, until)


def run_beside(part: str, options: Options, until: float) -> Running:
    """Start a part as a process of its own, which writes what it prints beside its findings."""
    arguments = ["--device", options.device, "--output_dir", str(options.output_dir), "--run_until", str(until)]
    arguments += ["--parts", part, *(["--tiny"] if options.tiny else [])]
    paths = [str(ROOT.parent / "src"), os.environ.get("PYTHONPATH", "")]
    threads = str(max(1, (os.cpu_count() or 1) // 12))
    chosen = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "LORAPRO_HF_NO_NATIVE": "1"}  # nothing is built
    chosen["CUDA_VISIBLE_DEVICES"] = "0"  # Trainer would spread a batch over several
    surroundings = {**chosen, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with file_of(part, options).with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=log, stderr=subprocess.STDOUT, env=surroundings
        )
    return Running(part, process, until)


def ended(running: Running, options: Options) -> Findings:
    """The findings of a part once it has ended; it is killed if it takes too long."""
    note = None
    if running.process is not None:
        try:
            code = running.process.wait(max(0.0, running.until + GRACE - time.time()))
            note = f"the part ended with code {code}, see parts/{running.part}.log" if code else None
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
            note = f"the part was killed {GRACE:.0f} seconds after its time, see parts/{running.part}.log"
    found = read_findings(file_of(running.part, options))
    found.errors += [note] if note else []
    return found


def check(options: Options, start: Start = run_beside) -> dict[str, Findings]:
    """Run all parts, and write the results after each."""
    begun = time.time()
    last = begun + 60 * options.minutes - GRACE - 5
    (options.output_dir / "parts").mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        file_of(part, options).unlink(missing_ok=True)
    found: dict[str, Findings] = {}
    alone, together = (["times"] if "times" in options.parts else []), [p for p in options.parts if p != "times"]
    # On the CPU parts would take the cores from each other.
    for parts in (*([[part] for part in together] if options.device == "cpu" else [together]), alone):
        until = last if "times" in parts else begun + 60 * options.minutes * TOGETHER
        running = [start(part, options, until) for part in parts]
        for each in running:
            found[each.part] = ended(each, options)
            verdict = "good" if found[each.part].is_good else "WRONG"
            print(f"{time.time() - begun:5.0f} s  {each.part}: {verdict}", flush=True)
            write_results(options, found, time.time() - begun)
    return found


def write_results(options: Options, found: Mapping[str, Findings], seconds: float) -> None:
    """Write the findings so far as JSON and as Markdown."""
    about = environment(torch.device(options.device))
    parts = {part: asdict(findings) for part, findings in found.items()}
    is_good = all(findings.is_good for findings in found.values())
    content = {"environment": about, "seconds": seconds, "is_good": is_good, "parts": parts}
    write_json(options.output_dir / "gpu_check.json", content)
    write_text(options.output_dir / "gpu_check.md", markdown(about, found, seconds))


def markdown(about: Mapping[str, Any], found: Mapping[str, Findings], seconds: float) -> str:
    """The report."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    lines = ["# GPU check", "", f"{about['device']}, CUDA {about['cuda']}, {versions}; {seconds:.0f} s.", ""]
    lines += ["| part | numbers | wrong | errors | not done | s |", "|---|---:|---:|---:|---:|---:|"]
    for part, each in found.items():
        wrong = sum(not check.is_good for check in each.checks)
        counts = len(each.checks), wrong, len(each.errors), len(each.not_done), round(each.seconds)
        lines.append(f"| {part} | {' | '.join(map(str, counts))} |")
    numbers = [number for each in found.values() for number in each.checks]
    bad = [f"- {each.name}: {each.value:.3g}, limit {each.limit:.3g}" for each in numbers if not each.is_good]
    lines += ["", "## Wrong numbers", "", *(bad or ["None."])]
    for title, kind in (("Errors", "errors"), ("Not done", "not_done")):
        entries = [f"- {part}: {entry}" for part, each in found.items() for entry in getattr(each, kind)]
        lines += ["", f"## {title}", "", *(entries or ["None."])]
    if "times" in found:
        lines += ["", *table_of_times(found["times"].figures)]
        if found["times"].figures.get("layers"):
            from gpu_parts.layers import table_of_layers

            lines += ["", *table_of_layers(found["times"].figures["layers"])]
    for part, each in found.items():
        plain = {name: value for name, value in each.figures.items() if name not in ("results", "machines", "layers")}
        if plain:
            lines += ["", f"## Figures of {part}", "", *(f"- {name}: {value}" for name, value in plain.items())]
    lines += ["", "## All numbers", "", "| part | number | value | limit |", "|---|---|---:|---:|"]
    for part, each in found.items():
        lines += [f"| {part} | {c.name} | {c.value:.2e} | {c.limit:.1e} |" for c in each.checks]
    return "\n".join(lines) + "\n"


def table_of_times(figures: Mapping[str, Any]) -> list[str]:
    """One table of all step times."""
    from lorapro_hf.commands.bench.settings import METHODS, MODELS

    speeds = sorted(machine["copy_gb_per_s"] for machine in figures.get("machines", []))
    lines = ["## Step times", ""]
    if speeds:
        lines += [
            f"This device copied {speeds[len(speeds) // 2]:.0f} GB/s (read and written). Roof: the time in which "
            "factors, gradients and state can be read, and factors and state written, at this speed.",
            "",
        ]
    lines += ["| model | r | factors | method | step ms | ×AdamW | roof ms | ×roof | waits |"]
    lines += ["|---|---:|---|---|---:|---:|---:|---:|---|"]
    for each in figures.get("results", []):
        head = [MODELS[each["workload"]].title, each["rank"], each["dtype"], METHODS[each["method"]].title]
        head[0] += "" if each["whole"] else " (one block)"
        if each["step_ms"] is None:
            lines.append(f"| {' | '.join(map(str, head))} | {each['note']} | | | | |")
            continue
        median, least = each["step_ms"]["median"], each.get("least_ms")
        roof = ["", ""] if not least else [f"{least:.3g}", f"{median / least:.1f}"]
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.2f}"
        cells = [*head, f"{median:.3g}", ratio, *roof, "yes" if each["waits"] else ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main(arguments: Sequence[str] | None = None, start: Start = run_beside) -> int:
    """Run the check and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to see that the check runs")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="time for all parts (default: 8)")
    known = list(PARTS)
    parser.add_argument(
        "--parts", nargs="+", choices=known, default=known, metavar="PART", help=f"of {', '.join(known)}"
    )
    parser.add_argument("--output_dir", type=Path, help="for the results (default: benchmarks/ and the device's name)")
    parser.add_argument("--run_until", type=float, help=argparse.SUPPRESS)  # of the process of one part
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            f"Nothing was checked: this torch ({torch.__version__}) sees no CUDA device. Install a CUDA build of torch "
            "and look at nvidia-smi, or try the check with --device cpu --tiny.",
            file=sys.stderr,
        )
        return 2
    folder = given.output_dir or ROOT / slug(torch.device(given.device))
    options = Options(given.device, given.tiny, given.minutes, folder, tuple(given.parts))
    if given.run_until is not None:
        run_here(options.parts[0], options, given.run_until)
        return 0
    found = check(options, start)
    report = (folder / "gpu_check.md").read_text(encoding="utf-8")
    print(report.split("\n## All numbers")[0])
    print(f"\n{folder / 'gpu_check.json'}\n{folder / 'gpu_check.md'}")
    return 0 if all(findings.is_good for findings in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
