"""How are measurements kept beside a training's checkpoints? One JSON object a line, for each layer and step."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lorapro_hf.utils.text_files import parse_json, write_text

FILE = "lora_pro_gap.jsonl"
PREFIX = "lora_pro_gap/"


@dataclass
class LayerGap:
    """The figures of one layer in one step; a figure that has no meaning there is `None`.

    Where the factors see another gradient than the weight (dropout, DoRA, an embedding of padded batches), all gaps and
    cosines take `s Bᵀ g` and `s g Aᵀ` for the factors' gradients g_A, g_B, and `grad_norm` is an estimate.

    Attributes:
        layer: its name.
        adapter: the adapter's.
        grad_norm: `‖g‖`, the norm of the gradient of the adapted weight, on the scale of the factors' gradients.
        residual: the larger of `‖s Bᵀ g − g_A‖ / ‖g_A‖` and `‖s g Aᵀ − g_B‖ / ‖g_B‖`.
        lora_gap: `‖g − q‖ / ‖g‖` for the direction `q = s (B g_A + g_B A)` of plain LoRA's own gradients.
        lora_scaled_gap: the same for the multiple of q that is closest to g.
        lora_cosine: between g and q.
        lora_pro_gap: `‖g − g̃‖ / ‖g‖` for LoRA-Pro's equivalent gradient g̃.
        lora_pro_cosine: between g and g̃.
        step_error: `‖realised − intended‖ / ‖intended‖` of the step of the weight.
        step_length: `‖realised‖ / ‖γ u‖` where the optimizer has a direction u of the weight.
        step_share: the fraction of the step that the trust region kept, where the optimizer has such a u.
    """

    layer: str
    adapter: str
    grad_norm: float
    residual: float
    lora_gap: float
    lora_scaled_gap: float
    lora_cosine: float
    lora_pro_gap: float
    lora_pro_cosine: float
    step_error: float | None = None
    step_length: float | None = None
    step_share: float | None = None


FIGURES = tuple(field.name for field in fields(LayerGap) if field.name not in ("layer", "adapter"))


@dataclass
class GapRecord:
    """A line of the file; `figures` are the other fields of `LayerGap`, and a value that the line lacks is `None`."""

    step: int
    layer: str
    optimizer: str | None
    adapter: str | None
    figures: dict[str, float | None]


def append(file: Path, step: int, optimizer: str, gaps: Sequence[LayerGap]) -> None:
    """Add the measurements of one step, and make the folder if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        for gap in gaps:
            line = {"step": step, "optimizer": optimizer, **asdict(gap)}
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            out.write(json.dumps(finite) + "\n")


def keep_until(file: Path, step: int) -> None:
    """Drop the measurements after the step from which a training goes on, and a line that was cut off.

    Raises:
        ValueError: the file is not text.
    """
    if not file.exists():
        return
    try:
        kept = [line for line, record in _parsed(file) if record.step <= step]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not text, so that no measurement can be added to it. Move it away, or choose another "
            "output_dir."
        ) from error
    write_text(file, "".join(f"{line}\n" for line in kept))


def read(file: Path) -> list[GapRecord]:
    """All measurements, in the order in which they were made."""
    return [record for _, record in _parsed(file)]


def medians(gaps: Sequence[LayerGap]) -> dict[str, float]:
    """The median of each figure but `grad_norm` over the layers, as metrics."""
    found = {}
    for name in FIGURES:
        values = [value for gap in gaps if (value := getattr(gap, name)) is not None and math.isfinite(value)]
        if values and name != "grad_norm":
            found[PREFIX + name] = statistics.median(values)
    return found


def _parsed(file: Path) -> Iterator[tuple[str, GapRecord]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = parse_json(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "layer" in record:
            figures = {name: record.get(name) for name in FIGURES}
            known = record["step"], str(record["layer"]), record.get("optimizer"), record.get("adapter")
            yield line, GapRecord(*known, figures)
