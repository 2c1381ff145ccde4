"""What do the files and the last lines say about a merged model?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lorapro_hf.commands.common.adapted import Source
from lorapro_hf.commands.common.tasks import TASKS
from lorapro_hf.hub.card import CARD, write_card
from lorapro_hf.hub.describe import name_on_hub
from lorapro_hf.hub.settings import SETTINGS_FILE, load_lora_pro_config
from lorapro_hf.options import UsageError

_OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def method_of(source: Source) -> str:
    """The method of the training and the kind of adapter, such as `LoRA-Pro (mode full) with DoRA, rank 8`."""
    config: Any = source.adapter
    words = "LoRA"
    if Path(source.name, SETTINGS_FILE).is_file():
        try:
            words = f"LoRA-Pro (mode {load_lora_pro_config(source.name).mode})"
        except ValueError as error:
            raise UsageError(str(error)) from error
    kinds = [name for name, is_on in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if is_on]
    ranks = sorted({config.r, *config.rank_pattern.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{words}{' with ' if kinds else ''}{' and '.join(kinds)}, {rank}"


def write_merged_card(folder: Path, output: Path, source: Source, dtype: str) -> None:
    """Write the card of a merged model, which names base, adapter and method; a license of the adapter's card stays."""
    named: Any = source.adapter
    base = name_on_hub(source.base_name) or name_on_hub(named.base_model_name_or_path)
    adapter = name_on_hub(source.name)
    before = ModelCard.load(Path(source.name, CARD), ignore_metadata_errors=True).data if _has_card(source) else None
    kept = {name: getattr(before, name, None) for name in ("license", "language", "datasets")}
    data = ModelCardData(
        **{name: value for name, value in kept.items() if value is not None},
        base_model=base,
        library_name="transformers",
        tags=sorted({"lora", "merged", *([f"base_model:finetune:{base}"] if base else [])}),
    )
    auto_class = TASKS[source.task].auto_class
    text = f"""\
# {output.resolve().name}

The model {_linked(base, source.base_name)} with the adapter {_linked(adapter, source.name)} merged into its weights.

| | |
|---|---|
| base model | {_linked(base, source.base_name)} |
| adapter | {_linked(adapter, source.name)} |
| method | {method_of(source)} |
| weights | merged in float32, saved in {dtype} |

## Use it

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder")
```"""
    write_card(folder / CARD, data, {"library_text": text})


def ways_to_run(output: Path, source: Source, dtype: str) -> str:
    """Commands that run a merged model, to be copied."""
    folder, name = shlex.quote(str(output)), output.resolve().name
    lines = [("Python", f'{TASKS[source.task].auto_class}.from_pretrained({str(output)!r}, dtype="auto")')]
    if source.task == "causal-lm":
        file = shlex.quote(f"{output}.gguf")
        modelfile = shlex.quote(f"{output}.Modelfile")
        content = shlex.quote(f"FROM {output.resolve()}.gguf")
        model = shlex.quote(name.lower())
        lines += [
            ("chat", f"lorapro chat {folder}"),
            ("vLLM", f"vllm serve {folder}"),
            ("GGUF", f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {file} --outtype {_OUTTYPES[dtype]}"),
            ("llama.cpp", f"llama-cli -m {file}"),
            ("Ollama", f"echo {content} > {modelfile} && ollama create {model} -f {modelfile} && ollama run {model}"),
        ]
    width = max(len(title) for title, _ in lines)
    return "\n".join(f"  {title:{width}}  {line}" for title, line in lines)


def _has_card(source: Source) -> bool:
    return Path(source.name, CARD).is_file()


def _linked(on_hub: str | None, name: str) -> str:
    """A link to a repository on the Hub, or the last part of a path."""
    return f"[{on_hub}](https://huggingface.co/{on_hub})" if on_hub else f"`{Path(name).resolve().name}`"
