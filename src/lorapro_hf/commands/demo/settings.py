"""What can be chosen about a demo run?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorapro_hf.commands.common.arguments import option
from lorapro_hf.options import UsageError, at_least_one


@dataclass(frozen=True)
class DemoMethod:
    """A way of training the adapter."""

    name: str  # on the command line, and the folder of its adapter
    title: str  # in the table
    lora_pro_mode: str | None  # `None` for plain LoRA with AdamW
    learning_rate: float  # the default, tuned on the demo's own task
    trust_region: float | None = None  # LoRA-Pro's, tuned likewise; `None` for its own default


# Learning rates with the lowest held-out loss after 24 steps on other problems than the demo's: out of 5e-4 to 8e-3 for
# LoRA and 5e-4 to 4e-3 for efficient under one seed; full and factored have the best of configs/compare/whole.yaml
# under three seeds, and full_8bit that of full. The trust region is tuned likewise: within 24 steps the default, 0.03,
# still shortens every step.
METHODS: Mapping[str, DemoMethod] = {
    method.name: method
    for method in (
        DemoMethod("lora", "LoRA (AdamW)", None, 4e-3),
        DemoMethod("lora_pro", "LoRA-Pro full", "full", 1e-3, 0.1),
        DemoMethod("lora_pro_8bit", "LoRA-Pro full_8bit", "full_8bit", 1e-3, 0.1),
        DemoMethod("lora_pro_factored", "LoRA-Pro factored", "factored", 1e-3, 0.1),
        DemoMethod("lora_pro_efficient", "LoRA-Pro efficient", "efficient", 2e-3),
    )
}
COMPARED = ("lora", "lora_pro", "lora_pro_efficient")
DATA, TRAINING = "model and data", "training"


@dataclass(frozen=True)
class DemoSettings:
    """The settings of a demo run; each field but `learning_rates` (by method name) is an option of `lorapro demo`.

    Raises:
        UsageError: a method is repeated, or a configuration is given without its dataset.
    """

    model: str | None = option(None, "hub name or local folder of a causal LM", DATA, metavar="NAME")
    dataset: str | None = option(
        None,
        "hub name, local folder, or JSON, CSV or Parquet file with the columns 'question' and 'answer'; the answers "
        "end with '#### ' and a number",
        DATA,
        metavar="NAME",
    )
    dataset_config: str | None = option(None, "configuration of a hub dataset", DATA, metavar="NAME")
    max_length: int = option(512, "leave out problems with more tokens than this", DATA, type=at_least_one, metavar="N")
    methods: tuple[str, ...] = option(
        COMPARED,
        f"what to train, in this order: any of {', '.join(METHODS)}",
        TRAINING,
        choices=tuple(METHODS),
        metavar="METHOD",
    )
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    steps: int = option(24, "optimizer steps of each method", TRAINING, type=at_least_one, metavar="N")
    batch_size: int = option(8, "problems a step", TRAINING, type=at_least_one, metavar="N")
    eval_size: int = option(64, "held-out problems", TRAINING, type=at_least_one, metavar="N")
    seed: int = option(0, "decides problems, order and initial adapter", TRAINING, type=int)
    output_dir: Path = option(  # noqa: RUF009
        Path("runs/demo"),
        "for the table (results.json), the curves (loss_curves.png) and an adapter folder per method",
        type=Path,
        metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        if len(set(self.methods)) < len(self.methods):
            raise UsageError(f"A method is named twice in {', '.join(self.methods)}; name each once.")
        if self.dataset_config is not None and self.dataset is None:
            raise UsageError("--dataset_config goes with --dataset; the built-in word problems have none.")

    def learning_rate(self, method: DemoMethod) -> float:
        """The learning rate that `method` trains with."""
        return self.learning_rates.get(method.name, method.learning_rate)
