"""From which factors does a training start if their first product is a step against the gradient of the weight?"""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils.logging import tqdm

from lorapro_hf.config import check_choice
from lorapro_hf.factors.pairs import LoRAPair, find_lora_pairs
from lorapro_hf.factors.stacks import exact_arithmetic
from lorapro_hf.factors.weight_gradients import LossFunction, weight_gradients
from lorapro_hf.functional.truncated_svd import truncated_svd
from lorapro_hf.methods.base import LoRAMethod

STARTS = ("lora_one", "lora_sb")
SPECTRAL_NORM = 0.03
"""Of the first change of each weight, by default.

LoRA-One's start lowers the loss of SmolLM2-135M on word problems from 0.84 to 0.49 at 0.03, and raises it to 2.1 at 0.1
and to 4.6 at 0.3. A tiny transformer far from its task (loss 9) also gains from 0.3.
"""
SAMPLES = 64
_REMEDY = "Start from init_lora_weights=True, with one adapter, or train without a start from gradients."

logger = logging.getLogger(__name__)


class FirstStep(NamedTuple):
    """The best approximation `U @ diag(S) @ Vt` in the rank of a pair to a step of its weight; `B A` has its shape."""

    pair: LoRAPair
    U: Tensor  # (m, r), or (batch, m, r) where pairs are packed
    S: Tensor  # (r)
    Vt: Tensor  # (r, n)


def init_from_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "lora_one",
    step_size: float | None = None,
    *,
    loss_fn: LossFunction | None = None,
    max_bytes: int = 2**30,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> None:
    """Write A and B of all pairs anew, so that `s B A` is a first step against the gradient of the frozen weight.

    ```python
    from lorapro_hf import init_from_gradients

    init_from_gradients(model, batches)  # before the optimizer is built
    ```

    With G the mean gradient over the batches, `s B A` is the best approximation in rank r to `-c G`
    (`method="lora_one"`, arXiv 2502.01235) or to `-c sign(G)` (`"lora_sb"`, arXiv 2411.19557, with both factors
    trained; `add_lora_sb` is the method itself). Both factors have the same singular values. The base weights do not
    change, nor do the random states. All factors are computed before the first one is written.

    The gradients of a layer of size 4096 x 4096 or so are decomposed at a time, see `truncated_svd`. A direction that
    G lacks gets 0 in B and an orthonormal row in A. So do matrices of experts that no batch has reached, with a
    warning.

    Args:
        model: a model with one fresh LoRA adapter, in which A or B of each pair is 0.
        batches: as for `weight_gradients`; 8 to 64 samples are usual. Each rank gives batches of its own, and gets the
            factors of the first rank.
        method: `"lora_one"` or `"lora_sb"`.
        step_size: for `"lora_one"` the spectral norm of `s B A`; for `"lora_sb"` the change c of each element before
            the approximation. By default the spectral norm is 0.03 for both. LoRA-One's own is s / 128, and LoRA-SB's
            code takes `lr / (warmup_ratio * steps)` for c.
        loss_fn: as for `weight_gradients`.
        max_bytes: as for `weight_gradients`.
        group: as for `weight_gradients`.
        progress: show a bar over the layers.

    Raises:
        ValueError: the adapter already changes a weight, a layer has DoRA or another variant or several active
            adapters, a rank is above the size of its weight, a gradient is 0, the step overflows, or
            `weight_gradients` refuses the model or the batches. No factor has been changed then.
        RuntimeError: as for `weight_gradients`, for instance for a gradient that is not finite.
    """
    check_choice("method", method, STARTS)
    steps = first_steps(model, batches, method, step_size, loss_fn, max_bytes, group, progress)
    factors = [(step.pair, *_balanced(step)) for step in steps]
    with torch.no_grad():
        for pair, A, B in factors:
            pair.A.copy_(A)
            pair.B.copy_(B)


def first_steps(
    model: nn.Module,
    batches: Iterable[Any],
    method: str,
    step_size: float | None,
    loss_fn: LossFunction | None = None,
    max_bytes: int = 2**30,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> list[FirstStep]:
    """The step of each pair that `init_from_gradients` writes, the same on all ranks; the arguments are the same."""
    check_step_size(step_size)
    gradients = weight_gradients(model, batches, loss_fn, max_bytes=max_bytes, group=group)
    pairs = fresh_pairs(model)
    bar = tqdm(gradients, desc="gradient-based start", total=len(pairs), unit="pair", disable=not progress)
    steps = [_first_step(pair, gradient, method, step_size) for pair, gradient in bar]
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is not None:  # decompositions of other processors may differ by rounding and by signs
        for tensor in (tensor for step in steps for tensor in step[1:]):
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group)
    return steps


def check_step_size(step_size: float | None, name: str = "step_size") -> None:
    """Raise a `ValueError` unless the step size is `None` or a positive number."""
    if step_size is not None and not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"{name}={step_size!r} must be a positive number, or None for the default.")


def fresh_pairs(model: nn.Module) -> list[LoRAPair]:
    """The pairs of a model, or a `ValueError` that names one for which a start has no meaning."""
    pairs = find_lora_pairs(model)
    adapters = Counter(id(pair.layer) for pair in pairs)
    for pair in pairs:
        rank, size = pair.matrix_A(pair.A).shape[-2], (pair.matrix_B(pair.B).shape[-2], pair.matrix_A(pair.A).shape[-1])
        variant = getattr(pair.layer, "lora_variant", {}).get(pair.adapter_name)
        if variant is not None:
            reason = f"its variant {type(variant).__name__} computes more than the weight plus s B A"
        elif adapters[id(pair.layer)] > 1:
            reason = "several active adapters would all take the same step. Activate one, by model.set_adapter(name)"
        elif rank > min(size):
            reason = f"its rank {rank} is above the smaller side of its weight {size}. Lower r, or set a rank_pattern"
        elif bool(pair.A.any()) and bool(pair.B.any()):
            reason = "its adapter already changes the weight (trained, or another start), which would be lost"
        else:
            continue
        raise ValueError(f"{pair.name} cannot start from gradients: {reason}. {_REMEDY}")
    return pairs


@torch.no_grad()
def _first_step(pair: LoRAPair, gradient: Tensor, method: str, step_size: float | None) -> FirstStep:
    """Decompose a gradient, which is overwritten."""
    unreached = ~gradient.flatten(-2).any(-1)
    if bool(unreached.all()):
        raise ValueError(
            f"{pair.name}: its gradient is 0 in all batches. Give more batches, whose labels are not all ignored and "
            "whose loss depends on the layer, or leave it out of target_modules."
        )
    if bool(unreached.any()):
        logger.warning(
            "%s: no batch has reached %d of its %d matrices, which start as plain LoRA does. More samples reach more.",
            pair.name,
            int(unreached.sum()),
            unreached.numel(),
        )
    if method == "lora_sb":
        gradient.sign_()
    with exact_arithmetic([gradient]):
        U, S, Vt = truncated_svd(gradient, pair.matrix_A(pair.A).shape[-2])
    largest = S[..., :1]
    smallest = largest * max(gradient.shape[-2:]) * torch.finfo(S.dtype).eps
    if method == "lora_one" or step_size is None:
        scale = (step_size or SPECTRAL_NORM) / largest
    else:
        scale = torch.full_like(largest, step_size)
    S = torch.where(smallest < S, S * scale, 0)
    if bool((S / abs(pair.scaling) > torch.finfo(pair.B.dtype).max).any()):
        raise ValueError(
            f"{pair.name}: a step of step_size={step_size!r} overflows in {pair.B.dtype}. Take a smaller one, or an "
            "adapter in float32."
        )
    return FirstStep(pair, -U.contiguous(), S, Vt.contiguous())


def _balanced(step: FirstStep) -> tuple[Tensor, Tensor]:
    """A and B with equal singular values, in the shapes and dtypes of a pair's parameters."""
    pair, scaling = step.pair, step.pair.scaling
    size = (step.S / abs(scaling)).sqrt()
    # Where both factors were 0, none would ever get a gradient.
    largest = torch.where(size[..., :1] > 0, size[..., :1], 1)
    A = torch.where(size > 0, size, largest)[..., None] * step.Vt
    B = math.copysign(1, scaling) * step.U * size[..., None, :]
    return pair.factor_A(A).to(pair.A.dtype), pair.factor_B(B).to(pair.B.dtype)


class GradientStart(LoRAMethod):
    """Calls `init_from_gradients` with the first batches of a training, once for a model.

    ```python
    trainer = LoRAProTrainer(model, args, train_dataset=data, callbacks=[GradientStart("lora_one")])
    ```

    With `LoRAProTrainingArguments(lora_pro_init="lora_one")` the trainer makes one itself. In a `LoRAProTrainer` the
    loss is the trainer's own. A training that goes on from a checkpoint has its factors from there.

    Args:
        method: as for `init_from_gradients`.
        samples: how many samples of all ranks together, rounded up to whole batches.
        step_size: as for `init_from_gradients`.
        loss_fn: as for `weight_gradients`.

    Raises:
        ValueError: an unknown method, or a number that is not positive.
    """

    name: ClassVar[str] = "gradient_start"
    has_state: ClassVar[bool] = False
    without_engine: ClassVar[str] = (
        "Let one process write the start alone (--num_train_epochs 0 --output_dir start), and train its adapter "
        "(--adapter_name_or_path start) without lora_pro_init."
    )
    progress = True
    """Whether the first rank shows a bar over the layers."""

    def __init__(
        self,
        method: str = "lora_one",
        samples: int = SAMPLES,
        step_size: float | None = None,
        loss_fn: LossFunction | None = None,
    ) -> None:
        check_choice("method", method, STARTS)
        check_step_size(step_size)
        check_samples(samples)
        self.method, self.samples, self.step_size, self.loss_fn = method, samples, step_size, loss_fn
        self._model: Callable[[], Any] = lambda: None

    def before_training(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """Write the factors, unless they come from a checkpoint or an earlier training of the same model."""
        is_known, self._model = self._model() is model, weakref.ref(model)
        # the factors of a known model are still fresh where it was to be resumed and no checkpoint was loaded
        if batches is None or (is_known and all(p.A.any() and p.B.any() for p in find_lora_pairs(model))):
            return
        self._start(model, batches)

    def _start(self, model: nn.Module, batches: Iterable[Any]) -> None:
        is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        taken, count = first_batches(batches, self.samples)
        self._write(model, taken, progress=is_first and self.progress)
        if is_first:
            told = f"step size {self.step_size:g}" if self.step_size else f"spectral norm {SPECTRAL_NORM:g}"
            logger.info("Factors start by %s from the gradients of %d samples, %s", self.method, count, told)

    def _write(self, model: nn.Module, batches: list[Any], progress: bool) -> None:
        init_from_gradients(model, batches, self.method, self.step_size, loss_fn=self.loss_fn, progress=progress)


def check_samples(samples: int, name: str = "samples") -> None:
    """Raise a `ValueError` unless the number of samples is a positive whole number."""
    if type(samples) is not int or samples < 1:
        raise ValueError(f"{name}={samples!r} must be a whole number of samples, 1 or more.")


def first_batches(batches: Iterable[Any], samples: int) -> tuple[list[Any], int]:
    """The first batches of this rank, and the number of samples that all ranks have together, at least as asked for."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    taken: list[Any] = []
    count = 0
    for batch in batches:
        taken.append(batch)
        count += (find_batch_size(batch) or 1) * ranks
        if count >= samples:
            break
    return taken, count
