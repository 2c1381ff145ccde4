"""Which rank does each layer need? GeLoRA takes it from the dimension of the hidden states around each block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from lorapro_hf.factors.weight_gradients import require_whole_parameters
from lorapro_hf.functional.intrinsic_dimension import MIN_POINTS, intrinsic_dimension
from lorapro_hf.methods.block_states import POOLINGS, Pooling, Stack, find_stacks, linear_layers, record
from lorapro_hf.utils.ranks import errors_of_ranks


class BlockRank(NamedTuple):
    """A block, the intrinsic dimensions of its input and output, the points measured, and the rank of each layer."""

    block: str
    dimension_in: float
    dimension_out: float
    points: int
    ranks: dict[str, int]


def gelora_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    rank_floor: int = 1,
    alpha_over_r: float = 2.0,
    *,
    pooling: str | Pooling = "mean",
    max_points: int = 2000,
    blocks: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Choose the rank of each linear layer from the hidden states of a base model (GeLoRA, arXiv 2412.09250).

    ```python
    from lorapro_hf import gelora_ranks

    config = LoraConfig(target_modules="all-linear", **gelora_ranks(model, batches))
    ```

    The layers of block i, packed experts included, get the rank max(round(d_(i+1) - d_i), 0) + 1, at least
    `rank_floor` and at most the smaller side of the weight. d_i is the `intrinsic_dimension` of the hidden states
    before block i. The estimate has a standard error of about d / sqrt(points), so give several hundred different
    sequences or more. The batches run once, in evaluation mode and without gradients; the model and its training
    mode stay as they are.

    Args:
        model: the base model, before it has an adapter, with whole parameters on each rank.
        batches: what `model(**batch)` takes. They are read until there are `max_points` points.
        rank_floor: the least rank. It is also `r`, the rank of layers outside the blocks.
        alpha_over_r: `lora_alpha` of each layer over its rank.
        pooling: how hidden states of shape (sequences, tokens, width) become points. `"mean"`: a point for each
            sequence, the mean of its tokens. `"tokens"`: a point for each token. Or a function of the hidden states of
            a block and their mask (or `None`) that returns points of shape (N, width). Tokens count whose
            `attention_mask` is 1, in a decoder behind an encoder those of `decoder_attention_mask`, or else those whose
            label is not -100. Without a mask all tokens count, as they do in blocks of another modality.
        max_points: the most points that are kept for each boundary of blocks, in float32 on the CPU.
        blocks: names of the lists of blocks; by default each outermost `ModuleList` or `Sequential` of blocks with
            linear layers.
        group: the ranks that share the batches; by default all, if `torch.distributed` is initialised. Each rank gives
            its own batches and gets the same result.

    Returns:
        `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` for `LoraConfig`. The patterns have the full names of the
        layers, escaped.

    Raises:
        ValueError: an option is out of range, the model has an adapter or no blocks, there is no batch, a single
            sequence or fewer than 20 distinct points, hidden states are not finite or of an unknown shape, a mask fits
            no hidden states, or blocks do not run one after the other.
        RuntimeError: parameters are sharded, or another rank has met an error.
    """
    lora_keywords(model, [], rank_floor, alpha_over_r)  # refuses its options before the batches are run
    rows = list(block_ranks(model, batches, rank_floor, pooling, max_points=max_points, blocks=blocks, group=group))
    return lora_keywords(model, rows, rank_floor, alpha_over_r)


def lora_keywords(
    model: nn.Module, rows: Iterable[BlockRank], rank_floor: int = 1, alpha_over_r: float = 2.0
) -> dict[str, Any]:
    """Return the ranks of blocks as keywords of `LoraConfig`; see `gelora_ranks`."""
    if not 0 < alpha_over_r < math.inf:
        raise ValueError(f"alpha_over_r={alpha_over_r!r} must be positive and finite, such as 2.0.")

    def alpha(rank: int) -> float:
        product = alpha_over_r * rank
        return int(product) if product == int(product) else product

    # PEFT lets a pattern match the end of a name: a name that is the end of another one begins with ^
    ends = {
        name[dot + 1 :] for name, _ in _unwrapped(model).named_modules() for dot in range(len(name)) if name[dot] == "."
    }
    ranks = {("^" if name in ends else "") + re.escape(name): r for row in rows for name, r in row.ranks.items()}
    return {
        "r": rank_floor,
        "lora_alpha": alpha(rank_floor),
        "rank_pattern": ranks,
        "alpha_pattern": {name: alpha(rank) for name, rank in ranks.items()},
    }


def block_ranks(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    rank_floor: int = 1,
    pooling: str | Pooling = "mean",
    *,
    max_points: int = 2000,
    blocks: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[BlockRank]:
    """Run the batches, and yield the dimensions and ranks of one block after the other; see `gelora_ranks`."""
    for name, value, least in (("rank_floor", rank_floor, 1), ("max_points", max_points, MIN_POINTS)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}.")
    if not callable(pooling) and pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} must be one of {', '.join(POOLINGS)}, or a function.")
    require_whole_parameters(model, "gelora_ranks")
    model = _unwrapped(model)
    _refuse_adapters(model)
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    stacks = find_stacks(model, blocks, pooling)
    device, failure = next(model.parameters()).device, None
    try:
        record(model, batches, stacks, max_points if group is None else math.ceil(max_points / group.size()))
    except Exception as error:
        if group is None:
            raise
        failure = error
    ran = [stack for stack in stacks if stack.order]
    if group is not None:
        if errors := errors_of_ranks(failure, group, device):
            raise failure or RuntimeError(f"no rank was chosen: {errors}")
        runs = _gathered([(stack.name, len(stack.order)) for stack in ran], group, device)
        if any(each != runs[0] for each in runs):
            raise ValueError(f"other blocks run on each rank ({runs}): give each rank batches of the same kind.")
    for stack in ran:
        yield from _ranks_of(stack, rank_floor, device, group)


def _ranks_of(
    stack: Stack, rank_floor: int, device: torch.device, group: dist.ProcessGroup | None
) -> Iterator[BlockRank]:
    """The ranks of the blocks of a stack; a block that runs several times gets the largest of its ranks."""
    rows: dict[nn.Module, BlockRank] = {}
    before, _ = _dimension(stack, 0, device, group)
    for position, block in enumerate(stack.order, start=1):
        after, count = _dimension(stack, position, device, group)
        rank = max(max(round(after - before), 0) + 1, rank_floor)
        name = stack.names[block]
        ranks = {f"{name}.{layer}": min(rank, most) for layer, most in linear_layers(block)}
        if block not in rows or max(ranks.values()) > max(rows[block].ranks.values()):
            rows[block] = BlockRank(name, before, after, count, ranks)
        if block not in stack.order[position:]:
            yield rows.pop(block)
        before = after


def _dimension(stack: Stack, position: int, device: torch.device, group: dist.ProcessGroup | None) -> tuple[float, int]:
    """The intrinsic dimension of the points of all ranks at a boundary of a stack, and their number."""
    points = torch.cat(stack.points[position])
    if group is not None:
        points = torch.cat(_gathered(points, group, device))
    try:
        found = intrinsic_dimension(points.to(device))
    except ValueError as error:
        raise ValueError(
            f"{stack.name}, after {position} of its blocks: {error} Give more and different sequences, or "
            'pooling="tokens".'
        ) from error
    if group is not None:  # the last bit, at which a rank may turn, depends on the device: all take the first one's
        found = _gathered(found, group, device)[0]
    return found, len(points)


def _gathered(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """The values of all ranks; NCCL sends objects through the current device, which need not be the rank's."""
    values: list[Any] = [None] * group.size()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        dist.all_gather_object(values, value, group=group)
    return values


def _unwrapped(model: Any) -> Any:
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or "_orig_mod" in model._modules:
        model = model._modules.get("_orig_mod") or model.module  # torch.compile puts its name before the layers'
    return model


def _refuse_adapters(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if adapted is not None:
        raise ValueError(
            f"the model has an adapter already ({adapted}), but ranks are chosen from the base model: call "
            "gelora_ranks before get_peft_model, or on model.unload()."
        )
