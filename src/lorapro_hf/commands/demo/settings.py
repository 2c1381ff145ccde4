"""What can be chosen about a demo run, and which sizes and rates have its trainings?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorapro_hf.commands.common.arguments import option
from lorapro_hf.options import UsageError, at_least_one

CLOSENESS, CURVES, MODEL = "closeness", "curves", "model"
PARTS = (CLOSENESS, CURVES, MODEL)

# The task of the loss curves, an entry of a YAML for `lorapro compare`.
TASK: Mapping[str, Any] = {"kind": "characters", "ranks": [4]}
RATES: Mapping[str, float] = {"lora": 1e-2, "full": 3e-3}
# LoRA-Pro's: in modes that take rates of full fine-tuning, and in modes that take LoRA's.
PRO_RATES: Mapping[str, tuple[float, float]] = {CURVES: (1e-2, 2e-2), MODEL: (3e-4, 2e-3)}
MODEL_RANK, BATCH_SIZE = 8, 8
HELD_OUT, ANSWERED = 64, 24  # problems, and the most that are answered
SHORT, LONG = 56, 512  # tokens of the longest problems: with the built-in model and data, to save time, and else
CLOSENESS_STEPS, CLOSENESS_BATCHES = 4, 2  # of the training before the gradients are compared, and of their data

TRAININGS, LANGUAGE = "loss curves", "language model"
_USED_BY = {
    (CURVES,): ("seeds", "steps"),
    (MODEL,): ("model_steps",),
    (CLOSENESS, MODEL): ("model", "dataset", "dataset_config", "max_length"),
}


@dataclass(frozen=True)
class DemoSettings:
    """The settings of a demo run; each is an option of `lorapro demo`.

    Raises:
        UsageError: a part is repeated, or an option has no meaning without another.
    """

    parts: tuple[str, ...] = option(
        PARTS, f"any of {', '.join(PARTS)}; they run in this order", choices=PARTS, metavar="PART"
    )
    output_dir: Path = option(  # noqa: RUF009
        Path("runs/demo"),
        "for the pictures (demo.png, closeness.png, loss_curves.png), the figures (results.json) and the adapter",
        type=Path,
        metavar="FOLDER",
    )
    seeds: int = option(3, "trainings of each method", TRAININGS, type=at_least_one, metavar="N")
    steps: int = option(300, "optimizer steps of each training", TRAININGS, type=at_least_one, metavar="N")
    model: str | None = option(None, "hub name or local folder of a causal LM", LANGUAGE, metavar="NAME")
    dataset: str | None = option(
        None,
        "hub name, local folder, or JSON, CSV or Parquet file with the columns 'question' and 'answer'; the answers "
        "end with '#### ' and a number",
        LANGUAGE,
        metavar="NAME",
    )
    dataset_config: str | None = option(None, "configuration of a hub dataset", LANGUAGE, metavar="NAME")
    max_length: int | None = option(
        None,
        f"leave out problems with more tokens than this (default: {LONG}; {SHORT} of the built-in model and problems)",
        LANGUAGE,
        type=at_least_one,
        metavar="N",
    )
    model_steps: int = option(20, "optimizer steps of its fine-tuning", LANGUAGE, type=at_least_one, metavar="N")

    def __post_init__(self) -> None:
        if len(set(self.parts)) < len(self.parts):
            raise UsageError(f"A part is named twice in {', '.join(self.parts)}; name each once.")
        if self.dataset_config is not None and self.dataset is None:
            raise UsageError("--dataset_config goes with --dataset; the built-in word problems have none.")
        changed = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        for parts, names in _USED_BY.items():
            if (useless := sorted(changed & set(names))) and not set(parts) & set(self.parts):
                raise UsageError(f"--{useless[0]} is for {' and '.join(parts)}: leave it out, or change --parts.")
