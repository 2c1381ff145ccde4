"""How are measurements kept beside a training's checkpoints? One JSON object a line, for each layer and step."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

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
        residual: the distance of the factors' gradients from those that g gives them, see `Fit.residual`.
        lora_gap: `‖g − q‖ / ‖g‖` for the direction `q = s (B g_A + g_B A)` of plain LoRA's own gradients.
        lora_scaled_gap: the same for the multiple of q that is closest to g.
        lora_cosine: between g and q.
        lora_pro_gap: `‖g − g̃‖ / ‖g‖` for LoRA-Pro's equivalent gradient g̃.
        lora_pro_cosine: between g and g̃.
        step_error: `‖realised − intended‖ / ‖intended‖` of the step of the weight.
        step_length: `‖realised‖ / ‖γ u‖` where the optimizer has a direction u of the weight.
        step_share: the fraction of the step (of A's part in a sequential one) that the trust region kept, where the
            optimizer has such a u; 0 where B counted as zero and moved without A.
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


@dataclass
class GapRecord:
    """A line of the file: the figures of one layer in one step, `None` where the line has none.

    Attributes:
        step: the step's number.
        optimizer: the optimizer's title.
        layer: the layer's name.
        adapter: the adapter's.
        figures: the other fields of `LayerGap` by name.
    """

    step: int
    layer: str
    optimizer: str | None
    adapter: str | None
    figures: dict[str, float | None]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> GapRecord:
        """Of a parsed line with a step and a layer."""
        figures = {name: line.get(name) for name in FIGURES}
        return cls(line["step"], str(line["layer"]), line.get("optimizer"), line.get("adapter"), figures)


FIGURES = tuple(field.name for field in fields(LayerGap) if field.name not in ("layer", "adapter"))


def append(file: Path, step: int, optimizer: str, gaps: Sequence[LayerGap]) -> None:
    """Add the measurements of one step, and make the folder where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "optimizer": optimizer, **_finite(asdict(gap))}) for gap in gaps]
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(f"{line}\n" for line in lines))


def keep_until(file: Path, step: int) -> None:
    """Drop the measurements after the step from which a training goes on, and a line that a kill has cut off.

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
            yield line, GapRecord.of(record)


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}
