"""How do the scripts on TRL's trainers prepare settings, rows and model?"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows, holds_messages, require_contents, with_texts
from lorapro_hf.recipes.data import DataArguments
from lorapro_hf.recipes.model import AdapterArguments, ModelArguments, continued_adapter, load_model
from lorapro_hf.recipes.targets import require_known_names

logger = logging.getLogger(__name__)


def complete(training: TrainingArguments, model: ModelArguments, data: DataArguments) -> None:
    """Set TRL's defaults in the settings of the training: without `--do_...` it trains."""
    if not (training.do_train or training.do_predict or (training.do_eval and training.eval_strategy == "no")):
        training.do_train = True
    settings: Any = training
    settings.trust_remote_code = model.trust_remote_code
    if getattr(settings, "dataset_num_proc", 0) is None:  # GRPO has no such setting
        settings.dataset_num_proc = data.preprocessing_num_workers
    if (model.load_in_4bit or model.load_in_8bit) and settings.lora_pro and not settings.lora_pro_master_factors:
        logger.info("TRL keeps the adapter of a quantized model in bfloat16: --lora_pro_master_factors is set.")
        settings.lora_pro_master_factors = True


def with_turns(
    rows: Dataset, columns: Collection[str], where: str, map_kwargs: dict[str, Any], need_text: Collection[str] = ()
) -> Dataset:
    """Return the complete rows of columns that hold texts or messages; see `with_texts` for the arguments."""
    conversations = [column for column in columns if holds_messages(rows, column)]
    texts = [column for column in columns if column not in conversations]
    for column in conversations:
        require_contents(rows, column, where)
    return with_texts(complete_rows(rows, conversations, where), texts, where, need_text, map_kwargs=map_kwargs)


def require_chat_template(tokenizer: Any, rows: Dataset, column: str, model: ModelArguments) -> None:
    """Refuse messages in a column if the tokenizer has no template for them."""
    if not isinstance(rows[0][column], str) and tokenizer.chat_template is None:
        raise UsageError(
            f"{model.model_name_or_path} has no chat template for messages: take its instruction-tuned variant, or "
            "name another --tokenizer_name."
        )


def parts(
    training: TrainingArguments,
    model: ModelArguments,
    adapter: AdapterArguments,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
) -> dict[str, Any]:
    """Return model, adapter and tokenizer as keywords of a TRL trainer, which adds a new adapter itself.

    With a processor of pictures and texts in place of the tokenizer, the model is a vision-language model.
    """
    settings: Any = training
    reads_pictures = isinstance(tokenizer, ProcessorMixin)
    base = load_model(
        AutoModelForImageTextToText if reads_pictures else AutoModelForCausalLM,
        model,
        **(settings.model_init_kwargs or {}),
    )
    settings.model_init_kwargs = None  # TRL warns about them beside a loaded model
    if adapter.adapter_name_or_path is not None:
        return {"model": continued_adapter(base, adapter), "processing_class": tokenizer}
    config = adapter.peft_config(None if reads_pictures else "CAUSAL_LM")
    require_known_names(base, config)  # before TRL tokenizes the data
    return {"model": base, "peft_config": config, "processing_class": tokenizer}
