"""How do PEFT's LoRA layers compute weight and factors as one, with fewer products and less memory?"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from lorapro_hf.config import check_choice
from lorapro_hf.functional.fused_linear import Layer, Plan, Precision, fastest_order, fused_linear
from lorapro_hf.functional.lora_orders import Needed, Order, Sizes, cheapest_order, takes_more
from lorapro_hf.methods.base import LoRAMethod

CRITERIA = ("flops", "time")
_KINDS = ("layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt")
_KINDS_OF_PEFT = tuple(f"peft.tuners.lora.{kind}" for kind in _KINDS)
_fastest: dict[tuple[Any, ...], Order | None] = {}

logger = logging.getLogger(__name__)


def fuse_lora_layers(model: nn.Module, criterion: str = "flops") -> int:
    """Replace the forward pass of PEFT's linear LoRA layers by one that keeps X, A and B, but not `X Aᵀ`.

    ```python
    from lorapro_hf import fuse_lora_layers

    fuse_lora_layers(model)
    ```

    The products of a layer are formed in the cheapest order for the sizes of its weight and input and for the gradients
    that are needed (RunLoRA, arXiv 2312.03415). Orders that add `s B A` to the weight are for float32 and float64,
    which keep small changes. Outputs and gradients are PEFT's up to rounding. Modules, parameters, state dict and
    saved adapter do not change; a copied or pickled model stays fused.

    Plain, `Conv1D`, 4-bit and 8-bit bases are fused. Other layers keep PEFT's forward pass: convolutions, embeddings,
    DoRA and other variants, biases of LoRA, and layers whose forward pass another library has replaced. So does a fused
    layer while its adapter is disabled or merged or not the only active one, while dropout is on, and where the modules
    of A and B have hooks, with which ZeRO-3 and FSDP gather their parameters. The log counts both.

    Args:
        model: a model with LoRA layers. Compile it, or share it out by FSDP, afterwards.
        criterion: `"flops"` counts operations, and leaves a float32 layer to PEFT for shapes in which computing `X Aᵀ`
            again takes 3 % more of them; `"time"` measures all orders and PEFT's own forward pass once for each
            shape, in the first forward pass, and takes the fastest. Its choice, and so rounding, may differ between
            runs.

    Returns:
        The number of layers whose forward pass in training is fused.

    Raises:
        ValueError: an unknown criterion, a model without LoRA layers, or `nn.DataParallel`, whose copies of the layers
            would use the parameters of one device.
        TypeError: no model.
    """
    fused, _ = _fuse(model, criterion)
    return fused


def unfuse_lora_layers(model: nn.Module) -> None:
    """Give all fused layers PEFT's forward pass back.

    Raises:
        ValueError: no layer is fused.
    """
    fused = [(layer, key) for layer in model.modules() for key, value in vars(layer).items() if _is_fused(value)]
    if not fused:
        raise ValueError("the model has no fused layer. Call fuse_lora_layers(model) first.")
    for layer, key in fused:
        if key == "forward":
            del layer.forward
        else:  # accelerate keeps a forward pass, around which it has put its own
            setattr(layer, key, partial(type(layer).forward, layer))


class FusedForward:
    """The forward pass of one PEFT layer, to be its attribute `forward`; copied and pickled with the layer.

    Args:
        layer: a linear LoRA layer of PEFT.
        criterion: as for `fuse_lora_layers`.
    """

    def __init__(self, layer: Any, criterion: str) -> None:
        self.layer, self.criterion = layer, criterion

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's forward pass, and PEFT's own where it does more."""
        layer = self.layer
        if args or kwargs or type(x) not in (Tensor, nn.Parameter) or obstacle(layer) is not None:
            return self.of_peft(x, *args, **kwargs)
        (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
        cast = _autocast_dtype(x)
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        weight, bias = _plain_weight(layer.base_layer, x.dtype if cast is None else None)
        base = layer.base_layer(x) if weight is None else None
        of_base = cast or x.dtype
        precision = Precision.of(of_base, cast or A.dtype, of_base if base is None else base.dtype, x.device)
        tensors, scaling = Layer(x, weight, bias, base, A, B), layer.scaling[name]
        order = self._order(tensors, scaling, precision)
        if order is None:
            return self.of_peft(x)
        return fused_linear(tensors, Plan(scaling, precision, order))

    def of_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own forward pass."""
        out: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
        return out

    def _order(self, tensors: Layer, scaling: float, precision: Precision) -> Order | None:
        x, A, B = tensors.x, tensors.A, tensors.B
        sizes = Sizes(x.numel() // x.shape[-1], A.shape[1], B.shape[0], A.shape[0])
        needed = Needed(x.requires_grad, A.requires_grad, B.requires_grad)
        can_merge = precision.can_merge and tensors.weight is not None
        is_measured = self.criterion == "time" and sizes.tokens and any(needed) and torch.is_grad_enabled()
        if not is_measured or torch.compiler.is_compiling():
            order = cheapest_order(sizes, needed, can_merge, precision.has_range)
            # in lower precision PEFT's layer casts more, keeps more and does not merge
            is_plain = can_merge and x.dtype == A.dtype and torch.is_grad_enabled()
            return None if is_plain and takes_more(order, sizes, needed) else order
        # sequences of similar lengths share a measurement
        dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        key = (sizes.tokens.bit_length(), *sizes[1:], *needed, *precision, *dtypes, x.device)
        if key not in _fastest:
            separate = self.of_peft if tensors.weight is not None else None
            _fastest[key] = fastest_order(tensors, scaling, precision, needed, separate)
        return _fastest[key]


class FusedLoRA(LoRAMethod):
    """Calls `fuse_lora_layers` before a training; the layers stay fused.

    ```python
    trainer = LoRAProTrainer(model, args, train_dataset=data, callbacks=[FusedLoRA()])
    ```

    With `LoRAProTrainingArguments(fuse_lora=True)` the trainer makes one itself. It has no state: a checkpoint may be
    resumed with fused layers or without them.

    Args:
        criterion: as for `fuse_lora_layers`. After `"time"`, a resumed training need not be equal to the last bit.

    Raises:
        ValueError: an unknown criterion.
    """

    name: ClassVar[str] = "fused_lora"
    has_state: ClassVar[bool] = False
    without_engine: ClassVar[str] = (
        "Leave out fuse_lora or FusedLoRA, and call fuse_lora_layers(model) before the trainer: that works there."
    )

    def __init__(self, criterion: str = "flops") -> None:
        check_choice("criterion", criterion, CRITERIA)
        self.criterion = criterion

    def described(self) -> dict[str, str]:
        """The method's settings for the model card."""
        return {"forward pass of LoRA layers": f"fused, order of products by {self.criterion}"}

    def before_training(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """Fuse the layers.

        Raises:
            ValueError: there is none that can be fused, or `fuse_lora_layers` refuses the model.
        """
        fused, reasons = _fuse(model, self.criterion)
        if not fused:
            raise ValueError(
                f"no LoRA layer can be fused ({_counted(reasons)}). Leave out fuse_lora or FusedLoRA, or change this: "
                "lora_dropout=0, one active adapter, no variant such as DoRA."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse `nn.DataParallel`, which a trainer builds around the model."""
        if args.n_gpu > 1:
            raise ValueError(_DATA_PARALLEL)
        super().on_train_begin(args, state, control, **kwargs)


_DATA_PARALLEL = (
    "fused layers do not run under nn.DataParallel, which copies them to other devices. Start one process for each GPU "
    "(torchrun, accelerate launch), or leave out fuse_lora."
)


def obstacle(layer: Any) -> str | None:
    """Why a layer of a kind that can be fused needs PEFT's forward pass at present; `None` if it does not."""
    if layer.disable_adapters:
        return "disabled adapters"
    if layer.merged_adapters:
        return "merged adapters"
    of_A, of_B = layer.lora_A._modules, layer.lora_B._modules
    names = [name for name in layer.active_adapters if name in of_A]
    if len(names) != 1:
        return "no or several active adapters"
    (name,) = names
    if name in layer.lora_variant:
        return "variants such as DoRA"
    dropout = layer.lora_dropout._modules[name]
    if not isinstance(dropout, nn.Identity | nn.Dropout) or _is_hooked(dropout):
        return "another module than nn.Dropout before lora_A, or hooks on it"
    if dropout.training and getattr(dropout, "p", 0) > 0:
        return "dropout in training"
    for module in (of_A[name], of_B[name]):
        if type(module).forward is not nn.Linear.forward or module.bias is not None:
            return "factors in other modules than nn.Linear, or with a bias"
        if _is_hooked(module):
            return "hooks on lora_A or lora_B, as of ZeRO-3"
    return None if getattr(layer, "cast_input_dtype_enabled", True) else "casts of inputs turned off"


def _fuse(model: nn.Module, criterion: str) -> tuple[int, Counter[str]]:
    """Fuse what can be; return the number of fused layers and the reasons of the others."""
    check_choice("criterion", criterion, CRITERIA)
    if isinstance(model, nn.DataParallel):
        raise ValueError(_DATA_PARALLEL)
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse_lora_layers takes a model with LoRA layers, not a {type(model).__name__}.")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layer to fuse. Call fuse_lora_layers(model) after "
            'get_peft_model(model, LoraConfig(target_modules="all-linear")).'
        )
    reasons: Counter[str] = Counter()
    for layer in layers:
        reason = _fuse_layer(layer, criterion)
        if reason is not None:
            reasons[reason] += 1
    fused = len(layers) - reasons.total()
    if fused:
        logger.info("Fused %d of %d LoRA layers by %s", fused, len(layers), criterion)
    if reasons:
        told = _counted(reasons)
        logger.log(logging.INFO if fused else logging.WARNING, "Layers that keep PEFT's forward pass: %s", told)
    return fused, reasons


def _fuse_layer(layer: Any, criterion: str) -> str | None:
    """Fuse one layer, or tell why its forward pass in training stays PEFT's."""
    if f"{type(layer).__module__}.{type(layer).__name__}" not in _KINDS_OF_PEFT:
        return f"layers of type {type(layer).__name__}"
    if isinstance(layer.base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "weights that nn.MultiheadAttention reads itself"
    if not _is_fused(vars(layer).get("forward")) and "forward" in vars(layer):
        return "a forward pass that another library has replaced"
    layer.forward = FusedForward(layer, criterion)
    if any(getattr(layer.lora_dropout[name], "p", 0) > 0 for name in layer.active_adapters if name in layer.lora_A):
        return "dropout in training"
    return obstacle(layer)


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in reasons.items())


def _is_fused(forward: Any) -> bool:
    return isinstance(forward, FusedForward)


def _is_hooked(module: Any) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts products with x."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _plain_weight(base: Any, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    """The frozen weight `(m, n)`, of a dtype unless that is `None`, and bias; `None` if the base needs its own forward.

    A weight in 4 or 8 bits does, one that is trained, one that a hook gathers, and one of a tensor subclass.
    """
    is_conv1d = type(base) is Conv1D
    if not (is_conv1d or type(base).forward is nn.Linear.forward) or _is_hooked(base):
        return None, None
    weight: Tensor = base.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.requires_grad or dtype not in (None, weight.dtype):
        return None, None
    return weight.mT if is_conv1d else weight, base.bias
