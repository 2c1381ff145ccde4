"""Which batches does a model get from a file of texts, or from a folder of images?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from lorapro_hf.options import UsageError
from lorapro_hf.recipes.cells import complete_rows, holds_messages, require_columns, with_texts
from lorapro_hf.recipes.files import read_file

_BY_DEFAULT = (("messages",), ("prompt", "completion"), ("text",))


def read_texts(file: str, columns: Sequence[str] | None) -> tuple[Dataset, list[str]]:
    """Return the rows of a file without blank ones, in random order, and the columns to read.

    Raises:
        UsageError: the file cannot be read, or has no such columns.
    """
    rows = read_file(file, "--data")
    if columns is None:
        columns = next((each for each in _BY_DEFAULT if set(each) <= set(rows.column_names)), None)
        if columns is None:
            raise UsageError(f"{file} has the columns {rows.column_names}: name those to read by --text_columns.")
    require_columns(rows, columns, " Name others by --text_columns.")
    rows = rows.select_columns(list(columns)).shuffle(seed=0)
    if any(holds_messages(rows, column) for column in columns):
        if len(columns) > 1 or columns[0] != "messages":
            raise UsageError(f"{file}: conversations must stand in one column, `messages`, with role and content.")
        return complete_rows(rows, columns, file), list(columns)
    return with_texts(rows, columns, file), list(columns)


def encoder_of(tokenizer: Any, columns: Sequence[str], model: Any, max_length: int) -> Callable[[dict[str, Any]], Any]:
    """Return a function from a row to the model's arguments, each a list of numbers.

    Raises:
        UsageError: there is no chat template for messages, or an encoder-decoder has not two columns.
    """
    limits = {"truncation": True, "max_length": max_length, "verbose": False}
    limits["return_token_type_ids"] = "token_type_ids" in signature(model.forward).parameters
    if columns[0] == "messages":
        if not tokenizer.chat_template:
            raise UsageError(
                "the tokenizer has no chat template for messages: name columns of texts by --text_columns."
            )

        def of_messages(row: dict[str, Any]) -> Any:
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            return tokenizer(text, add_special_tokens=False, **limits)

        return of_messages
    if getattr(model.config, "is_encoder_decoder", False):
        if len(columns) != 2:
            raise UsageError(
                "an encoder-decoder reads one text and writes another: name both columns by --text_columns."
            )
        start = model.config.decoder_start_token_id

        def of_two_sides(row: dict[str, Any]) -> Any:
            read, written = row[columns[0]], tokenizer(text_target=row[columns[1]], **limits)["input_ids"]
            return {**tokenizer(read, **limits), "decoder_input_ids": [start, *written[:-1]]}

        return of_two_sides
    if len(columns) == 2 and tokenizer.sep_token is not None:
        return lambda row: tokenizer(*(row[column] for column in columns), **limits)
    return lambda row: tokenizer("\n".join(row[column] for column in columns), **limits)


def text_batches(
    rows: Dataset, encode: Callable[[dict[str, Any]], Any], size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches with masks; equal rows count once, and rows without tokens not at all."""
    seen: set[tuple[tuple[int, ...], ...]] = set()
    batch: list[dict[str, Any]] = []
    for row in rows:
        encoded = dict(encode(row))
        encoded = {
            name: encoded[name] for name in ("input_ids", "token_type_ids", "decoder_input_ids") if name in encoded
        }
        tokens = tuple(encoded["input_ids"]), tuple(encoded.get("decoder_input_ids", ()))
        if tokens[0] and tokens not in seen:
            seen.add(tokens)
            batch.append(encoded)
        if len(batch) == size:
            yield _padded(batch)
            batch = []
    if batch:
        yield _padded(batch)


def _padded(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = {}
    for name in rows[0]:
        values = [torch.tensor(row[name]) for row in rows]
        batch[name] = pad_sequence(values, batch_first=True)
        if name.endswith("input_ids"):
            mask = name.replace("input_ids", "attention_mask")
            batch[mask] = pad_sequence([torch.ones_like(each) for each in values], batch_first=True)
    return batch


def image_batches(rows: Dataset, processor: Any, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of images."""
    for batch in rows.iter(size):
        images = [image.convert("RGB") for image in batch["image"]]
        yield {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
