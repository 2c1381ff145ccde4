"""How is an adapter merged in float32, and how are the weights rounded to their own precision?"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorapro_hf.commands.common.adapted import embeddings_of
from lorapro_hf.options import UsageError
from lorapro_hf.utils.text_files import shortened

Precisions = Mapping[str, torch.dtype]


def raised_to_float32(model: nn.Module) -> dict[str, torch.dtype]:
    """Put the weights into float32, one at a time, and return the precision that each had."""
    precisions = {}
    for name, tensor in _weights(model):
        precisions[name] = tensor.dtype
        tensor.data = tensor.data.float()
    return precisions


@torch.no_grad()
def round_values(model: nn.Module, precisions: Precisions) -> None:
    """Round the values of weights in float32 to their precision; they stay in float32."""
    for name, tensor in _weights(model):
        tensor.copy_(tensor.to(_of(name, precisions)))


def lower(model: nn.Module, precisions: Precisions) -> None:
    """Store weights in their precision, one at a time."""
    for name, tensor in _weights(model):
        tensor.data = tensor.data.to(_of(name, precisions))


def merge_adapter(model: PeftModel) -> Any:
    """The base model with the adapter in its weights, by PEFT's own merging.

    Raises:
        UsageError: PEFT cannot merge the adapter.
    """
    tied = [each for each in _configurations(model) if getattr(each, "tie_word_embeddings", False)]
    _untie(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about embeddings that are tied no longer
            merged: Any = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"PEFT cannot merge this adapter: {shortened(str(error), 500)}") from error
    if tied:
        _settle_tie(merged, tied)
    return merged


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and saved buffers with fractions, each once."""
    saved = model.state_dict().keys()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or name in saved):
            yield name, tensor


def _of(name: str, precisions: Precisions) -> torch.dtype:
    """The precision of a weight; a head that was tied has that of the embeddings."""
    return precisions.get(name) or next(iter(precisions.values()))


def _untie(model: nn.Module) -> None:
    """Give each adapted layer a weight of its own: merging changes only what the adapter has changed."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
    adapted = {id(each.get_base_layer()) for each in model.modules() if isinstance(each, BaseTunerLayer)}
    for places in owners.values():
        if len(places) > 1 and any(id(module) in adapted for module, _ in places):
            for module, name in places[1:]:
                own = getattr(module, name)
                setattr(module, name, nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad))


def _settle_tie(model: Any, tied: list[Any]) -> None:
    """Tie equal input and output embeddings again, or state in the configuration that they differ."""
    ends = embeddings_of(model)
    if len(ends) < 2 or ends[0].weight is ends[1].weight:
        return
    first, last = ends
    is_equal = torch.equal(first.weight, last.weight)
    if is_equal:
        last.weight = first.weight
    for config in tied:  # PEFT may have changed it, too
        config.tie_word_embeddings = is_equal


def _configurations(model: PeftModel) -> list[Any]:
    """The configuration of the base model, and that of its text part."""
    config = getattr(model.get_base_model(), "config", None)
    if config is None:
        return []
    text = config.get_text_config()
    return [config] if text is config else [config, text]
