"""How are measurements kept beside a training's checkpoints? One JSON object a line, for each layer and step."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapro_hf.utils.text_files import parse_json, write_text

if TYPE_CHECKING:
    from lorapro_hf.diagnostics.meter import LayerGap

FILE = "lora_pro_gap.jsonl"
PREFIX = "lora_pro_gap/"
# what is logged, as the median over the layers
_LOGGED = (
    "lora_gap",
    "lora_scaled_gap",
    "lora_cosine",
    "lora_pro_gap",
    "lora_pro_cosine",
    "residual",
    "step_error",
    "step_length",
    "step_share",
)


def append(file: Path, step: int, optimizer: str, gaps: Sequence[LayerGap]) -> None:
    """Add the measurements of one step; the folder is made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "optimizer": optimizer, **_finite(asdict(gap))}) for gap in gaps]
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(f"{line}\n" for line in lines))


def keep_until(file: Path, step: int) -> None:
    """Drop what was measured after a step, as a training goes on from there; a line cut off by a kill goes, too.

    Raises:
        ValueError: the file is not text.
    """
    if not file.exists():
        return
    try:
        kept = [line for line, record in _parsed(file) if record["step"] <= step]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not text, so that no measurement can be added to it. Move it away, or choose another "
            "output_dir."
        ) from error
    write_text(file, "".join(f"{line}\n" for line in kept))


def read(file: Path) -> list[dict[str, Any]]:
    """All measurements, in the order in which they were made."""
    return [record for _, record in _parsed(file)]


def medians(gaps: Sequence[LayerGap]) -> dict[str, float]:
    """The median of each figure over the layers, as metrics."""
    found = {}
    for name in _LOGGED:
        values = [value for gap in gaps if (value := getattr(gap, name)) is not None and math.isfinite(value)]
        if values:
            found[PREFIX + name] = statistics.median(values)
    return found


def _parsed(file: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = parse_json(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "layer" in record:
            found.append((line, record))
    return found


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
