"""Which points do the hidden states before and after each block of a model give?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Pooling = Callable[[Tensor, Tensor | None], Tensor]
POOLINGS = ("mean", "tokens")
_OWN_POOLING = "Give pooling=lambda hidden, mask: ..., a function that returns points of shape (N, width)."


class Stack:
    """A list of blocks, and the points at the boundaries of its blocks, in the order in which they run.

    Args:
        name: the list's name in the model.
        blocks: the module that holds the blocks.
        pooling: turns hidden states into points; see `gelora_ranks`.
        mask_name: the argument of the model that masks the tokens of this list.
    """

    def __init__(self, name: str, blocks: nn.Module, pooling: str | Pooling, mask_name: str) -> None:
        self.name, self.pooling, self.mask_name = name, pooling, mask_name
        self.names = {block: f"{name}.{key}" for key, block in blocks.named_children()}
        self.order: list[nn.Module] = []
        self.points: list[list[Tensor]] = []
        self.sequences = 0

    @property
    def count(self) -> int:
        """The number of points at the last boundary."""
        return sum(map(len, self.points[-1])) if self.points else 0

    @contextmanager
    def recording(self, mask: Tensor | None, sizes: set[int]) -> Iterator[None]:
        """Record the points of one batch; `sizes` are the first dimensions of its tensors."""
        self._mask, self._sizes, self._is_first = mask, sizes, not self.order
        self.ran, self.uses_mask = 0, False
        self.shape: tuple[int, ...] = ()
        with ExitStack() as hooks:
            for block in self.names:
                hooks.callback(block.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(self._after).remove)
            yield
        if self.ran not in (0, len(self.order)):
            raise ValueError(
                f"{self.name}: its blocks run {len(self.order)} times in one batch, {self.ran} in another."
            )

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _first_tensor(args or kwargs.get("hidden_states", tuple(kwargs.values())))
        if self.ran == 0:
            self._record(hidden)
        elif hidden.shape != self.shape:
            raise ValueError(
                f"{self.name} is no chain of blocks: {self.names[block]} reads hidden states of {tuple(hidden.shape)}; "
                f"the block before returns {self.shape}. Name the lists to measure by blocks=[...]."
            )

    def _after(self, block: nn.Module, _: Any, output: Any) -> None:
        if self._is_first:
            self.order.append(block)
        elif self.order[self.ran : self.ran + 1] != [block]:
            raise ValueError(
                f"{self.name}: its blocks run in another order in each batch; leave it out of blocks=[...]."
            )
        self.ran += 1
        self._record(_first_tensor(output))

    def _record(self, hidden: Tensor) -> None:
        self.shape = tuple(hidden.shape)
        points = self._points_of(hidden.detach())
        if not bool(points.isfinite().all()):
            raise ValueError(
                f"{self.name}: the hidden states after {self.ran} of its blocks are not finite. Load the model in a "
                "wider dtype (float32, or bfloat16 instead of float16), and look at the batch."
            )
        if len(self.points) == self.ran:
            self.points.append([])
        self.points[self.ran].append(points.to("cpu", torch.promote_types(points.dtype, torch.float32)))

    def _points_of(self, hidden: Tensor) -> Tensor:
        self.sequences += len(hidden) if self.ran == 0 else 0
        if callable(self.pooling):
            self.uses_mask = True
            points = self.pooling(hidden, self._mask)
            if not isinstance(points, Tensor) or points.dim() != 2:
                raise ValueError(f"pooling must return a tensor of shape (N, width), not {points!r:.80}.")
            return points
        if hidden.dim() != 3 or len(hidden) not in self._sizes:
            raise ValueError(
                f"{self.name}: its hidden states have the shape {tuple(hidden.shape)}, not (sequences, tokens, width). "
                f"{_OWN_POOLING} Or name the lists to measure by blocks=[...]."
            )
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if self._mask is not None and self._mask.shape == mask.shape:
            self.uses_mask, mask = True, self._mask.to(hidden.device)
        if self.pooling == "tokens":
            return hidden[mask]
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        sums, counts = hidden.masked_fill(~mask[..., None], 0).sum(dim=1), mask.sum(dim=1)
        return (sums / counts[:, None])[counts > 0]


def find_stacks(model: nn.Module, names: Sequence[str] | None, pooling: str | Pooling) -> list[Stack]:
    """Return the lists of blocks with these names, by default each outermost list of blocks with linear layers."""
    found = dict(_outermost("", model)) if names is None else {}
    modules = dict(model.named_modules())
    for name in names or ():
        found[name] = modules.get(name, model)
        if not _is_list(found[name]):
            raise ValueError(
                f"blocks: {name!r} is no list of blocks with linear layers. The model has "
                f"{', '.join(each for each, _ in _outermost('', model)) or 'none'}."
            )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks (ModuleList or Sequential) with linear layers: name one by "
            "blocks=[...], or set the ranks by hand."
        )
    has_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)

    def mask_name(name: str) -> str:
        side = next((part for part in name.split(".") if part in ("encoder", "decoder")), None)
        return "decoder_attention_mask" if has_decoder and side == "decoder" else "attention_mask"

    return [Stack(name, blocks, pooling, mask_name(name)) for name, blocks in found.items()]


def linear_layers(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield names of a block's linear layers and packed experts, quantised or not, and the smaller side of each."""
    for name, layer in block.named_modules():
        if _is_linear(layer):
            sides = (layer.nx, layer.nf) if hasattr(layer, "nf") else (layer.in_features, layer.out_features)
            yield name, min(map(int, sides))
        elif not hasattr(layer, "kernel_size"):
            for own, parameter in layer.named_parameters(name, recurse=False):
                if parameter.dim() == 3:  # PEFT takes the rank of a parameter by its own name
                    yield own, min(parameter.shape[1:])


def record(model: nn.Module, batches: Iterable[Any], stacks: Sequence[Stack], most: int) -> None:
    """Run batches until each stack that takes part has `most` points, and cut off the rest.

    Raises:
        ValueError: as in `gelora_ranks`.
    """
    from accelerate.utils import send_to_device

    count = 0
    with _evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise ValueError(f"a batch is a {type(batch).__name__}, not a dictionary of the model's arguments.")
            _record(model, send_to_device(batch, next(model.parameters()).device), stacks)
            count += 1
            if min((stack.count for stack in stacks if stack.order), default=0) >= most:
                break
    if not count:
        raise ValueError("batches is empty: give at least one batch.")
    if not any(stack.order for stack in stacks):
        raise ValueError(
            f"the batches run no block of {', '.join(each.name for each in stacks)}: name others by blocks."
        )
    for stack in stacks:
        if not stack.order:
            logger.warning("%s does not run on the batches: its layers get the rank r.", stack.name)
        elif stack.sequences < 2:
            raise ValueError(
                "the batches hold a single sequence, which says nothing about others: give several hundred."
            )
        stack.points = [[torch.cat(parts)[:most]] for parts in stack.points]


def _record(model: nn.Module, batch: Mapping[str, Any], stacks: Sequence[Stack]) -> None:
    masks = {stack.mask_name: _mask(batch, stack.mask_name) for stack in stacks}
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    with ExitStack() as recording:
        for stack in stacks:
            recording.enter_context(stack.recording(masks[stack.mask_name], sizes))
        model(**batch)
    for name, mask in masks.items():
        readers = [stack for stack in stacks if stack.ran and stack.mask_name == name]
        if mask is not None and readers and not bool(mask.all()) and not any(each.uses_mask for each in readers):
            raise ValueError(
                f"the {name} of shape {tuple(mask.shape)} fits no hidden states, such as {readers[0].shape}. "
                f"{_OWN_POOLING} Or give sequences of equal length, without a mask."
            )


def _mask(batch: Mapping[str, Any], name: str) -> Tensor | None:
    """The mask of the tokens that count; a decoder without one has the labels."""
    mask = batch.get(name)
    if mask is None and name.startswith("decoder") and "labels" in batch and "decoder_input_ids" not in batch:
        mask = batch["labels"] != -100
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(f"the {name} must be a tensor of shape (sequences, tokens), with 0 for tokens to leave out.")
    return None if mask is None else mask.bool()


def _outermost(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The names and modules of the outermost lists of blocks below a module."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if _is_list(child):
            yield path, child
        else:
            yield from _outermost(path, child)


def _is_list(module: nn.Module) -> bool:
    """Whether a module is a list of blocks, each of which holds linear layers and is none."""
    is_list = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
    return is_list and all(map(_is_block, module.children()))


def _is_block(module: nn.Module) -> bool:
    return not _is_linear(module) and any(map(_is_linear, module.modules()))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not, or transformers' `Conv1D`."""
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or type(module).__name__ == "Conv1D"


def _first_tensor(value: Any) -> Tensor:
    """The first tensor of what a block takes or returns."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and give each module its own mode back."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
