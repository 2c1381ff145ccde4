"""How has a disturbed training ended, compared with the uninterrupted one?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .settings import END

SAME = "to the bit"
SAME_SAID = "to the bit, with a warning"
NEAR = "within rounding"
REFUSED = "refused by name"
OTHER_SAID = "another end, with a warning"
SILENT = "silent difference"
LATE = "refused after loading"
FOREIGN = "foreign message"
STUCK = "stuck"
HANG = "hang"
VERDICTS = (SAME, SAME_SAID, NEAR, REFUSED, OTHER_SAID, SILENT, LATE, FOREIGN, STUCK, HANG)
FAILURES = frozenset({SILENT, LATE, FOREIGN, STUCK, HANG})
MEANINGS = {
    SAME: "the training ended with exit code 0, and its adapter equals that of the uninterrupted training bit for bit",
    SAME_SAID: "the same, and a warning named the checkpoint that could not be used",
    NEAR: "the checkpoint came from another engine, and the adapter equals that of this one within 1e-4",
    REFUSED: "an error of this package named the checkpoint, and nothing had been loaded",
    OTHER_SAID: "the adapter is another one, and a warning about the checkpoint had said that it would be",
    SILENT: "the training ended with exit code 0 and another adapter, and nothing was said",
    LATE: "an error of this package, after weights had been loaded or the model had been wrapped",
    FOREIGN: "an error of another library, or one that does not name the checkpoint",
    STUCK: "the same command refused to go on although an earlier checkpoint was complete",
    HANG: "the training did not end within the time limit",
}
NEARNESS = 1e-4


@dataclass
class Outcome:
    """A training that has ended: the ranks' exit codes, what they have said, and the adapter of exit code 0.

    `instants` has a letter for each instant of each rank: `s` of a step, `w` of a write.
    """

    codes: list[int]
    warnings: list[str] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    adapter: dict[str, torch.Tensor] | None = None
    instants: list[str] = field(default_factory=list)


def outcome_of(folder: Path, codes: list[int]) -> Outcome:
    """Read what a training has left in its folder."""
    found = Outcome(codes)
    for rank in range(len(codes)):
        file = folder / f"said-{rank}.json"
        if not file.is_file():
            continue
        said = json.loads(file.read_text(encoding="utf-8"))
        found.warnings += said["warnings"]
        found.errors += [said["error"]] if said["error"] else []
        found.instants.append(said["instants"])
    adapter = folder / END / "adapter_model.safetensors"
    if not any(codes):
        found.adapter = load_file(adapter) if adapter.is_file() else {}
    return found


def judge(found: Outcome, whole: Outcome, is_converted: bool = False) -> tuple[str, str]:
    """The verdict on a training that nobody has killed, and the message or figure that it rests on.

    Args:
        found: the training.
        whole: the uninterrupted one.
        is_converted: the checkpoint is of another engine, whose sums may be rounded otherwise.
    """
    if any(found.codes):
        return _judge_error(found)
    assert whole.adapter and found.adapter is not None
    said = [text for text in found.warnings if text not in whole.warnings and "checkpoint" in text]
    distance = difference(found.adapter, whole.adapter)
    if distance == 0:
        return (SAME_SAID, said[0]) if said else (SAME, "")
    if is_converted and distance <= NEARNESS:
        return NEAR, f"{distance:.1e}"
    if said:
        return OTHER_SAID, f"{distance:.1e}: {said[0]}"
    return SILENT, f"{distance:.1e}"


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor; infinite where names or shapes differ."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    unequal = [name for name in one if not torch.equal(one[name], other[name])]
    distances = [float((one[name] - other[name]).norm() / other[name].norm()) for name in unequal]
    return max((value if value == value else float("inf") for value in distances), default=0.0)


def _judge_error(found: Outcome) -> tuple[str, str]:
    if not found.errors:
        return HANG, f"exit codes {found.codes}"
    by_name = [error for error in found.errors if error["ours"] and "checkpoint-" in error["message"]]
    if not by_name:
        return FOREIGN, _line(found.errors[0])
    if any(error["loaded"] for error in found.errors):
        return LATE, _line(by_name[0])
    return REFUSED, _line(by_name[0])


def _line(error: dict[str, Any]) -> str:
    return f"{error['type']}: {error['message']}".splitlines()[0][:300]
