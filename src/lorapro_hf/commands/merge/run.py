"""How do a base model and an adapter become one model in a folder?"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor
from transformers.utils import cached_file

from lorapro_hf.commands.common.adapted import (
    Source,
    add_end_of_answer,
    attach,
    find_source,
    load_base,
    load_tokenizer,
    quiet,
)
from lorapro_hf.commands.merge.card import method_of, ways_to_run, write_merged_card
from lorapro_hf.commands.merge.check import Agreement, agreement, logits, probe
from lorapro_hf.commands.merge.folder import require_free, whole_folder
from lorapro_hf.commands.merge.weights import lower, merge_adapter, raised_to_float32, round_values
from lorapro_hf.optim.memory import readable_bytes
from lorapro_hf.options import UsageError

_SHARD = "5GB"  # a whole shard is in memory while it is written
_OF_PROCESSOR = ("processor_config.json", "preprocessor_config.json")
_OF_SAMPLING = ("temperature", "top_p", "min_p", "top_k", "typical_p", "epsilon_cutoff", "eta_cutoff")


class MergeError(OSError):
    """A merged model does not give the outputs of its adapter."""


def run_merge(arguments: argparse.Namespace) -> int:
    """Merge, compare, write, say how the result is run, and return the exit code 0.

    Raises:
        UsageError: arguments that cannot be followed.
        MergeError: the outputs of the merged model differ; nothing has been written.
    """
    output: Path = arguments.output
    require_free(output, arguments.overwrite, ())
    source = find_source(arguments.adapter, arguments.base, "--base", arguments.trust_remote_code)
    if source.adapter is None:
        raise UsageError(f"{arguments.adapter} is a whole model, no adapter: there is nothing to merge.")
    require_free(output, arguments.overwrite, (source.name, source.base))
    arguments.way_on = f"Nothing was written to {output}."
    size = readable_bytes(4 * source.parameters)
    print(f"Merging {source.name} ({method_of(source)}) into {source.base_name}, with {size} of weights in float32.")
    with whole_folder(output) as folder, quiet():
        dtype, found = _write(folder, source, arguments)
        _require_close(found, dtype)
        write_merged_card(folder, output, source, dtype)
    print(
        f"Outputs agree: logits of up to {found.largest:.3g} differ by {found.difference:.2g} at most, and rounding "
        f"the weights to {dtype} makes {found.rounding:.2g}.\n\nMerged model: {output} ({dtype})\n"
        f"{ways_to_run(output, source, dtype)}"
    )
    return 0


def _write(folder: Path, source: Source, arguments: argparse.Namespace) -> tuple[str, Agreement]:
    """Write the merged model, and return its precision and the comparison of its outputs."""
    tokenizer = load_tokenizer(source)
    base = _dequantized(load_base(source))
    precisions = raised_to_float32(base)
    if arguments.dtype != "auto":
        precisions = dict.fromkeys(precisions, getattr(torch, arguments.dtype))
    inputs = probe(base, tokenizer)
    model = attach(base, source)
    unmerged = logits(model, inputs)
    merged = merge_adapter(model)
    exact = logits(merged, inputs)
    round_values(merged, precisions)
    rounded = logits(merged, inputs)
    lower(merged, precisions)
    _save(merged, tokenizer, source, folder)
    dtype = str(merged.dtype).removeprefix("torch.")
    del model, base, merged  # before the weights are read again, so that there is one copy at a time
    saved = source.auto_class.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=arguments.trust_remote_code
    )
    return dtype, agreement(unmerged, exact, rounded, logits(saved.eval(), inputs))


def _dequantized(model: Any) -> Any:
    """The model without quantization; a `UsageError` if its kind cannot be undone."""
    if not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None:
        return model
    method = getattr(model.config.quantization_config, "quant_method", "an unknown method")
    method = getattr(method, "value", method)
    try:
        model = model.dequantize()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"transformers cannot dequantize a base model of {method}: name the model that it was made from by --base."
        ) from error
    vars(model).pop("_weight_conversions", None)  # how transformers 5 has read the quantized weights; none is undone
    print(f"The base model is quantized ({method}): its weights are dequantized before the merge.")
    return model


def _save(model: Any, tokenizer: Any, source: Source, folder: Path) -> None:
    """Write weights, configurations and tokenizer or processor."""
    add_end_of_answer(model, tokenizer)
    settings = getattr(model, "generation_config", None)
    if settings is not None and not settings.do_sample:
        for name in _OF_SAMPLING:  # transformers refuses to save them where nothing is sampled
            if hasattr(settings, name):
                setattr(settings, name, None)
    model.save_pretrained(folder, max_shard_size=_SHARD)
    if (processor := _processor(source)) is not None:
        processor.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        original = _file(source.base, "tokenizer.model")
        if original is not None and not (folder / original.name).exists():  # which converters to GGUF read
            shutil.copyfile(original, folder / original.name)


def _processor(source: Source) -> Any:
    """The processor of a model for pictures or sounds, from the adapter or else the base; `None` for text alone."""
    for name, loading in ((source.name, {}), (source.base, source.loading)):
        if any(_file(name, each) for each in _OF_PROCESSOR):
            return AutoProcessor.from_pretrained(name, **loading)
    return None


def _file(source: str, name: str) -> Path | None:
    """A file of a folder or repository, if it is there."""
    try:
        found = cached_file(source, name)
    except OSError:
        return None
    return None if found is None else Path(found)


def _require_close(found: Agreement, dtype: str) -> None:
    if found.is_close:
        return
    if found.difference != found.difference or found.rounding == float("inf"):
        raise MergeError(f"weights of the merged model do not fit into {dtype}: choose another --dtype.")
    raise MergeError(
        f"the merged model gives other outputs: logits differ by {found.difference:.2g}, and rounding to {dtype} makes "
        f"{found.rounding:.2g} of it. Nothing was written; use the adapter with PEFT."
    )
