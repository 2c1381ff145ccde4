r"""Train a model of rewards on preferences, with LoRA-Pro and TRL.

Rows have `chosen` and `rejected`, and `prompt` unless both begin with the prompt; each is a text or a list of messages.

    python scripts/run_reward.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --learning_rate 1e-4 --output_dir runs/reward

The head starts at random, is trained whole in float32, and is saved with the adapter.
"""

from __future__ import annotations

import lorapro_hf.recipes.quiet  # noqa: F401  (before other libraries are imported)

# isort: split

from dataclasses import dataclass, field
from functools import partial

from transformers import AutoModelForSequenceClassification

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.data import load_splits
from lorapro_hf.recipes.endings import one_line_errors
from lorapro_hf.recipes.flow import as_program, run, start
from lorapro_hf.recipes.language import complete, require_chat_template
from lorapro_hf.recipes.model import (
    AdapterArguments,
    ModelArguments,
    add_adapter,
    layers_without_weights,
    load_config,
    load_model,
    load_tokenizer,
)
from lorapro_hf.recipes.parser import RecipeParser
from lorapro_hf.recipes.preferences import PreferenceArguments, preferences

with one_line_errors():
    from lorapro_hf import LoRAProRewardConfig, LoRAProRewardTrainer


@dataclass
class RewardSettings(LoRAProRewardConfig):
    """`trl.RewardConfig` with LoRA-Pro's settings."""

    trust_remote_code: bool = field(default=False, init=False)  # `ModelArguments` has it


@as_program
def main(argv: list[str] | None = None) -> None:
    """Train and evaluate as the flags ask."""
    parser = RecipeParser(
        (ModelArguments, AdapterArguments, PreferenceArguments, RewardSettings), "run_reward.py", description=__doc__
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
    model, report = load_model(
        *(AutoModelForSequenceClassification, model_args),
        config=load_config(model_args, num_labels=1),
        output_loading_info=True,
        **(training.model_init_kwargs or {}),
    )
    training.model_init_kwargs = None  # TRL warns about them beside a loaded model
    new_layers = layers_without_weights(model, report["missing_keys"])
    model = add_adapter(model, adapter, "SEQ_CLS", training.gradient_checkpointing, new_layers=new_layers)
    trainer = LoRAProRewardTrainer(
        model=model,
        args=training,
        train_dataset=splits.get("train", splits.get("validation")),  # TRL requires one
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
    )
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        if rows is not None and not len(rows):
            raise UsageError(f"every answer has more than --max_length {training.max_length} tokens; raise it.")
    run(trainer, parser, card={"dataset_name": data.described})


if __name__ == "__main__":
    main()
