"""Which adapted weights can be perturbed, how long are their rows, and what are their tiles with noise?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorapro_hf.factors.pairs import LoRAPair, find_lora_pairs, pair_of
from lorapro_hf.factors.perturbing import WithGradients
from lorapro_hf.functional.bases import compute_dtype
from lorapro_hf.functional.row_norms import squared_row_norms
from lorapro_hf.kernels.noise import NoiseKey, with_noise

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN_KINDS = (nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS)
_QUANTISED = ("Params4bit", "Int8Params")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TILE_ELEMENTS = {"cpu": 2**20}  # that exist of the noise of a weight at a time; elsewhere each tile takes launches
_TILE_ELSEWHERE = 2**24
_LEAVE_OUT = "Leave it out of target_modules (exclude_modules), or train without the noise."


class Noise(NamedTuple):
    """The noise of one weight for one window, of which nothing but its scale is held.

    Args:
        key: names the numbers.
        scale: the standard deviation of each row `(batch, rows, 1)` or column `(batch, 1, columns)` of the weight.
        shape: `(batch, rows, columns)` of the weight as it is stored.
    """

    key: NoiseKey
    scale: Tensor
    shape: tuple[int, int, int]

    def tiles(self, weight: Tensor | None, entry: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of a weight `(batch, rows, columns)` plus noise; without a weight those of the noise."""
        _, rows, columns = self.shape
        for block in _blocks(rows, columns, self.scale.device):
            scale = self.scale[entry] if self.scale.shape[-2] == 1 else self.scale[entry, block]
            numbers = range(entry * rows + block.start, entry * rows + block.stop)
            yield block, with_noise(None if weight is None else weight[entry, block], scale, self.key, numbers, columns)

    def rows(self, numbers: Tensor) -> Tensor:
        """The noise of some rows of a weight that is scaled by columns, `(len(numbers), columns)`."""
        return with_noise(None, self.scale[0], self.key, numbers, self.shape[-1])


class NoisyLayer:
    """A LoRA layer whose weight `W' = W + Σ s B A` is perturbed.

    Args:
        index: the number of the layer in the model, which names its noise.
        pairs: one for each active adapter.
        trained: the names of the adapters that are trained.

    Attributes:
        is_quantised: whether the weight has to be dequantised to be read.
        is_turned: whether the weight is stored as the transpose of `B A`.
        shape: `(batch, rows, columns)` of the stored weight.
    """

    def __init__(self, index: int, pairs: list[LoRAPair], trained: set[str]) -> None:
        self.index, self.pairs, self.trained = index, pairs, trained
        self.layer: Any = pairs[0].layer
        self.base: Any = self.layer.get_base_layer()
        self.is_parameter = type(self.layer).__name__ == "ParamWrapper"
        self.is_quantised = not self.is_parameter and type(self.base.weight).__name__ in _QUANTISED
        batch = pairs[0].batch
        m, n = pairs[0].matrix_B(pairs[0].B).shape[-2], pairs[0].matrix_A(pairs[0].A).shape[-1]
        if self.is_parameter:
            is_swapped = getattr(self.layer, "_did_swap_in_out_features", False)
            self.is_turned = self._parameter().dim() == 3 and not is_swapped
        else:
            self.is_turned = isinstance(self.base, nn.Embedding | Conv1D)
        self.shape = (batch, n, m) if self.is_turned else (batch, m, n)
        self._squares: Tensor | None = None

    @property
    def name(self) -> str:
        """The layer's name in the model."""
        return self.pairs[0].name

    def _parameter(self) -> Tensor:
        parameter: Tensor = getattr(self.base, self.layer.parameter_name if self.is_parameter else "weight")
        return parameter

    def weight(self) -> Tensor:
        """The stored weight `(batch, rows, columns)`; a quantised one is dequantised as a whole."""
        if self.is_quantised:
            from peft.utils.integrations import dequantize_bnb_weight

            state = getattr(self.base, "state", None)  # of 8-bit layers
            return dequantize_bnb_weight(self.base.weight, state).detach().reshape(self.shape)
        return self._parameter().detach().reshape(self.shape)

    @torch.no_grad()
    def squared_norms(self) -> Tensor:
        """The squared norm of each row of W', `(batch, m)` in float32, or float64 for float64 weights."""
        weight = self.weight()
        dtype = compute_dtype(weight, self.pairs[0].A)
        A = torch.cat([pair.matrix_A(pair.A.detach()).to(dtype) for pair in self.pairs], dim=-2)
        B = torch.cat([pair.scaling * pair.matrix_B(pair.B.detach()).to(dtype) for pair in self.pairs], dim=-1)
        A, B = A.view(self.shape[0], *A.shape[-2:]), B.view(self.shape[0], *B.shape[-2:])
        with torch.autocast(A.device.type, enabled=False):
            products, squares = torch.zeros_like(B), B.new_zeros(B.shape[:-1])
            for entry in range(self.shape[0]):
                for block in _blocks(*self.shape[1:], weight.device):
                    tile = weight[entry, block].to(dtype)
                    if self.is_turned:
                        products[entry].addmm_(tile.mT, A[entry, :, block].mT)
                    else:
                        torch.mm(tile, A[entry].mT, out=products[entry, block])
                    if self._squares is None and self.is_turned:
                        squares[entry] += tile.square().sum(0)
                    elif self._squares is None:
                        squares[entry, block] = torch.linalg.vecdot(tile, tile)
            if self._squares is None:
                self._squares = squares
            return squared_row_norms(B, A, products, self._squares)

    def noise(self, key: NoiseKey, deviations: Tensor) -> Noise:
        """The noise with a standard deviation for each row of W', `(batch, m)`."""
        return Noise(key, deviations[:, None, :] if self.is_turned else deviations[..., None], self.shape)

    @property
    def in_features(self) -> int:
        """The n of `B A`."""
        return self.shape[1] if self.is_turned else self.shape[2]

    @property
    def rows_shape(self) -> tuple[int, int]:
        """`(batch, m)` of `B A`."""
        return self.shape[0], self.shape[2] if self.is_turned else self.shape[1]

    def takes_part(self, is_on: WithGradients | None) -> bool:
        """Whether the present forward pass is one of a trained adapter and, given `is_on`, one of a training."""
        layer = self.layer
        if layer.disable_adapters or layer.merged or (is_on is not None and not (layer.training and is_on)):
            return False
        return any(name in self.trained for name in layer.active_adapters)


def _blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    step = max(1, TILE_ELEMENTS.get(device.type, _TILE_ELSEWHERE) // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def noisy_layers(model: nn.Module) -> list[NoisyLayer]:
    """The layers with trained pairs, in the order of the model's modules.

    Raises:
        ValueError: `find_lora_pairs` refuses the model, or a layer's weight cannot be perturbed. The message names the
            layer and the remedy.
    """
    from peft.tuners.lora import LoraLayer

    find_lora_pairs(model)
    found: list[NoisyLayer] = []
    for name, module in model.named_modules():
        layer: Any = module
        if not isinstance(layer, LoraLayer) or layer.disable_adapters:
            continue
        active = [each for each in layer.active_adapters if each in layer.lora_A or each in layer.lora_embedding_A]
        pairs = [pair_of(name, layer, each) for each in active]
        trained = {pair.adapter_name for pair in pairs if pair.A.requires_grad}
        if not trained:
            continue
        if (reason := _refusal(layer, pairs)) is not None:
            raise ValueError(f"the weight of {name} cannot be perturbed: {reason}")
        found.append(NoisyLayer(len(found), pairs, trained))
    return found


def has_dora(pair: LoRAPair) -> bool:
    """Whether the weight of a pair is scaled to a magnitude for each row."""
    return type(getattr(pair.layer, "lora_variant", {}).get(pair.adapter_name)).__name__.startswith("Dora")


def _refusal(layer: Any, pairs: list[LoRAPair]) -> str | None:
    """Why a layer cannot be perturbed, with the remedy."""
    base, kind = layer.get_base_layer(), type(layer).__name__
    variants = [getattr(layer, "lora_variant", {}).get(pair.adapter_name) for pair in pairs]
    if layer.merged:
        return "an adapter is merged into it. Call model.unmerge_adapter() first."
    if kind == "MultiheadAttention":
        return f"PEFT merges the factors into it for each pass. {_LEAVE_OUT}"
    if any(pair.layout == "groups" for pair in pairs):
        return f"its factors connect groups that the convolution does not. {_LEAVE_OUT}"
    for pair, variant in zip(pairs, variants, strict=True):
        if variant is not None and not has_dora(pair):
            return f"{type(variant).__name__} changes it for some tokens only. {_LEAVE_OUT}"
        if variant is not None and len(pairs) > 1:
            return "DoRA scales it once for each active adapter. Activate one, by model.set_adapter(name)."
        if variant is not None and not isinstance(_dropout_of(pair), nn.Identity):
            return "with dropout DoRA reads the weight a second time. Set lora_dropout=0."
    parameter = getattr(base, layer.parameter_name if kind == "ParamWrapper" else "weight", None)
    is_quantised = isinstance(base, nn.Linear) and type(parameter).__name__ in _QUANTISED
    if kind != "ParamWrapper" and not is_quantised:
        plain = next((each for each in _PLAIN_KINDS if isinstance(base, each)), None)
        if plain is None or type(base).forward is not plain.forward:
            return f"the forward pass of {type(base).__name__} is not known. {_LEAVE_OUT}"
    if parameter is None or not (is_quantised or parameter.dtype in _FLOATS):
        return f"it is quantised in a format that cannot be read. Load it in 4 or 8 bits of bitsandbytes. {_LEAVE_OUT}"
    if parameter.requires_grad:
        return "it is trained itself. Freeze it, or train without the noise."
    if parameter.device.type == "meta":
        return "it is offloaded. Load the model without offloading, or train without the noise."
    return None


def _dropout_of(pair: LoRAPair) -> nn.Module:
    layer: Any = pair.layer
    if pair.adapter_name in layer.lora_embedding_A:
        return nn.Identity()
    dropout: nn.Module = layer.lora_dropout[pair.adapter_name]
    return dropout
