"""Which tensors and values do the distributed checkpoints of FSDP2 hold, and are their files whole?"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorapro_hf.utils.unpickling import read_metadata, read_tensors

_METADATA = ".metadata"


def shards_flaws(folder: Path) -> Iterator[str]:
    """The flaws of a folder's files: a file is missing, cut off, outside of the folder, or could run code."""
    if not (folder / _METADATA).is_file():
        yield f"{folder.name}/{_METADATA} is missing"
        return
    try:
        metadata = read_metadata(folder / _METADATA)
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    except (ValueError, AttributeError, TypeError) as error:
        yield f"{folder.name}/{_METADATA} is cut off or damaged ({error})"
        return
    for name, end in sorted(ends.items()):
        file = folder / name
        if Path(name).name != name:  # a file may be a link, as in the cache of the Hub
            yield f"{folder.name}/.metadata names a file outside of the checkpoint"
        elif not file.is_file():
            yield f"{folder.name}/{name} is missing"
        elif file.stat().st_size < end:
            yield f"{folder.name}/{name} is cut off"
    try:
        _read_values(folder, metadata)
    except (ValueError, AttributeError, TypeError) as error:
        yield f"{folder.name} is damaged ({error})"


def ranks_of_shards(folder: Path) -> int:
    """The least number of ranks that wrote a folder, from the names of its files."""
    found = [re.fullmatch(r"__(\d+)_\d+\.distcp", file.name) for file in folder.iterdir()]
    return max((int(match[1]) + 1 for match in found if match), default=1)


def read_sharded_state(folder: Path) -> dict[str, Any]:
    """The state of an optimizer in the form of its `state_dict`; the tensors have only shapes and dtypes."""
    metadata = read_metadata(folder / _METADATA)
    values = _read_values(folder, metadata)
    groups: dict[int, dict[str, Any]] = {}
    state: dict[str, dict[str, Any]] = {}
    for name, (_, kind, key, entry) in metadata.planner_data.items():
        if kind == "param_groups":
            groups.setdefault(key, {})[entry] = values[name]
        else:
            known = metadata.state_dict_metadata[name]
            state.setdefault(key, {})[entry] = torch.empty(known.size, dtype=known.properties.dtype, device="meta")
    return {"state": state, "param_groups": [groups[number] for number in sorted(groups)]}


def _read_values(folder: Path, metadata: Any) -> dict[str, Any]:
    """The values of a folder that are not tensors, by name; a `ValueError` if a value could run code."""
    found = {}
    for index, info in metadata.storage_data.items():
        if hasattr(metadata.state_dict_metadata[index.fqn], "chunks"):
            continue
        with (folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            found[index.fqn] = read_tensors(io.BytesIO(file.read(info.length)))
    return found
