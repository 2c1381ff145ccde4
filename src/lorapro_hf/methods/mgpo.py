"""How does LoRA-MGPO take gradients beside the weight, at a point that the momentum shows?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorapro_hf.config import check_choice
from lorapro_hf.factors.pairs import LoRAPair, find_lora_pairs
from lorapro_hf.factors.perturbing import WithGradients, add_to_weight, replace_factors, require_perturbable
from lorapro_hf.factors.stacks import Stack, exact_arithmetic, stacks_of
from lorapro_hf.factors.wrappers import is_compiled
from lorapro_hf.methods.base import LoRAMethod, found_inf
from lorapro_hf.optim.first_moments import read_moments, require_first_moment
from lorapro_hf.optim.lora_pro import unwrap_optimizer
from lorapro_hf.optim.rules.base import moment_of_product

TARGETS = ("weight", "factors")
RHO, BETA = 0.05, 0.9
LARGEST = 10.0
"""Of the factor by which small gradients lengthen the perturbation of a weight."""
_SB = "LoRA-SB trains one matrix between fixed factors, which has no such moment. Leave out one of the two."
_COMPILED = "compiled code would keep the change of its first step. Leave out torch_compile and model.compile()."
_DATA_PARALLEL = (
    "MGPO changes no copies of layers, which nn.DataParallel makes for other devices. Start one process for each GPU "
    "(torchrun, accelerate launch), or leave out mgpo_rho."
)

_Install = Callable[[WithGradients, ExitStack], None]


class MGPOCallback(LoRAMethod):
    r"""LoRA-MGPO (arXiv 2502.14538): forward and backward passes at a point that lies off along the momentum.

    ```python
    trainer = LoRAProTrainer(model, args, train_dataset=data, callbacks=[MGPOCallback(rho=0.05)])
    ```

    `target="weight"` is the authors' code. With the first moments `m_A`, `m_B` of the optimizer each weight is moved by

        ε = sign · ρ · v / ‖v‖ · min(1/ḡ, 10),    v = s (m_B A + B m_A),

    where ḡ is the moving average of the norm of `s (g_B A + B g_A)`, for each weight. `target="factors"` is the paper:
    A and B of all pairs are moved by `sign · ρ · m / ‖m‖ / ḡ`, with one norm and one ḡ, that of the gradient of all
    factors. No parameter is written to: the change is computed in the forward pass, and a weight may be quantised.
    Gradients are those at the changed point, as the optimizer sees them (after clipping). All micro-batches of a step
    share the change; there is none before the first step, in evaluation, and in passes without gradients.

    In modes `full`, `factored` and `spectral` of LoRA-Pro v is their moment of the weight itself, in `full` its part
    that the factors can follow; A and B then move by its gradients `s Bᵀ v`, `s v Aᵀ`. The moment of mode `rite` is
    preconditioned, and that of `efficient` is of the projected gradients. Experts and groups of a convolution count as
    one weight. Several active adapters each add a change. Under DoRA the change goes into the norm, too. A
    second layer with the same weight but no adapter computes with the weight as it is.

    With `LoRAProTrainingArguments(mgpo_rho=0.05)` the trainer makes one itself. The paper takes ρ = .05 and β = .9 for
    GLUE, and ρ = .01, β = .8 and Adam's β1 = .8 for generation.

    A loop of your own that goes on from a checkpoint calls `watch(optimizer)` once the optimizer has its state.

    Args:
        rho: the length of the change, ρ.
        beta: the decay of ḡ; 0 for the last gradient alone.
        target: `"weight"` or `"factors"`.
        sign: 1 along the momentum, up the loss, or -1 against it, where the optimizer goes. By default that of the
            source: -1 for `"weight"`, 1 for `"factors"`.

    Raises:
        ValueError: a number out of range, or an unknown target. Later: an optimizer without a first moment, a merged
            adapter, a compiled model, or a layer whose forward pass cannot be changed (`nn.MultiheadAttention`, shared
            factors).
    """

    name: ClassVar[str] = "mgpo"
    conflicts: ClassVar[dict[str, str]] = {"lora_sb": _SB, "torch_compile=True": _COMPILED}

    def __init__(self, rho: float = RHO, beta: float = BETA, target: str = "weight", sign: int | None = None) -> None:
        check_choice("target", target, TARGETS)
        check_rho(rho)
        check_beta(beta)
        if sign not in (None, 1, -1):
            raise ValueError(f"sign={sign!r} must be 1, along the momentum, or -1, against it.")
        self.rho, self.beta, self.target = rho, beta, target
        self.sign = sign or (-1 if target == "weight" else 1)
        self._of_weight = target == "weight"
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._stacks: list[Stack] = []
        self._averages: list[Tensor] = []  # of each stack `(pairs,)`, or one of all factors; 0 while it is not known
        self._norms: list[Tensor] = []  # of the gradients of the step in progress, shaped alike
        self._changes: list[_Install] | None = None  # `None` until the next pass makes them

    def before_training(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """Find the pairs, and refuse those whose forward pass cannot be changed."""
        pairs = find_lora_pairs(model)
        require_perturbable(pairs, "MGPO")
        if is_compiled(model):
            raise ValueError(f"MGPO changes the forward pass of a compiled model: {_COMPILED}")
        self._model, self._optimizer, self._changes, self._norms = model, None, None, []
        self._stacks = stacks_of(pairs)
        sizes = [len(stack.pairs) for stack in self._stacks] if self._of_weight else [1]
        self._averages = [
            torch.zeros(size, dtype=stack.dtype, device=stack.device)
            for size, stack in zip(sizes, self._stacks, strict=False)
        ]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow the first moments of this optimizer from now on.

        Raises:
            ValueError: it keeps none, or in a format of 8 bits.
        """
        optimizer = unwrap_optimizer(optimizer)
        if optimizer is not self._optimizer:
            require_first_moment(optimizer)
            self._optimizer, self._changes = optimizer, None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the optimizer, which has its state of a checkpoint by now; refuse `nn.DataParallel`."""
        if args.n_gpu > 1:
            raise ValueError(_DATA_PARALLEL)
        super().on_train_begin(args, state, control, **kwargs)
        self.watch(kwargs["optimizer"])

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Passes with gradients run at the changed point."""
        if self._changes is None:
            self._changes = self._make_changes()
        with ExitStack() as hooks:
            if self._changes and self._model is not None:
                is_on = WithGradients()
                names = [pair.name for stack in self._stacks for pair in stack.pairs]
                hooks.enter_context(is_on.watching(self._model, names))
                for install in self._changes:
                    install(is_on, hooks)
            yield

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradients."""
        self.watch(optimizer)
        norms = []
        with exact_arithmetic(self._stacks):
            for stack in self._stacks:
                gradients = stack.read_gradients(stack.gradients())
                if self._of_weight:
                    products = _grams(*moment_of_product(stack.read(), gradients, stack.scaling()))
                    norms.append(_product_norms(products, stack))
                else:
                    norms.append(_squares(gradients))
        self._norms = norms if self._of_weight else [_total(norms).reshape(1)]

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Average the norms of the gradients, unless the step was left out."""
        skipped = found_inf(optimizer)
        for average, norm in zip(self._averages, self._norms, strict=False):
            norm = norm.to(average)
            new = torch.where(average > 0, torch.lerp(norm, average, self.beta), norm)
            counts = (norm > 0) & norm.isfinite()  # 0 for pairs without a gradient
            if skipped is not None:
                counts = counts & (skipped.to(average.device) == 0)
            average.copy_(torch.where(counts, new, average))
        self._norms, self._changes = [], None

    def state_dict(self) -> dict[str, Any]:
        """The averages of the norms, and whose they are."""
        return {"target": self.target, "pairs": self._names(), "gradient_norms": [x.cpu() for x in self._averages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the averages; a `ValueError` if they are of another target or of other pairs."""
        if state["target"] != self.target:
            raise ValueError(
                f"the checkpoint was trained with MGPO's target={state['target']!r}, not {self.target!r}. Go on with "
                f"MGPOCallback(target={state['target']!r})."
            )
        if state["pairs"] != self._names():
            raise ValueError(
                "the checkpoint holds MGPO's averages of other LoRA layers. Resume with the adapter it was written for."
            )
        for average, saved in zip(self._averages, state["gradient_norms"], strict=True):
            average.copy_(saved)
        self._changes = None

    def described(self) -> dict[str, str]:
        """All settings."""
        return {"LoRA-MGPO": f"rho {self.rho:g}, beta {self.beta:g}, target {self.target}, sign {self.sign:+d}"}

    def _names(self) -> list[str]:
        return [f"{pair.name}.{pair.adapter_name}" for stack in self._stacks for pair in stack.pairs]

    @torch.no_grad()
    def _make_changes(self) -> list[_Install]:
        """What each layer computes until the next step; nothing before the optimizer is known."""
        if self._optimizer is None:
            return []
        with exact_arithmetic(self._stacks):
            moments = read_moments(self._optimizer, self._stacks, self._of_weight)
            return list(self._of_weights(moments) if self._of_weight else self._of_factors(moments))

    def _of_weights(self, moments: list[tuple[Tensor, Tensor]]) -> Iterator[_Install]:
        for stack, average, (left, right) in zip(self._stacks, self._averages, moments, strict=True):
            grams = _grams(left, right)
            norm = _product_norms(grams, stack)
            length = self.rho * torch.where(average > 0, (1 / average).clamp_max(LARGEST), 1)
            factor = torch.where(norm > 0, length / norm, 0).to(grams[0].dtype)
            # Both sides get rows of one length, so that neither overflows in a narrow dtype.
            of_left, of_right = (gram.diagonal(dim1=-2, dim2=-1) for gram in grams)
            squared = stack.per_entry(factor).square()[:, None]
            is_there = (of_left > 0) & (of_right > 0)
            left = self.sign * left * _fourth_root(squared * of_right / of_left, is_there).to(left)
            right = right * _fourth_root(squared * of_left / of_right, is_there).to(right)
            for pair, *both in zip(stack.pairs, stack.per_layer(left), stack.per_layer(right), strict=True):
                yield partial(add_to_weight, pair, *both)

    def _of_factors(self, moments: list[tuple[Tensor, Tensor]]) -> Iterator[_Install]:
        total = _total([_squares(both) for both in moments])
        (average,) = self._averages
        known = torch.where(average > 0, average, 1)[0].to(total)
        factor = torch.where(total > 0, self.sign * self.rho / (total * known), 0)
        for stack, (of_B, of_A) in zip(self._stacks, moments, strict=True):
            scale, (dtype_A, dtype_B) = factor.to(of_A), stack.stored_dtypes
            changes = stack.layers_A(scale * of_A).to(dtype_A), stack.layers_B(scale * of_B).to(dtype_B)
            for pair, *both in zip(stack.pairs, *changes, strict=True):
                yield partial(replace_factors, pair, partial(_moved, pair, *both))


def _moved(pair: LoRAPair, of_A: Tensor, of_B: Tensor) -> tuple[Tensor, Tensor]:
    return pair.A + of_A, pair.B + of_B


def _grams(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both Gram matrices `(K, k, k)`, exact enough for products that cancel."""
    left, right = _exact(left), _exact(right)
    return left @ left.mT, right @ right.mT


def _squares(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([_exact(tensor).square().sum() for tensor in tensors]).sum()


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _product_norms(grams: tuple[Tensor, Tensor], stack: Stack) -> Tensor:
    """The norm of `leftᵀ right` of each pair `(pairs,)`, from its Gram matrices: ‖LᵀR‖² = ⟨LLᵀ, RRᵀ⟩."""
    squares = (grams[0] * grams[1]).sum((-2, -1)).unflatten(0, (-1, stack.packed)).sum(-1)
    return squares.clamp_min(0).sqrt().to(stack.dtype)


def _total(squares: list[Tensor]) -> Tensor:
    """The root of a sum over stacks, which may lie on several devices."""
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _fourth_root(values: Tensor, is_there: Tensor) -> Tensor:
    return torch.where(is_there, values, 0).sqrt().sqrt()[..., None]


def check_rho(rho: float, name: str = "rho") -> None:
    """Raise a `ValueError` unless ρ is a positive number."""
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"{name}={rho!r} must be a positive number; leave MGPO out for no perturbation.")


def check_beta(beta: float, name: str = "beta") -> None:
    """Raise a `ValueError` unless the decay is in `[0, 1)`."""
    if not 0 <= beta < 1:
        raise ValueError(f"{name}={beta!r} must be at least 0 and below 1, such as 0.9.")
