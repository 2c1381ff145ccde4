"""How does `lorapro ranks` run a model and report the ranks?"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from lorapro_hf.commands.ranks.data import encoder_of, image_batches, read_texts, text_batches
from lorapro_hf.methods.gelora import BlockRank, block_ranks, lora_keywords
from lorapro_hf.options import UsageError, require_packages
from lorapro_hf.recipes.files import read_images
from lorapro_hf.recipes.model import ModelArguments, load_model, load_processor, load_tokenizer
from lorapro_hf.utils.text_files import write_text

_KEYWORD = re.compile(r'\b(rank_floor|alpha_over_r|max_points|pooling)="?([\w.+-]*\w)"?')


def choose_ranks(arguments: argparse.Namespace) -> int:
    """Run the data, print the table or JSON, write the file, and return the exit code.

    Raises:
        UsageError: model and data cannot be read, do not fit together, or give no ranks.
    """
    transformers_logging.set_verbosity_error()
    settings = ModelArguments(
        arguments.model,
        dtype=arguments.dtype,
        load_in_4bit=arguments.load_in_4bit,
        trust_remote_code=arguments.trust_remote_code,
    )
    model, batches, count = _prepared(arguments, settings)
    total = ceil(min(count, arguments.max_points if arguments.pooling == "mean" else count) / arguments.batch_size)
    shown = tqdm(batches, "batches", total, disable=None)
    try:
        found = block_ranks(model, shown, arguments.rank_floor, arguments.pooling, max_points=arguments.max_points)
        first = next(found)
        shown.close()
        rows = list(tqdm(chain([first], found), "blocks", disable=None))
        config = lora_keywords(model, rows, arguments.rank_floor, arguments.alpha_over_r)
    except ValueError as error:
        raise UsageError(_of_options(str(error), arguments)) from error
    finally:
        shown.close()
    write_text(arguments.output, json.dumps(config, indent=2) + "\n")
    if arguments.json:
        report = {"model": arguments.model, "data": arguments.data, "pooling": arguments.pooling}
        report |= {"blocks": [row._asdict() for row in rows], "lora_config": config, "file": str(arguments.output)}
        print(json.dumps(report, allow_nan=False))
    else:
        print(_table(rows, arguments.rank_floor))
        # a recipe may have others
        own = f"--lora_config {arguments.output} --lora_r {config['r']} --lora_alpha {config['lora_alpha']}"
        print(f"\nSettings: {arguments.output}. Train with them: lorapro train RECIPE {own}")
    return 0


def _of_options(message: str, arguments: argparse.Namespace) -> str:
    """The message of `gelora_ranks` with the options of the command in the place of its keywords."""
    found = _KEYWORD.sub(r"--\1 \2", message).replace("blocks=[...]", "blocks=[...] of lorapro_hf.gelora_ranks")
    return found if found.startswith("--") else f"{arguments.model} on --data {arguments.data}: {found}"


def _prepared(arguments: argparse.Namespace, settings: ModelArguments) -> tuple[Any, Iterable[Any], int]:
    """The model, its batches, and the number of rows in them."""
    reads_images = Path(arguments.data).is_dir()
    batches: Iterable[Any]
    if reads_images:
        require_packages("lorapro ranks on images", "PIL", extra="scripts")
        if arguments.text_columns is not None:
            raise UsageError(
                "--text_columns is for a file of texts, and --data names a folder of images: leave it out."
            )
        rows = read_images(arguments.data, "--data").shuffle(seed=0)
        model = _loaded(AutoModelForImageClassification, settings, arguments.device)
        processor = load_processor(AutoImageProcessor, arguments.model, settings)
        batches = image_batches(rows, processor, arguments.batch_size)
    else:
        rows, columns = read_texts(arguments.data, arguments.text_columns)
        tokenizer = load_tokenizer(settings)
        model = _loaded(AutoModel, settings, arguments.device)
        encode = encoder_of(tokenizer, columns, model, arguments.max_length)
        batches = text_batches(rows, encode, arguments.batch_size)
    needed, given = getattr(model, "main_input_name", None), "pixel_values" if reads_images else "input_ids"
    if needed != given:
        raise UsageError(
            f"{arguments.model} reads {needed}, and --data {arguments.data} gives {given}: name a file of texts or a "
            "folder of images, as the model needs, or call lorapro_hf.gelora_ranks with batches of your own."
        )
    return model, batches, len(rows)


def _loaded(auto_class: Any, settings: ModelArguments, device: str | None) -> Any:
    try:
        model = load_model(auto_class, settings)
    except (ValueError, ImportError, KeyError) as error:
        raise UsageError(f"cannot load the model {settings.model_name_or_path}: {error}") from error
    if settings.load_in_4bit:
        return model
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _table(rows: Sequence[BlockRank], rank_floor: int) -> str:
    """A line for each block; layers that are smaller than the rank make a range of ranks."""
    width = max(len("block"), *(len(row.block) for row in rows))
    lines = [f"{'block':{width}}  dimension in    out  rank  layers"]
    for row in rows:
        ranks = sorted({*row.ranks.values()})
        rank = f"{ranks[0]}–{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
        lines.append(
            f"{row.block:{width}}  {row.dimension_in:12.2f}  {row.dimension_out:5.2f}  {rank:>4}  {len(row.ranks):6}"
        )
    every = [rank for row in rows for rank in row.ranks.values()]
    lines.append(f"\n{len(every)} layers, mean rank {sum(every) / len(every):.2f}, from {rows[0].points} points.")
    if max(every) <= rank_floor:
        lines.append(f"No block needs more than the least rank, {rank_floor}; --rank_floor raises it.")
    return "\n".join(lines)
