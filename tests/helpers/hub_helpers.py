"""A tiny model on disk, its tokenizer, and a trainer that pushes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerFast

from lorapro_hf import LoRAProTrainer, LoRAProTrainingArguments
from trainer_helpers import VOCABULARY, sequences, tiny_base


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of a small vocabulary."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names = ["input_ids", "attention_mask"]  # transformers 4 adds token types, which the models do not take
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=names, **special)


def model_of(base: Path) -> PeftModel:
    """The tiny model, loaded from a folder that is made if need be, with an adapter that is not 0."""
    if not base.is_dir():
        tiny_base().save_pretrained(base)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def trainer_of(folder: Path, model: Any, flags: list[str]) -> LoRAProTrainer:
    """A trainer from the flags of a command line; four steps, pushing."""
    always = ["--output_dir", str(folder), "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
    always += ["--logging_steps", "1", "--learning_rate", "1e-2", "--push_to_hub", "--max_steps", "4"]
    (args,) = HfArgumentParser(LoRAProTrainingArguments).parse_args_into_dataclasses([*always, *flags])  # type: ignore[arg-type]
    data = {"train_dataset": sequences(16), "eval_dataset": sequences(4, seed=1)}
    return LoRAProTrainer(model=model, args=args, processing_class=tokenizer(), **data)
