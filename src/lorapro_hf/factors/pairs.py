"""What is a LoRA pair, and which pairs does a PEFT model train?

A pair reads factors and scaling from its layer at each access, so that wrappers which exchange parameters (FSDP) and
calls such as `set_scale` take effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorapro_hf.factors.wrappers import require_plain_name
from lorapro_hf.utils.private_names import private

# Variants whose forward is `scaling * B A` in A and B, as the projection assumes: DoRA multiplies by a magnitude that
# it detaches, aLoRA selects tokens.
_SUPPORTED_VARIANTS = ("Dora", "ALora")


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
        if self.A.grad is not None or self.B.grad is not None:
            return True
        return any(factor.grad is not None for factor in self.tied_parameters)

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
        matrix = matrix.movedim(-3, -1) if self.layout == "experts" else matrix
        return matrix.reshape(*stacked, *self.shape_B)

    def _stacked(self, matrix: Tensor) -> torch.Size:
        return matrix.shape[:-2] if self.layout == "matrix" else matrix.shape[:-3]

    def gradients(self, A: Tensor | None = None, B: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """The gradients of both factors, tied layers included; `None` if no backward pass has reached them.

        Args:
            A: a tensor with the gradient of A in its `.grad`; by default the parameter itself.
            B: the same for B.

        Raises:
            RuntimeError: only one factor has a gradient, a gradient is sparse, or tied layers have been parted.
        """
        A, B = self.A if A is None else A, self.B if B is None else B
        gradients = _plain_gradients(self.name, A, B)
        for tied in self._tied:
            transposed = _same_memory(A, tied.B)
            if not (transposed or _same_memory(A, tied.A)):
                raise RuntimeError(
                    f"{self.name} and {tied.name} no longer share their factors in memory: the model was moved or cast "
                    "after the optimizer was built. Build the optimizer afterwards."
                )
            other = _plain_gradients(tied.name, tied.A, tied.B)
            if other is None:
                continue
            if transposed:
                other = (other[1].mT, other[0].mT)
            gradients = other if gradients is None else (gradients[0] + other[0], gradients[1] + other[1])
        return gradients


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


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.numel() > 0 and one.data_ptr() != 0 and one.data_ptr() == other.data_ptr())


def _plain_gradients(name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
    if A.grad is None and B.grad is None:
        return None
    if A.grad is None or B.grad is None:
        raise RuntimeError(
            f"{name}: {'lora_A' if A.grad is None else 'lora_B'} has no gradient but the other factor has one. Was it "
            "frozen after the optimizer was built? Build the optimizer again after changing requires_grad."
        )
    if A.grad.is_sparse or B.grad.is_sparse:
        raise RuntimeError(f"{name}: sparse gradients are not supported; use an embedding with sparse=False.")
    return A.grad, B.grad


def find_lora_pairs(model: nn.Module) -> list[LoRAPair]:
    """The trainable LoRA factor pairs of a model, in the order of its modules.

    Handles every layer that PEFT builds with LoRA factors: linear (GPT-2's `Conv1D` and quantised bases included),
    embedding, convolution, `nn.MultiheadAttention` and `target_parameters` (experts), plain, with rsLoRA or with DoRA.
    Each active and trainable adapter has its own pairs. Layers that share their factors (tied embeddings) make one
    pair.

    Args:
        model: a `PeftModel`, or any module that holds PEFT LoRA layers, also inside a wrapper such as DDP.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no LoRA layer, all are frozen or merged, only one factor of a layer is trainable, a scaling
            is 0, the projection would be wrong for a layer, or PEFT would not save a layer inside a wrapper. The
            message names the layer.
    """
    pairs, refusals = survey_lora_pairs(model)
    if refusals:
        raise refusals[0].error
    return pairs


class Refusal(NamedTuple):
    """Why `find_lora_pairs` refuses a model: the layer and its kind, empty for the model as a whole, and the error."""

    name: str
    kind: str
    error: ValueError


def survey_lora_pairs(model: nn.Module) -> tuple[list[LoRAPair], list[Refusal]]:
    """The pairs that `find_lora_pairs` finds, and all refusals, of which it raises the first."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model itself, got a {type(model).__name__}; pass model, not model.parameters().")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    refusals: list[Refusal] = []

    @contextmanager
    def noting(name: str = "") -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            refusals.append(Refusal(name, type(layers[name]).__name__ if name else "", error))

    trainable: list[LoRAPair] = []
    for name, layer in layers.items():
        for adapter_name in layer.active_adapters:
            with noting(name):
                if _is_trainable(name, layer, adapter_name):
                    trainable.append(pair_of(name, layer, adapter_name))
    with noting():
        if not trainable and not refusals:
            raise ValueError(_no_pair_message(model, layers))
    for pair in trainable:
        with noting(pair.name):
            require_plain_name(pair.name)
            check_scaling(pair)
    with noting():
        _refuse_scaling_beside_the_layers(model)
    pairs: list[LoRAPair] = []
    owner: dict[int, LoRAPair] = {}
    for pair in trainable:
        with noting(pair.name):
            if not _is_tied(pair, owner):
                pairs.append(pair)
    return pairs, refusals


def _is_trainable(name: str, layer: Any, adapter_name: str) -> bool:
    """Whether this adapter of this layer is trained; raises if only one of its factors is."""
    if adapter_name not in layer.lora_A and adapter_name not in layer.lora_embedding_A:
        return False
    if layer.disable_adapters:
        return False
    if adapter_name in layer.lora_A and not hasattr(layer.lora_A[adapter_name], "weight"):  # AdaLoRA
        raise _unsupported(name, layer, f"its lora_A is a {type(layer.lora_A[adapter_name]).__name__}, not a layer")
    trainable = [factor_of(layer, letter, adapter_name).requires_grad for letter in "AB"]
    if any(trainable) and not all(trainable):
        raise ValueError(
            f"{name}: {'lora_B' if trainable[0] else 'lora_A'} of adapter {adapter_name!r} is frozen and the other "
            "factor is not; LoRA-Pro moves both. Make both trainable, or train this model with a plain optimizer."
        )
    if any(trainable) and adapter_name in layer.merged_adapters:
        raise ValueError(
            f"{name}: adapter {adapter_name!r} is merged into the base weight, so its factors get no gradient. "
            "Call model.unmerge_adapter() first."
        )
    return all(trainable)


def pair_of(name: str, layer: Any, adapter_name: str) -> LoRAPair:
    """The pair of an adapter in a layer; raises a `ValueError` if the projection would be wrong for the layer."""
    from peft.tuners.lora.layer import ParamWrapper

    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    if variant is not None and not type(variant).__name__.startswith(_SUPPORTED_VARIANTS):
        raise _unsupported(name, layer, f"its LoRA variant {type(variant).__name__} computes more than scaling * B @ A")
    if adapter_name in layer.lora_embedding_A:
        return LoRAPair(name, layer, adapter_name)
    module_A, module_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        return LoRAPair(name, layer, adapter_name, "experts", layer.num_experts)
    if isinstance(module_A, nn.Linear) and isinstance(module_B, nn.Linear):
        return LoRAPair(name, layer, adapter_name)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if isinstance(module_A, convolutions) and isinstance(module_B, convolutions) and module_A.groups == 1:
        return LoRAPair(name, layer, adapter_name, "matrix" if module_B.groups == 1 else "groups", module_B.groups)
    kinds = f"{type(module_A).__name__} and {type(module_B).__name__}"
    raise _unsupported(name, layer, f"its factors are of the kinds {kinds}")


def _unsupported(name: str, layer: Any, reason: str) -> ValueError:
    return ValueError(
        f"{name} ({type(layer).__name__}): LoRA-Pro does not support this layer, because {reason}. Leave it out of "
        "target_modules (exclude_modules), or train with a plain optimizer."
    )


def _no_pair_message(model: nn.Module, layers: dict[str, Any]) -> str:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if layers:
        adapters = sorted({name for layer in layers.values() for name in (*layer.lora_A, *layer.lora_embedding_A)})
        return (
            f"no active LoRA adapter is trainable (adapters {adapters}, {len(layers)} layers): they are frozen, in "
            "inference mode or disabled. Load with PeftModel.from_pretrained(..., is_trainable=True), leave "
            "inference_mode=False in LoraConfig, choose the adapter to train with model.set_adapter(name), or call "
            "model.enable_adapter_layers()."
        )
    kinds = {type(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    if kinds:
        others = sorted(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
        return f"the model has adapter layers {others} but no LoRA layer; LoRA-Pro needs LoRA factors (LoraConfig)."
    return (
        f"{type(model).__name__} has no LoRA layer; wrap it first: "
        'model = peft.get_peft_model(model, LoraConfig(target_modules="all-linear")).'
    )


def _refuse_scaling_beside_the_layers(model: nn.Module) -> None:
    for module in model.modules():
        weight = getattr(getattr(module, "xlora_config", None), "global_scaling_weight", 1)
        if weight != 1:
            raise ValueError(
                f"X-LoRA's global_scaling_weight is {weight:g}, which scales the adapters behind their own scaling. "
                "Set it to 1 and multiply lora_alpha instead."
            )


def _is_tied(pair: LoRAPair, owner: dict[int, LoRAPair]) -> bool:
    """Whether a pair shares its factors with an earlier one, to which it is then tied.

    `owner` has the first pair with each factor, by address; new addresses are added.
    """
    keys = [address(factor) for factor in (pair.A, pair.B)]
    owners = {id(owner[key]) if key in owner else None for key in keys}
    if owners == {None}:
        owner.update(dict.fromkeys(keys, pair))
        return False
    first = next(owner[key] for key in keys if key in owner)
    if len(owners) > 1 or first.scaling != pair.scaling:
        reason = "only one of the two factors" if len(owners) > 1 else "both factors but with another scaling"
        raise _unsupported(pair.name, pair.layer, f"it shares {reason} with {first.name}")
    if pair.A is not first.A:  # autograd adds up the gradients of one and the same parameter
        first._tied.append(pair)
    return True


def address(factor: Tensor) -> int:
    """A number that tensors share if they share their memory."""
    return factor.data_ptr() or id(factor)  # meta and partitioned tensors have no address


def unwrapped_name(name: str) -> str:
    """The name of a module or parameter without the prefixes of DistributedDataParallel and torch.compile."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))
