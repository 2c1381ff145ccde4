"""What is the whole gradient of an adapted weight, which no backward pass computes?

It is `g = Σ dYᵀ X` over the backward passes of a step, with the input X of the PEFT layer and the gradient dY of its
output. While a layer is recorded, its output passes through a function that does nothing but save X and, when dY comes
back, add to a buffer. Saved this way X goes through gradient checkpointing like every other activation: it is
recomputed where the layer is, and counted once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorapro_hf.diagnostics.figures import BLOCK_ELEMENTS
from lorapro_hf.distributed.access import local
from lorapro_hf.factors.pairs import LoRAPair, unwrapped_name
from lorapro_hf.factors.stacks import exact_arithmetic
from lorapro_hf.functional.projection import compute_dtype
from lorapro_hf.optim.state import dense_shape

SMALLEST_BLOCK = 256  # tokens at a time: each block reads and writes the whole gradient
_MERGED = "PEFT merges the factors into its weight for each pass"


class NotMeasured(NamedTuple):
    """A layer whose gradient is not recorded."""

    name: str
    reason: str


class Recording:
    """Adds up the gradient of one adapted weight from its creation until `stop`.

    Args:
        pair: one for which `why_not_measured` has no reason.

    Attributes:
        pair: the same.
        gradient: `(m, n)`, float32 or, for float64 factors, float64; it is what has been added up so far.
        passes: how many backward passes have been counted.
        lost: whether one could not be, as the model has written over the layer's input since.
    """

    def __init__(self, pair: LoRAPair) -> None:
        self.pair = pair
        self.gradient = torch.zeros(weight_shape(pair), dtype=_buffer_dtype(pair), device=local(pair.A).device)
        self.passes, self.lost = 0, False
        self._hook = pair.layer.register_forward_hook(self._tap, with_kwargs=True)

    def stop(self) -> None:
        """Leave the layer as it was; what has been added up stays."""
        self._hook.remove()

    def _tap(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            return None  # evaluation, or the pass that checkpointing will repeat
        if layer.disable_adapters or layer.merged or self.pair.adapter_name not in layer.active_adapters:
            return None  # the factors have no part in it, as in the pass of a reference model
        x = args[0] if args else kwargs["x"]
        return _Tap.apply(output, x.detach(), self)

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor) -> None:
        """Count one backward pass: inputs `(..., n)`, or token numbers `(...)`, and output gradients `(..., m)`."""
        self.passes += 1
        dy = dy.reshape(-1, dy.shape[-1])
        x = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1).to(dy.device)
        # Tokens by the block, which bounds what casting them takes.
        size = max(SMALLEST_BLOCK, BLOCK_ELEMENTS // sum(self.gradient.shape))
        where: Any = [self.gradient]
        with exact_arithmetic(where):
            for some_x, some_dy in zip(x.split(size), dy.split(size), strict=True):
                some_dy = some_dy.to(self.gradient)
                if x.is_floating_point():
                    self.gradient.addmm_(some_dy.mT, some_x.to(self.gradient))
                else:
                    self.gradient.index_add_(1, some_x, some_dy.mT)
        if not x.is_floating_point() and (padding := padding_row(self.pair)) is not None:
            self.gradient[:, padding] = 0  # no gradient goes there


class _Tap(torch.autograd.Function):
    """The identity on a layer's output. A copy, not a view: whoever comes next may write to it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, recording: Recording) -> Tensor:
        ctx.save_for_backward(x)
        ctx.recording = recording
        return output.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        try:
            (x,) = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            ctx.recording.lost = True  # without us nobody would have needed x
        else:
            ctx.recording.add(x, dy)
        return dy, None, None


def padding_row(pair: LoRAPair) -> int | None:
    """The token of an embedding whose row of the weight gets no gradient."""
    return getattr(pair.layer.get_base_layer(), "padding_idx", None)


def sees_another_gradient(pair: LoRAPair) -> bool:
    """Whether the gradients that autograd gives the factors are not those that the weight's own gives them.

    With active dropout they are of another input, with DoRA of another output, and PEFT leaves the padding row out of
    the gradient of one factor only.
    """
    layer, adapter = pair.layer, pair.adapter_name
    if adapter in layer.lora_embedding_A:
        return layer.use_dora.get(adapter, False) or padding_row(pair) is not None
    dropout = layer.lora_dropout[adapter]
    return layer.use_dora.get(adapter, False) or (dropout.training and getattr(dropout, "p", 0.0) > 0)


def shared_factors(model: nn.Module) -> set[int]:
    """The `id` of each parameter that is a factor of several layers."""
    from peft.tuners.lora import LoraLayer

    held: Counter[int] = Counter()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for holders in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
                held.update(id(getattr(holder, "weight", holder)) for holder in holders.values())
    return {parameter for parameter, count in held.items() if count > 1}


def why_not_measured(pair: LoRAPair, shared: Collection[int] = ()) -> str | None:
    """Why the gradient of a pair's weight is not `dYᵀ X` of its layer, or `None` where it is; see `shared_factors`."""
    if pair.layout != "matrix" or type(pair.layer).__name__ == "ParamWrapper":
        return "it packs several weights or adapts a bare parameter"
    if pair.tied_parameters or id(pair.A) in shared or id(pair.B) in shared:
        return "its factors are shared with another layer"
    if type(pair.layer).__name__ == "MultiheadAttention":
        return _MERGED
    if type(getattr(pair.layer, "lora_variant", {}).get(pair.adapter_name)).__name__.startswith("ALora"):
        return "its adapter acts on some of the tokens only"
    if pair.adapter_name in pair.layer.lora_embedding_A:
        return None
    if not isinstance(pair.layer.lora_A[pair.adapter_name], nn.Linear):
        return "it is a convolution"
    return None


def choose(
    pairs: Sequence[LoRAPair], layers: Sequence[str] | None, max_bytes: int, shared: Collection[int] = ()
) -> ChosenPairs:
    """The pairs to measure, in turns whose buffers fit, see `_in_turns`.

    Args:
        pairs: of the model.
        layers: names, last parts of names, or patterns with `*`; `None` for all.
        max_bytes: what the buffers of one turn may take.
        shared: see `shared_factors`.

    Raises:
        ValueError: a name is no layer's, or nothing is left to measure.
    """
    named = [(unwrapped_name(pair.name), pair) for pair in pairs]
    for pattern in layers or ():
        if not any(_matches(name, pattern) for name, _ in named):
            known = ", ".join(dict.fromkeys(_kind(pair) for pair in pairs))
            raise ValueError(
                f"layers (--lora_pro_gap_layers): {pattern!r} matches no adapted layer. Give names, patterns such as "
                f"'*.layers.0.*', or last parts of names, which are here: {known}."
            )
    merging = [name for name, pair in named if why_not_measured(pair) == _MERGED]
    left_out: list[NotMeasured] = []
    chosen: list[LoRAPair] = []
    for name, pair in named:
        if layers is not None and not any(_matches(name, pattern) for pattern in layers):
            continue
        inside = any(name.startswith(f"{other}.") for other in merging)
        reason = _MERGED if inside else why_not_measured(pair, shared)
        needed = buffer_bytes(pair) if reason is None else 0
        if needed > max_bytes:
            reason = (
                f"its gradient takes {needed:,} bytes, more than max_bytes={max_bytes:,} (--lora_pro_gap_max_bytes)"
            )
        if reason is None:
            chosen.append(pair)
        else:
            left_out.append(NotMeasured(name, reason))
    if not chosen:
        raise ValueError(
            f"no layer is left whose gradient can be measured; {left_out[0].name}: {left_out[0].reason}. Choose other "
            "layers (--lora_pro_gap_layers), or raise max_bytes."
        )
    return ChosenPairs(_in_turns(chosen, max_bytes), left_out)


def _in_turns(pairs: Sequence[LoRAPair], max_bytes: int) -> list[list[LoRAPair]]:
    """As few turns as fit, each a fair sample: every so many layers of a kind, over the depth of the model."""
    by_kind = sorted(range(len(pairs)), key=lambda index: _kind(pairs[index]))  # stable: by depth within a kind
    for count in range(1, len(pairs) + 1):
        turns = [[pairs[index] for index in sorted(by_kind[turn::count])] for turn in range(count)]
        if all(sum(map(buffer_bytes, turn)) <= max_bytes for turn in turns):
            break
    return turns


def _kind(pair: LoRAPair) -> str:
    return unwrapped_name(pair.name).rpartition(".")[2]


class ChosenPairs(NamedTuple):
    """What is measured, turn by turn, and what is not."""

    turns: list[list[LoRAPair]]
    left_out: list[NotMeasured]


def weight_shape(pair: LoRAPair) -> tuple[int, int]:
    """`(m, n)` of the weight that a pair adapts, as `B @ A` has it."""
    m, n = dense_shape(pair)
    return m, n


def buffer_bytes(pair: LoRAPair) -> int:
    """What recording a pair's gradient takes."""
    m, n = weight_shape(pair)
    return m * n * _buffer_dtype(pair).itemsize


def _buffer_dtype(pair: LoRAPair) -> torch.dtype:
    return compute_dtype(pair.A, pair.B)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)
