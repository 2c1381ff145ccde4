"""The cases: each disturbs a training in one way, lets it go on, and says how it has ended."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from killable import Nursery

from . import damage
from .settings import END, RANKS, SAVED_EVERY, STEPS
from .verdicts import REFUSED, SAME, SAME_SAID, STUCK, Outcome, judge, outcome_of

JOBS = "chaos.jobs"
DROPOUT = 0.1
LIMIT = 20  # times the uninterrupted training, after which one counts as hanging
MANIFEST = "lorapro_manifest.json"
LAST, OTHER = 2 * SAVED_EVERY, STEPS - SAVED_EVERY  # the steps of the checkpoints that are mixed


@dataclass
class Result:
    """What was tried in a case and how it has ended."""

    name: str
    verdict: str
    tried: str
    detail: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Lab:
    """Runs trainings, and keeps an uninterrupted one of each engine."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self.nursery, self.folder = nursery, folder
        self._whole: dict[Path, Outcome] = {}
        self.seconds: dict[str, float] = {}
        nursery.run(folder / "nothing", JOBS, do="nothing")  # so that imports count for no training

    def folder_of(self, engine: str, dropout: float = DROPOUT) -> Path:
        """The folder of the uninterrupted training."""
        return self.folder / (f"whole-{engine}" if dropout else f"whole-{engine}-without-dropout")

    def whole(self, engine: str, dropout: float = DROPOUT) -> Outcome:
        """The uninterrupted training of an engine, which is run when it is first asked for."""
        folder = self.folder_of(engine, dropout)
        if folder not in self._whole:
            started = time.monotonic()
            found = self.run(engine, folder, dropout=dropout)
            self.seconds.setdefault(engine, time.monotonic() - started)
            if not found.adapter:
                raise RuntimeError(f"the uninterrupted training of {engine} failed: {found.errors or found.codes}")
            self._whole[folder] = found
        return self._whole[folder]

    def run(self, engine: str, folder: Path, kill_after: float | None = None, **job: Any) -> Outcome:
        """One training in the folder, from whatever it holds."""
        for stale in [folder / END, *folder.glob("said-*.json"), *folder.glob("result-*.pt")]:
            if stale.is_dir():
                shutil.rmtree(stale)
            else:
                stale.unlink(missing_ok=True)
        if kill_after is None and engine in self.seconds:
            slept = sum(entry.get("seconds", 0.0) for entry in job.get("plan", []))
            kill_after = max(60.0, LIMIT * self.seconds[engine]) + slept
        codes = self.nursery.run(folder, JOBS, engine=engine, ranks=RANKS[engine], kill_after=kill_after, **job)
        return outcome_of(folder, codes)

    def copy(self, engine: str, folder: Path, *steps: int, dropout: float = DROPOUT) -> None:
        """Checkpoints of the uninterrupted training in a folder of their own."""
        self.whole(engine, dropout)
        for step in steps:
            name = f"checkpoint-{step}"
            shutil.copytree(self.folder_of(engine, dropout) / name, folder / name)


Trick = Callable[[Lab, str, Path, Random], tuple[str, str, str]]


def untouched(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Resume from a checkpoint as it was written."""
    step = random.choice([2, 4, 6])
    lab.copy(engine, folder, step)
    found = lab.run(engine, folder, resume=True)
    return f"checkpoint-{step} as it was written", *judge(found, lab.whole(engine))


def killed(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Kill a rank up to three times at an instant of its training, perhaps halfway through a file; the same command."""
    whole, tried = lab.whole(engine), []
    for _ in range(random.randint(1, 3)):
        entry = _death(whole, random)
        tried.append(f"rank {entry['rank']} at instant {entry['instant']}" + (" in a file" if entry["share"] else ""))
        again = _again(lab, engine, folder, plan=[entry])
        if any(code > 0 for code in again.codes):  # whoever starts it again finds the same
            break
    return "killed " + ", ".join(tried), *_ending(lab, engine, folder)


def clock(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Kill all ranks at moments of the clock, which no seed repeats to the instruction."""
    lab.whole(engine)
    moments = [random.uniform(0.1, 1.0) * lab.seconds[engine] for _ in range(random.randint(1, 3))]
    for moment in moments:
        again = _again(lab, engine, folder, kill_after=moment)
        if any(code > 0 for code in again.codes):
            break
    return "killed after " + ", ".join(f"{moment:.1f} s" for moment in moments), *_ending(lab, engine, folder)


def torn(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Cut, zero or flip a part of a file of the newest checkpoint."""
    lab.copy(engine, folder, LAST, OTHER)
    checkpoint = folder / f"checkpoint-{OTHER}"
    tried = damage.tear(random.choice(damage.files_of(checkpoint)), random)
    return _resumed(lab, engine, folder, checkpoint, tried, random)


def mixed(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Mix two checkpoints in one folder, or take a part of one away; at times as if written without a manifest."""
    lab.copy(engine, folder, SAVED_EVERY, LAST)
    checkpoint, kind = folder / f"checkpoint-{LAST}", random.choice(["mix", "mix", "mix", "lose", "lose", "empty"])
    if kind == "mix":
        tried = damage.mix(checkpoint, lab.folder_of(engine) / f"checkpoint-{OTHER}", random)
    elif kind == "lose" or engine == "fsdp2":
        tried = damage.lose(checkpoint, random)
    else:
        tried = damage.empty(checkpoint, random)
    if random.random() < 0.25 and (checkpoint / MANIFEST).exists():
        (checkpoint / MANIFEST).unlink()
        tried += ", without its manifest"
    return _resumed(lab, engine, folder, checkpoint, tried, random)


def engine(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Resume from a checkpoint of another engine, without dropout, which draws other numbers on another rank."""
    written = random.choice([name for name in RANKS if name != engine])
    whole = lab.whole(engine, dropout=0.0)
    lab.copy(written, folder, LAST, dropout=0.0)
    found = lab.run(engine, folder, resume=str(folder / f"checkpoint-{LAST}"), dropout=0.0)
    return f"checkpoint of {written}", *judge(found, whole, is_converted=True)


def full(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Let the disk of one or all ranks be full from an instant on; then the same command with room."""
    whole = lab.whole(engine)
    ranks = random.choice([[rank] for rank in range(RANKS[engine])] + [list(range(RANKS[engine]))])
    room, instant = random.choice([4096, random.randint(4096, 200_000)]), random.choice(_writes(whole, ranks[0]))
    plan = [{"rank": rank, "instant": instant, "do": "full", "room": room} for rank in ranks]
    lab.run(engine, folder, plan=plan)
    tried = f"files of at most {room} bytes on rank {' and '.join(map(str, ranks))} from instant {instant} on"
    return tried, *_ending(lab, engine, folder)


def slow(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Let a rank stand still for seconds while it saves, and perhaps kill another meanwhile; then the same command."""
    whole = lab.whole(engine)
    rank = random.randrange(RANKS[engine])
    instants = random.sample(_writes(whole, rank), 3)
    plan = [{"rank": rank, "instant": i, "do": "sleep", "seconds": random.uniform(0.5, 3)} for i in instants]
    tried = f"rank {rank} stands still at {', '.join(map(str, sorted(instants)))}"
    if RANKS[engine] > 1 and random.random() < 0.5:
        death = {**_death(whole, random), "rank": 1 - rank}
        plan.append(death)
        tried += f", rank {1 - rank} is killed at {death['instant']}"
        lab.run(engine, folder, plan=plan)
        return tried, *_ending(lab, engine, folder)
    return tried, *judge(lab.run(engine, folder, plan=plan), whole)


def long(lab: Lab, engine: str, folder: Path, random: Random) -> tuple[str, str, str]:
    """Let rank 0 stand still for more than five minutes while it saves. Only on request."""
    whole = lab.whole(engine)
    instant = random.choice(_writes(whole, 0))
    plan = [{"rank": 0, "instant": instant, "do": "sleep", "seconds": 320}]
    return f"rank 0 stands still for 320 s at {instant}", *judge(lab.run(engine, folder, plan=plan), whole)


TRICKS: dict[str, Trick] = {
    trick.__name__: trick for trick in (untouched, killed, clock, torn, mixed, engine, full, slow, long)
}
ON_REQUEST = {"long"}


def try_case(lab: Lab, name: str, seed: int) -> Result:
    """Run the case `engine:trick:number`; the same seed draws the same again."""
    of_engine, trick, _ = name.split(":")
    folder = lab.folder / name.replace(":", "-")
    started = time.monotonic()
    tried, verdict, detail = TRICKS[trick](lab, of_engine, folder, Random(f"{seed}/{name}"))
    if verdict in (SAME, SAME_SAID, REFUSED):
        shutil.rmtree(folder)
    return Result(name, verdict, tried, detail.replace(f"{lab.folder}/", ""), time.monotonic() - started)


def _writes(whole: Outcome, rank: int) -> list[int]:
    return [number for number, kind in enumerate(whole.instants[rank], 1) if kind == "w"]


def _death(whole: Outcome, random: Random) -> dict[str, Any]:
    rank = random.randrange(len(whole.instants))
    share = random.random() if random.random() < 0.5 else None
    return {"rank": rank, "instant": random.randint(1, len(whole.instants[rank])), "do": "die", "share": share}


def _again(lab: Lab, engine: str, folder: Path, **job: Any) -> Outcome:
    """As a scheduler starts a training again and again: with the newest checkpoint if there is any."""
    return lab.run(engine, folder, resume=any(folder.glob("checkpoint-*")) or None, **job)


def _ending(lab: Lab, engine: str, folder: Path) -> tuple[str, str]:
    """The last start, after which a training must have gone on wherever one can."""
    verdict, detail = judge(_again(lab, engine, folder), lab.whole(engine))
    return STUCK if verdict == REFUSED else verdict, detail


def _resumed(lab: Lab, engine: str, folder: Path, checkpoint: Path, tried: str, random: Random) -> tuple[str, str, str]:
    is_named = random.random() < 0.5
    found = lab.run(engine, folder, resume=str(checkpoint) if is_named else True)
    return f"{tried}, {'named' if is_named else 'newest'}", *judge(found, lab.whole(engine))
