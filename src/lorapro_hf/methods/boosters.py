"""How does a layer add boosters to its weight, and how are they saved as one adapter?

Boosters are products of frozen factors, stacked as one `A` and one `B`. The layer adds `s B A x` to its output, so that
the base is never written: it may be quantised, shared or read-only, a bf16 base rounds no booster away, and
`disable_adapter` still gives the base alone.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lorapro_hf.checkpoints.adapters import active_adapters, is_peft_model
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.utils.private_names import is_before, private

_PATCHED = ("get_delta_weight", "get_delta_factors")  # methods of PEFT's layers, by which they merge an adapter


class Boosters(nn.Module):
    """The frozen factors of a layer, `layer.boosters`, beside those of the pair that is trained.

    They are in no `state_dict`, of which PEFT saves all tensors of its layers; `as_one_adapter` is for saving.

    Args:
        pair: the pair; the factors have its scaling and its layout.
        A: the factors A of all boosters, stacked along the rank.
        B: the factors B of all boosters, likewise.
    """

    A: Tensor
    B: Tensor

    def __init__(self, pair: LoRAPair, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.pair = pair
        self.beside = adapters_of(pair.layer)  # those that came before the boosters
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.is_folded = False  # while the pair holds these factors, too
        self.hook: Any = None

    def acts(self) -> bool:
        """Whether the layer adds these factors by itself now."""
        layer: Any = self.pair.layer
        is_on = self.pair.adapter_name in layer.active_adapters and not layer.disable_adapters
        return is_on and not layer.merged and not self.is_folded


def boosters_of(layer: nn.Module) -> Boosters | None:
    """The boosters of a layer, `None` if it has none yet."""
    boosters = layer._modules.get("boosters")
    return boosters if isinstance(boosters, Boosters) else None


def adapters_of(layer: Any) -> set[str]:
    """The names of all adapters of a layer."""
    return {*layer.lora_A, *layer.lora_embedding_A}


@torch.no_grad()
def add_booster(pair: LoRAPair) -> None:
    """Add the present factors of a pair to the boosters of its layer."""
    set_boosters(pair, *_with_current(pair))


def set_boosters(pair: LoRAPair, A: Tensor | None, B: Tensor | None) -> None:
    """Give the layer of a pair these boosters in the place of its own; `None` for no boosters."""
    layer, boosters = pair.layer, boosters_of(pair.layer)
    if A is None or B is None:
        if boosters is not None:
            _detach(layer, boosters)
        return
    A, B = A.to(pair.A, copy=True), B.to(pair.B, copy=True)
    if boosters is None:
        _attach(pair, A, B)
    else:
        boosters.A, boosters.B = A, B


def _attach(pair: LoRAPair, A: Tensor, B: Tensor) -> None:
    layer: Any = pair.layer
    layer.boosters = Boosters(pair, A, B)
    for name in _PATCHED:
        if hasattr(type(layer), name):
            # copied and pickled with the layer, whose copy calls that of the copy
            setattr(layer, name, partial({"get_delta_weight": _delta_weight}.get(name, _delta_factors), layer))
    if type(layer).__name__ != "ParamWrapper":  # which computes its weight from these two in each forward pass
        layer.boosters.hook = layer.register_forward_hook(_add_to_output, with_kwargs=True)


def _detach(layer: Any, boosters: Boosters) -> None:
    if boosters.hook is not None:
        boosters.hook.remove()
    for name in _PATCHED:
        layer.__dict__.pop(name, None)
    del layer.boosters


# ---- the layer's forward pass, and PEFT's merging ----


def _add_to_output(layer: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
    boosters = layer.boosters
    if not boosters.acts():
        return None
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "a batch with adapter_names mixes adapters, but the boosters of XGBLoRA act on all of it. Save the model, "
            "and load the adapter by PeftModel.from_pretrained: it is plain LoRA there."
        )
    name, A, B = boosters.pair.adapter_name, boosters.A, boosters.B
    x = args[0] if args else kwargs["x"]
    if name in layer.lora_embedding_A:
        change = F.embedding(x, A.T) @ B.T
        scale = _embedding_scale(layer)
        change = change if scale is None else change * scale.to(change.dtype)
    elif isinstance(layer.lora_A[name], nn.Linear):
        change = F.linear(F.linear(x.to(A.dtype), A), B)
    else:
        change = functional_call(layer.lora_A[name], {"weight": A}, x.to(A.dtype))
        change = functional_call(layer.lora_B[name], {"weight": B}, change)
    return (output + layer.scaling[name] * change).to(output.dtype)


def _delta_weight(layer: Any, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
    compute = type(layer).get_delta_weight
    change: Tensor = compute(layer, adapter, *args, **kwargs)
    for pair in _boosted(layer, adapter):
        with _exchanged(pair, layer.boosters.A, layer.boosters.B):
            change = change + compute(layer, adapter, *args, **kwargs)
    return change


def _delta_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor, float]:
    left, right, scaling = type(layer).get_delta_factors(layer, adapter)
    for pair in _boosted(layer, adapter):
        with _exchanged(pair, layer.boosters.A, layer.boosters.B):
            more_left, more_right, _ = type(layer).get_delta_factors(layer, adapter)
        left, right = torch.cat([left, more_left], -1), torch.cat([right, more_right], -2)
    return left, right, scaling


def _boosted(layer: nn.Module, adapter: str) -> list[LoRAPair]:
    """The pair beside whose factors the boosters of an adapter count."""
    boosters = boosters_of(layer)
    assert boosters is not None
    return [] if boosters.is_folded or boosters.pair.adapter_name != adapter else [boosters.pair]


@contextlib.contextmanager
def _exchanged(pair: LoRAPair, A: Tensor, B: Tensor) -> Iterator[None]:
    """Put parameters with other values, perhaps of another rank, in the place of the factors of a pair."""
    before = pair.A, pair.B
    _put(pair, nn.Parameter(A), nn.Parameter(B))
    try:
        yield
    finally:
        _put(pair, *before)


def _put(pair: LoRAPair, *factors: nn.Parameter) -> None:
    for letter, factor in zip("AB", factors, strict=True):
        if pair.adapter_name in pair.layer.lora_embedding_A:
            getattr(pair.layer, f"lora_embedding_{letter}")[pair.adapter_name] = factor
        else:
            getattr(pair.layer, f"lora_{letter}")[pair.adapter_name].weight = factor


def _with_current(pair: LoRAPair) -> tuple[Tensor, Tensor]:
    """The boosters of a pair's layer and its present factors, stacked in the layout of PEFT's parameters."""
    boosters = boosters_of(pair.layer)
    if boosters is None:
        return pair.A.detach(), pair.B.detach()
    A = torch.cat([pair.matrix_A(boosters.A), pair.matrix_A(pair.A.detach())], -2)
    B = torch.cat([pair.matrix_B(boosters.B), pair.matrix_B(pair.B.detach())], -1)
    B = B.movedim(-3, -1) if pair.layout == "experts" else B
    return A.reshape(-1, *pair.shape_A[1:]), B.reshape(pair.shape_B[0], -1, *pair.shape_B[2:])


# ---- one adapter of all boosters ----


@contextlib.contextmanager
def as_one_adapter(model: nn.Module) -> Iterator[None]:
    """A context in which the adapter holds the boosters and the present factors, with the same outputs.

    Its `LoraConfig` states the rank and alpha of each layer. The parameters of the training are back afterwards.
    """
    held = [boosters for layer in model.modules() if (boosters := boosters_of(layer)) and not boosters.is_folded]
    with contextlib.ExitStack() as undo:
        has_current = any(bool(each.pair.A.any() and each.pair.B.any()) for each in held)
        for boosters in held:
            _fold(boosters, has_current, undo)
        names = {boosters.pair.adapter_name for boosters in held}
        for part in model.modules() if held else ():
            if active_adapters(part):
                _state_ranks(part, names, undo)
        yield


def _fold(boosters: Boosters, has_current: bool, undo: contextlib.ExitStack) -> None:
    """Put all factors of a layer into its adapter; a booster that has just begun has none yet."""
    pair = boosters.pair
    layer, name = pair.layer, pair.adapter_name
    is_begun = has_current and bool(pair.A.any() or pair.B.any())  # the layer may not take part in it
    A, B = _with_current(pair) if is_begun else (boosters.A, boosters.B)
    undo.enter_context(_exchanged(pair, A, B))
    boosters.is_folded = True
    undo.callback(setattr, boosters, "is_folded", False)
    rank = len(A) // (pair.batch if pair.layout == "experts" else 1)
    for settings, value in ((layer.r, rank), (layer.lora_alpha, _plain(layer.scaling[name] * rank))):
        undo.callback(settings.__setitem__, name, settings[name])
        settings[name] = value


def _state_ranks(part: Any, adapters: set[str], undo: contextlib.ExitStack) -> None:
    """State the present ranks of a part's layers in the `LoraConfig` of adapters, those that differ by name."""
    from peft.tuners.lora import LoraLayer

    inner = part.get_base_model() if is_peft_model(part) else part
    layers = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    for adapter in adapters & part.peft_config.keys():
        # PEFT wraps a module with several adapted parameters several times, under one name
        stated = {
            re.sub(r"(\.base_layer)+$", "", name): (layer.r[adapter], layer.scaling[adapter])
            for name, layer in layers.items()
            if adapter in layer.r
        }
        ((rank, scaling), _), *_ = Counter(stated.values()).most_common(1)
        others = {f"^{re.escape(name)}": each for name, each in stated.items() if each != (rank, scaling)}
        config = copy.copy(part.peft_config[adapter])
        config.r, config.lora_alpha, config.use_rslora = rank, _plain(scaling * rank), False
        config.rank_pattern = {name: rank for name, (rank, _) in others.items()}
        config.alpha_pattern = {name: _plain(scaling * rank) for name, (rank, scaling) in others.items()}
        undo.callback(part.peft_config.__setitem__, adapter, part.peft_config[adapter])
        part.peft_config[adapter] = config


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def save_whole(model: nn.Module) -> None:
    """Have `save_pretrained` of each adapted part of a model, and so `push_to_hub`, write all boosters."""
    for part in model.modules():
        if active_adapters(part):
            part.save_pretrained = partial(_save_pretrained, part)  # type: ignore[assignment]


def _save_pretrained(part: Any, *args: Any, **kwargs: Any) -> Any:
    with as_one_adapter(part):
        return type(part).save_pretrained(part, *args, **kwargs)


def _embedding_scale(layer: Any) -> Tensor | None:
    """The factor by which PEFT multiplies the change of an embedding whose base scales its output; from 0.18 on."""
    if is_before("peft", "0.18"):
        return None
    scale: Tensor | None = private(layer, "_get_embed_scale")()
    return scale
