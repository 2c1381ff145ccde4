"""What is one LoRA pair: its factors, shapes, scaling and gradients?

A pair keeps no parameter: it keeps the layer and reads factors and scaling from it at each access, so that wrappers
which exchange parameters (FSDP) and calls such as `set_scale` or `scale_layer` take effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorapro_hf.utils.private_names import private


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """One trainable pair of LoRA factors: the adapted weight moves by `scaling * B @ A`.

    Args:
        name: dotted name of the layer in the model.
        layer: the PEFT layer that holds the factors.
        adapter_name: the adapter they belong to.
        layout: how the parameters hold the matrices: `"matrix"`, `"groups"` (grouped convolution) or `"experts"`.
        batch: number of independent factor pairs packed into the two parameters (experts, convolution groups), else 1.
    """

    name: str
    layer: Any = field(repr=False)
    adapter_name: str
    layout: str = "matrix"
    batch: int = 1
    _tied: list[LoRAPair] = field(default_factory=list, repr=False)

    @property
    def A(self) -> nn.Parameter:
        """The parameter of `lora_A` (or `lora_embedding_A`), as it is in the model now."""
        return factor_of(self.layer, "A", self.adapter_name)

    @property
    def B(self) -> nn.Parameter:
        """The parameter of `lora_B` (or `lora_embedding_B`), as it is in the model now."""
        return factor_of(self.layer, "B", self.adapter_name)

    @property
    def shape_A(self) -> torch.Size:
        """The shape of the whole A, also where this rank holds only part of it."""
        return _whole_shape(self.A)

    @property
    def shape_B(self) -> torch.Size:
        """The shape of the whole B, also where this rank holds only part of it."""
        return _whole_shape(self.B)

    @property
    def scaling(self) -> float:
        """The present factor in front of `B @ A`."""
        return float(self.layer.scaling[self.adapter_name])

    @property
    def tied_parameters(self) -> list[nn.Parameter]:
        """Parameters of other layers that share the memory of these factors (tied embeddings)."""
        return [parameter for pair in self._tied for parameter in (pair.A, pair.B)]

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass has reached any of the factors."""
        return any(factor.grad is not None for factor in (self.A, self.B, *self.tied_parameters))

    def matrix_A(self, tensor: Tensor) -> Tensor:
        """A tensor shaped `(..., *A.shape)` as `(..., r, n)`, or `(..., batch, r, n)` where pairs are packed."""
        matrix = tensor.flatten(tensor.dim() - len(self.shape_A) + 1)
        return matrix if self.layout == "matrix" else matrix.unflatten(-2, (self.batch, -1))

    def matrix_B(self, tensor: Tensor) -> Tensor:
        """A tensor shaped `(..., *B.shape)` as `(..., m, r)`, or `(..., batch, m, r)` where pairs are packed."""
        if self.layout == "experts":  # PEFT packs the experts innermost here and outermost in A
            return tensor.unflatten(-1, (-1, self.batch)).movedim(-1, -3)
        matrix = tensor.flatten(tensor.dim() - len(self.shape_B) + 1)
        return matrix if self.layout == "matrix" else matrix.unflatten(-2, (self.batch, -1))

    def factor_A(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix_A`."""
        return matrix.reshape(*self._stacked(matrix), *self.shape_A)

    def factor_B(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix_B`."""
        stacked = self._stacked(matrix)
        if self.layout == "experts":
            matrix = matrix.movedim(-3, -1)
        return matrix.reshape(*stacked, *self.shape_B)

    def _stacked(self, matrix: Tensor) -> torch.Size:
        return matrix.shape[:-2] if self.layout == "matrix" else matrix.shape[:-3]

    def gradients(self) -> tuple[Tensor, Tensor] | None:
        """The gradients of both factors with those of tied layers added, `None` if no backward pass has reached them.

        Raises:
            RuntimeError: only one of the factors has a gradient, a gradient is sparse, or tied layers have
                been parted.
        """
        return self.gradients_of(self.A, self.B)

    def gradients_of(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
        """As `gradients`, for factors that the caller has already."""
        gradients = _plain_gradients(self.name, A, B)
        for tied in self._tied:
            transposed = same_memory(A, tied.B)
            if not (transposed or same_memory(A, tied.A)):
                raise RuntimeError(
                    f"{self.name} and {tied.name} shared their factors in memory and do so no longer; the model was "
                    "moved or cast since. Build the optimizer after that."
                )
            other = _plain_gradients(tied.name, tied.A, tied.B)
            if other is None:
                continue
            if transposed:
                other = (other[1].mT, other[0].mT)
            gradients = other if gradients is None else (gradients[0] + other[0], gradients[1] + other[1])
        return gradients


def unwrapped_name(name: str) -> str:
    """The name of a module or parameter without the prefixes of DistributedDataParallel and torch.compile."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def check_scaling(pair: LoRAPair) -> float:
    """The scaling of a pair; raises a `ValueError` if it is 0 or not finite."""
    scaling = pair.scaling
    if scaling == 0 or not math.isfinite(scaling):
        raise ValueError(
            f"{pair.name}: the scaling of adapter {pair.adapter_name!r} is {scaling:g}, with which its factors cannot "
            "move the weight. Set lora_alpha (or alpha_pattern, set_scale) to a finite value other than 0."
        )
    return scaling


def factor_of(layer: Any, letter: str, adapter_name: str) -> nn.Parameter:
    """The parameter of `lora_A` or `lora_B` (or of `lora_embedding_A`, `_B`) of an adapter in a layer."""
    # Avoids nn.Module's attribute search, which is slow for hundreds of layers at every step.
    modules = layer._modules
    holder = modules[f"lora_{letter}"]._modules.get(adapter_name)
    if holder is None:
        embedded = modules[f"lora_embedding_{letter}"]
        if adapter_name not in embedded:
            raise RuntimeError(
                f"the adapter {adapter_name!r} is no longer in the model: it was deleted after the optimizer had been "
                "built. Delete it after the training; to train another adapter, build a new optimizer (in a trainer: "
                "trainer.optimizer = None before train())."
            )
        return embedded[adapter_name]
    weight = holder._parameters.get("weight")
    return holder.weight if weight is None else weight


def _whole_shape(parameter: Tensor) -> torch.Size:
    # A DTensor has its whole shape; a parameter that ZeRO 3 has partitioned is empty and has it in ds_shape.
    return torch.Size(parameter.shape if parameter.numel() else private(parameter, "ds_shape"))


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin at the same address."""
    return one is other or (one.numel() > 0 and one.data_ptr() != 0 and one.data_ptr() == other.data_ptr())


def _plain_gradients(name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
    grad_A, grad_B = A.grad, B.grad
    if grad_A is None and grad_B is None:
        return None
    if grad_A is None or grad_B is None:
        missing = "lora_A" if grad_A is None else "lora_B"
        raise RuntimeError(
            f"{name}: {missing} has no gradient but the other factor has one. Was it frozen after the optimizer "
            "was built? Build the optimizer again after changing requires_grad."
        )
    if grad_A.is_sparse or grad_B.is_sparse:
        raise RuntimeError(f"{name}: sparse gradients are not supported; use an embedding with sparse=False.")
    return grad_A, grad_B
