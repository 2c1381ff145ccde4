r"""Align a language model with preferences by DPO, with LoRA-Pro and TRL.

Rows have `chosen` and `rejected`, and `prompt` unless both begin with the prompt; each is a text or a list of messages.

    python scripts/run_dpo.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --learning_rate 5e-6 --output_dir runs/dpo

The reference is the base model, or with `--adapter_name_or_path` the adapter before the training.
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

from dataclasses import dataclass, field
from functools import partial

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.data import load_splits
from lorapro_hf.recipes.endings import one_line_errors
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.language import complete, parts, require_chat_template
from lorapro_hf.recipes.model import AdapterArguments, ModelArguments, load_tokenizer
from lorapro_hf.recipes.parser import RecipeParser
from lorapro_hf.recipes.preferences import PreferenceArguments, preferences

with one_line_errors():
    from lorapro_hf import LoRAProDPOConfig, LoRAProDPOTrainer


@dataclass
class DPOSettings(LoRAProDPOConfig):
    """`trl.DPOConfig` with LoRA-Pro's settings."""

    trust_remote_code: bool = field(default=False, init=False)  # `ModelArguments` has it


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train and evaluate as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, PreferenceArguments, DPOSettings),
        "run_dpo.py",
        can_dry_run=True,
        description=__doc__,
    )
    model_args, adapter, data, training = parser.parse(argv)
    if training.do_predict:
        raise UsageError("--do_predict: preferences have nothing to predict; use --do_eval.")
    complete(training, model_args, data)
    start(training, parser)
    tokenizer = load_tokenizer(model_args)
    splits = load_splits(data, training, model_args.cache_dir, prepare=partial(preferences, data=data))
    for rows in splits.values():
        require_chat_template(tokenizer, rows, "chosen", model_args)
    trainer = LoRAProDPOTrainer(
        args=training,
        train_dataset=splits.get("train", splits.get("validation")),  # TRL requires one
        eval_dataset=splits.get("validation"),
        **parts(training, model_args, adapter, tokenizer),
    )
    run(trainer, parser, card={"dataset_name": data.described})


if __name__ == "__main__":
    main()
