"""What does the recipe for a model and a data file say?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lorapro_hf.commands.common.datasets import is_missing_path
from lorapro_hf.commands.init.columns import DPO, SEQ2SEQ, SFT, is_conversation
from lorapro_hf.config import MODE
from lorapro_hf.options import UsageError
from lorapro_hf.recipes import folder_of
from lorapro_hf.recipes.parser import read_recipe
from lorapro_hf.recipes.resolved import yaml_line

_SCRIPTS = {SFT: "run_sft.py", DPO: "run_dpo.py", SEQ2SEQ: "run_seq2seq.py"}
_SHIPPED = {SFT: "smollm2-135m.yaml", DPO: "smollm2-135m-dpo.yaml", SEQ2SEQ: "paper/_t5-base.yaml"}


def learning_rate(task: str) -> tuple[Any, str]:
    """Return the learning rate that a new recipe begins with, and the comment beside it."""
    shipped = _SHIPPED[task]
    rate = read_recipe(folder_of("configs") / shipped)["learning_rate"]
    return rate, f"that of {shipped}, not tuned for this model and data: try a third and three times as much"


def model_settings(model: str) -> dict[str, Any]:
    """Return the settings that name the base model; `UsageError` for a path that holds none."""
    if is_missing_path(model):
        raise UsageError(f"--model {model}: there is no such folder.")
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UsageError(f"--model {model} is an adapter: name its base model.")
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise UsageError(f"--model {model} has no config.json and {len(files)} GGUF files: name a model's folder.")
        return {"model_name_or_path": model, "gguf_file": files[0].name}
    return {"model_name_or_path": model}


def template_settings(model: Mapping[str, Any], columns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the template of prompts for `run_sft.py`: the tokenizer's own if it has one.

    Raises:
        UsageError: the tokenizer cannot be loaded, or has no chat template for messages.
    """
    is_pair, needs_template = "prompt_column" in columns, is_conversation(dict(columns), names)
    if not (is_pair or needs_template):
        return {}
    source = model["model_name_or_path"]
    extra = {name: model[name] for name in ("gguf_file",) if name in model}
    try:
        has_template = AutoTokenizer.from_pretrained(source, **extra).chat_template is not None
    except (OSError, ValueError) as error:
        line = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"--model {source}: its tokenizer cannot be loaded: {line}.") from error
    if needs_template and not has_template:
        raise UsageError(
            f"{source} has no chat template for messages: take the model's instruction-tuned variant, or data of "
            "prompts and completions."
        )
    return {"prompt_template": "chat" if has_template else "alpaca"} if is_pair else {}


def recipe_text(
    task: str,
    file: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    about_data: str,
    output_dir: str,
) -> str:
    """Return the recipe as YAML with comments.

    Args:
        task: One of `TASKS`.
        file: The path that the recipe is written to, for its first lines.
        model: The settings that name the base model.
        data: The settings that name the data and its columns.
        about_data: A comment on the data.
        output_dir: The folder of the training.
    """
    rate, about_rate = learning_rate(task)
    on_cpu = not torch.accelerator.is_available()
    length = {"max_source_length": 512, "max_target_length": 128} if task == SEQ2SEQ else {"max_length": 1024}
    lines = [
        f"# {model['model_name_or_path']} on {data['train_file']}, written by `lorapro init`.",
        "#",
        f"#   lorapro train --dry_run {file}",
        f"#   lorapro train {file}",
        yaml_line("script", _SCRIPTS[task]),
        *_lines(model),
        f"# {about_data}; validation_file: FILE takes the place of the rows held out for the evaluation",
        *_lines({**data, "validation_split_percentage": 5}),
        "# tokens; the rest of a longer example is cut off",
        *_lines(length),
        "# the adapter: a higher rank trains more parameters",
        *_lines({"lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["all-linear"]}),
        "# how LoRA-Pro steps; `lorapro_hf` documents the modes, and lora_pro: false trains plain LoRA",
        yaml_line("lora_pro_mode", MODE),
        f"# {about_rate}",
        yaml_line("learning_rate", rate),
        *_lines({"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0, "num_train_epochs": 1}),
        "# examples of a step: their product, on each device; a smaller first number needs less memory",
        *_lines({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}),
        "# this machine has no GPU: for one with a GPU set true and false" if on_cpu else "# precision",
        *_lines({"bf16": not on_cpu, "use_cpu": on_cpu}),
        *_lines({"logging_steps": 10, "save_steps": 200, "do_train": True, "do_eval": True, "report_to": "none"}),
        yaml_line("output_dir", output_dir),
    ]
    return "\n".join(lines) + "\n"


def _lines(settings: Mapping[str, Any]) -> list[str]:
    return [yaml_line(name, value) for name, value in settings.items()]
