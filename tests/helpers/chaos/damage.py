"""Damage to the files of a checkpoint; each function says in words what it has done."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

# Nothing of a training is read from these.
UNREAD = {"README.md", "training_args.bin", "zero_to_fp32.py", "zero_to_torch.py"}


def files_of(checkpoint: Path) -> list[Path]:
    """All files that a resumed training may read, in a fixed order."""
    found = (path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path for path in found if path.name not in UNREAD)


def tear(file: Path, random: Random) -> str:
    """Cut the file off, zero a part of it or flip one bit, as an interrupted write or a bad disk does."""
    content = bytearray(file.read_bytes())
    size, kind = len(content), random.choice(["cut", "cut", "zero", "zero", "flip", "flip", "garbage"])
    at = random.randrange(size)
    if kind == "cut":
        content, done = content[:at], f"cut to {at} of {size} bytes"
    elif kind == "zero":
        start = random.choice([size // 2, at])
        content[start:], done = bytes(size - start), f"zeros from byte {start} of {size} on"
    elif kind == "flip":
        bit = random.randrange(8)
        content[at] ^= 1 << bit
        done = f"bit {bit} of byte {at} of {size} flipped"
    else:
        content[at : at + 64] = random.randbytes(len(content[at : at + 64]))
        done = f"64 random bytes at {at} of {size}"
    file.write_bytes(content)
    return f"{_name(file)}: {done}"


def mix(checkpoint: Path, other: Path, random: Random) -> str:
    """Put one or two parts of another checkpoint of the same training into this one."""
    names = sorted({part.relative_to(other) for part in _parts(other)})
    chosen = random.sample(names, random.choice([1, 1, 2]))
    for name in chosen:
        target = checkpoint / str(name).replace(_step_folder(other), _step_folder(checkpoint))
        if (other / name).is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(other / name, target)
        else:
            shutil.copyfile(other / name, target)
    return f"{' and '.join(map(str, chosen))} of {other.name} in {checkpoint.name}"


def lose(checkpoint: Path, random: Random) -> str:
    """Delete a file or a folder, or all that a resumed training needs besides the weights."""
    if random.random() < 0.1:
        for pattern in ("optimizer*", "scheduler.pt", "rng_state*.pth", "global_step*", "latest"):
            for part in checkpoint.glob(pattern):
                _delete(part)
        return f"only the weights left in {checkpoint.name}"
    part = random.choice(_parts(checkpoint))
    _delete(part)
    return f"{part.relative_to(checkpoint)} missing in {checkpoint.name}"


def empty(checkpoint: Path, random: Random) -> str:
    """Leave a readable file of the optimizer's state without any state."""
    file = random.choice([*checkpoint.glob("optimizer.pt"), *sorted(checkpoint.glob("*/lora_pro_rank*.safetensors"))])
    if file.suffix == ".pt":
        state = torch.load(file, weights_only=True)
        torch.save({**state, "state": {}}, file)
    else:
        first = dict([next(iter(load_file(file).items()))])
        save_file(first if random.random() < 0.5 else {}, file)
    return f"{_name(file)} has an empty state"


def _parts(checkpoint: Path) -> list[Path]:
    """Files, and folders that an engine has written."""
    folders = sorted(path for path in checkpoint.iterdir() if path.is_dir())
    return [*files_of(checkpoint), *folders]


def _step_folder(checkpoint: Path) -> str:
    return f"global_step{checkpoint.name.removeprefix('checkpoint-')}"


def _delete(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part)
    else:
        part.unlink()


def _name(file: Path) -> str:
    """The path from the checkpoint on."""
    start = next(index for index, part in enumerate(file.parts) if part.startswith("checkpoint-"))
    return "/".join(file.parts[start:])
