"""How does LoRA-SB train an r x r matrix between two fixed factors?

The weight is `W + s U R A` (arXiv 2411.19557). U and A hold the first singular vectors of a step against the gradient
of the weight, so that the gradient of R is already the best that is possible in their span. B is computed as `U R`
wherever PEFT reads it, by `torch.nn.utils.parametrize`: every kind of layer, merging and every version of PEFT work as
with plain LoRA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorapro_hf.config import MODES
from lorapro_hf.factors.pairs import LoRAPair, address, find_lora_pairs
from lorapro_hf.factors.recording import holders_of_factors
from lorapro_hf.factors.weight_gradients import LossFunction
from lorapro_hf.methods.base import LoRAMethod
from lorapro_hf.methods.gradient_starts import (
    SAMPLES,
    FirstStep,
    GradientStart,
    first_steps,
    fresh_pairs,
)

FIXED = "lora_sb_fixed"
"""LoRA-SB among the values of `lora_pro_init`."""
PLAIN_ADAMW = "LoRA-SB trains R alone, by AdamW. Set lora_pro=False (--no_lora_pro)."


class CoreOfB(nn.Module):
    """Computes B, in the shape of its parameter, from the core R: `U R`."""

    U: Tensor
    hooks: Sequence[Any] = ()  # of the module that holds B, and of the model

    def __init__(self, pair: LoRAPair, U: Tensor) -> None:
        super().__init__()
        self.shape, self.is_experts = pair.shape_B, pair.layout == "experts"
        self.register_buffer("U", U.to(pair.B.dtype))  # (m, r), or (batch, m, r) where pairs are packed

    def forward(self, R: Tensor) -> Tensor:
        """B of the core `(r, r)` or `(batch, r, r)`."""
        with torch.autocast(R.device.type, enabled=False):
            B = self.U @ R
        return (B.movedim(-3, -1) if self.is_experts else B).reshape(self.shape)

    def core(self, B: Tensor) -> Tensor:
        """The R with which `forward` gives B, or comes closest to it."""
        if self.is_experts:
            B = B.unflatten(-1, (-1, self.U.shape[0])).movedim(-1, -3)
        return self.U.mT @ B.reshape(self.U.shape).to(self.U)


def add_lora_sb(
    model: nn.Module,
    batches: Iterable[Any],
    step_size: float | None = None,
    *,
    loss_fn: LossFunction | None = None,
    max_bytes: int = 2**30,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> None:
    """Fix both factors of all pairs as orthonormal, and put a trainable matrix R between them.

    ```python
    from lorapro_hf import add_lora_sb, fold_lora_sb

    add_lora_sb(model, batches)  # before the optimizer is built
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    ...  # the training
    fold_lora_sb(model)
    model.save_pretrained("adapter")
    ```

    R starts so that the weight has made the step of `init_from_gradients(method="lora_sb")`, at any scaling. A becomes
    a buffer of its layer; biases and `modules_to_save` stay trainable. `state_dict`, and so every saved adapter, holds
    `U R` as B: a plain LoRA adapter. `LoRAProTrainer` resumes exactly, see `LoRASB`.

    Args:
        model: as for `init_from_gradients`, without adapted embeddings and shared factors, and not yet inside
            `DistributedDataParallel`.
        batches: as for `init_from_gradients`.
        step_size: as for `init_from_gradients` with `"lora_sb"`.
        loss_fn: as for `weight_gradients`.
        max_bytes: as for `weight_gradients`.
        group: as for `weight_gradients`.
        progress: show a bar over the layers.

    Raises:
        ValueError: as for `init_from_gradients`, or an embedding is adapted, layers share factors, or the model is
            wrapped. Nothing has been changed then.
        RuntimeError: as for `weight_gradients`.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel would not average the gradients of matrices that are inserted behind it. Call "
            "add_lora_sb(model.module, batches), and wrap the model afterwards."
        )
    _require_fixable(model, fresh_pairs(model))
    _insert_cores(model, first_steps(model, batches, "lora_sb", step_size, loss_fn, max_bytes, group, progress))


def fold_lora_sb(model: nn.Module) -> None:
    """Write `U R` into B of all pairs, and leave a plain, trainable LoRA adapter with the same outputs.

    Raises:
        ValueError: the model has no LoRA-SB layer.
    """
    layers = lora_sb_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA-SB layer. Call add_lora_sb(model, batches) first.")
    for layer, adapter in layers.values():
        module_A, module_B = layer.lora_A[adapter], layer.lora_B[adapter]
        A, B = module_A._buffers.pop("weight"), module_B.weight.detach().clone()
        core: Any = core_of(module_B)
        for hook in core.hooks:
            hook.remove()
        # remove_parametrizations would take the weight from copies of the model as well, which share the class
        module_B.__class__ = parametrize.type_before_parametrizations(module_B)
        del module_B.parametrizations
        module_A.weight, module_B.weight = nn.Parameter(A), nn.Parameter(B)  # R stays as an optimizer knows it


def lora_sb_layers(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """The layers with a core and the adapters that it belongs to, by the layers' names."""
    return {
        name: (layer, adapter)
        for name, layer in model.named_modules()
        if isinstance(holder := getattr(layer, "lora_B", None), nn.ModuleDict)
        for adapter, module in holder.items()
        if core_of(module) is not None
    }


def core_of(module: nn.Module) -> CoreOfB | None:
    """The parametrization of the weight of a `lora_B`; `None` for plain LoRA."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    parametrizations: Any = module.parametrizations
    first = parametrizations["weight"][0]
    return first if isinstance(first, CoreOfB) else None


def _require_fixable(model: nn.Module, pairs: Iterable[LoRAPair]) -> None:
    holders = holders_of_factors(model)
    for pair in pairs:
        if pair.adapter_name in pair.layer.lora_embedding_A:
            reason = "is an embedding"
        elif len(holders[address(pair.A)]) > 1 or pair.tied_parameters:
            reason = "shares its factors with another layer"
        else:
            continue
        raise ValueError(
            f"{pair.name} {reason}, so that LoRA-SB cannot put a matrix between its factors. Leave it out of "
            'target_modules, or call init_from_gradients(model, batches, method="lora_sb").'
        )


def _insert_cores(model: nn.Module, steps: Iterable[FirstStep]) -> None:
    hook = model.register_load_state_dict_pre_hook(_require_loadable)
    for step in steps:
        _insert_core(step, hook)


@torch.no_grad()
def _insert_core(step: FirstStep, hook: Any) -> None:
    pair: LoRAPair = step.pair
    layer: Any = pair.layer
    module_A, module_B = layer.lora_A[pair.adapter_name], layer.lora_B[pair.adapter_name]
    A = pair.factor_A(step.Vt).to(pair.A)
    core = CoreOfB(pair, step.U)
    R = torch.diag_embed(step.S / pair.scaling).to(pair.B.dtype)
    del module_A.weight
    module_A.register_buffer("weight", A)
    module_B.weight = nn.Parameter(R)  # a new one: an optimizer or engine knows the old one by another shape
    parametrize.register_parametrization(module_B, "weight", core, unsafe=True)  # the shape changes
    core.hooks = (
        hook,
        module_B.register_state_dict_post_hook(_save_folded),
        module_B.register_load_state_dict_pre_hook(_load_folded),
    )


def _save_folded(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put B in the place of U and R in a state dict."""
    if core_of(module) is not None:
        for key in [key for key in state if key.startswith(f"{prefix}parametrizations.weight.")]:
            del state[key]
        state[f"{prefix}weight"] = module.weight.detach()


def _require_loadable(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict before any of its values is loaded."""
    for name, (layer, adapter) in lora_sb_layers(model).items():
        _loaded_core(layer.lora_B[adapter], state, f"{prefix}{name}.lora_B.{adapter}.")


def _load_folded(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put R in the place of B in a state dict, while U stays."""
    core, R = core_of(module), _loaded_core(module, state, prefix)
    if core is None or R is None:
        return
    del state[f"{prefix}weight"]
    state[f"{prefix}parametrizations.weight.original"] = R
    state[f"{prefix}parametrizations.weight.0.U"] = core.U


def _loaded_core(module: Any, state: dict[str, Any], prefix: str) -> Tensor | None:
    core, B = core_of(module), state.get(f"{prefix}weight")
    if core is None or B is None:
        return None
    R = core.core(B)
    if bool(core.U.any()) and (core(R) - B.to(R)).norm() > 0.01 * B.norm():
        raise ValueError(
            f"{prefix}weight is no multiple of the fixed factor that the model has: it is of another start or of plain "
            "LoRA. Load it into a plain LoRA model, or after fold_lora_sb(model)."
        )
    return R


class LoRASB(GradientStart):
    """LoRA-SB in a `LoRAProTrainer` without LoRA-Pro: calls `add_lora_sb` with the first batches of a training.

    ```python
    args = LoRAProTrainingArguments("out", lora_pro=False, learning_rate=1e-3, weight_decay=0.01)
    trainer = LoRAProTrainer(model, args, train_dataset=data, callbacks=[LoRASB()])
    ```

    `lora_pro_init="lora_sb_fixed"` in the arguments does the same. Checkpoints hold the factors and R, saved adapters
    are plain LoRA. A trainer adds this method by itself to a model on which `add_lora_sb` was called. Under DDP set
    `ddp_broadcast_buffers=False` unless the model has running statistics: each forward pass would send the fixed
    factors.

    Args:
        samples: as for `GradientStart`.
        step_size: as for `add_lora_sb`.
        loss_fn: as for `weight_gradients`.
    """

    name: ClassVar[str] = "lora_sb"
    has_state: ClassVar[bool] = True
    without_engine: ClassVar[str] = LoRAMethod.without_engine
    conflicts: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("lora_pro=True", *(f"mode={mode}" for mode in MODES)), PLAIN_ADAMW),
        "gradient_start": "LoRA-SB has a start of its own. Leave out lora_pro_init or GradientStart.",
    }

    def __init__(
        self, samples: int = SAMPLES, step_size: float | None = None, loss_fn: LossFunction | None = None
    ) -> None:
        super().__init__("lora_sb", samples, step_size, loss_fn)
        self._layers: dict[str, tuple[Any, str]] = {}

    def before_training(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """Insert R, with its values unless they come from a checkpoint; a model with R stays as it is."""
        self._layers = lora_sb_layers(model)
        if batches is not None and self._layers and not any(own["U"].any() for own in self._tensors().values()):
            fold_lora_sb(model)  # the model was to be resumed, and no checkpoint was loaded
            self._layers = {}
        if not self._layers:
            self._insert(model, batches)
            self._layers = lora_sb_layers(model)
        elif batches is None:  # those of the checkpoint come next, which need not be equal to the last bit
            for own in self._tensors().values():
                own["U"].zero_()

    def _insert(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        if batches is not None:
            self._start(model, batches)
            return
        pairs = find_lora_pairs(model)
        _require_fixable(model, pairs)
        steps = []
        for pair in pairs:
            U, Vt = torch.zeros_like(pair.matrix_B(pair.B.detach())), torch.zeros_like(pair.matrix_A(pair.A.detach()))
            steps.append(FirstStep(pair, U, U.new_zeros((*U.shape[:-2], U.shape[-1])), Vt))
        _insert_cores(model, steps)

    def _write(self, model: nn.Module, batches: list[Any], progress: bool) -> None:
        add_lora_sb(model, batches, self.step_size, loss_fn=self.loss_fn, progress=progress)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a trainer that would call `before_training` after it has built its optimizer."""
        if not self._is_led:
            raise ValueError(
                "a plain Trainer builds its optimizer before LoRA-SB inserts its matrices. Use LoRAProTrainer with "
                "LoRAProTrainingArguments(lora_pro=False), or call add_lora_sb(model, batches) before the trainer."
            )
        super().on_train_begin(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """A, U and R of each layer."""
        return {name: {key: value.detach() for key, value in own.items()} for name, own in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy A, U and R into the layers; a `ValueError` names one that does not fit."""
        own = self._tensors()
        shapes, saved = ({n: {k: v.shape for k, v in each.items()} for n, each in x.items()} for x in (own, state))
        for name in sorted(own.keys() | state.keys()):
            if shapes.get(name) != saved.get(name):
                raise ValueError(
                    f"{name}: the checkpoint holds a LoRA-SB layer of another shape, or none. It is a checkpoint of "
                    "another model or rank; resume with the model it was written for."
                )
        with torch.no_grad():
            for name, tensors in own.items():
                for key, tensor in tensors.items():
                    tensor.copy_(state[name][key])

    def export(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Nothing to do: each state dict of the model holds B in the place of U and R."""
        return contextlib.nullcontext()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, (layer, adapter) in self._layers.items():
            parametrizations = layer.lora_B[adapter].parametrizations["weight"]
            found[f"{name}.{adapter}"] = {
                "A": layer.lora_A[adapter].weight,
                "U": parametrizations[0].U,
                "R": parametrizations.original,
            }
        return found
