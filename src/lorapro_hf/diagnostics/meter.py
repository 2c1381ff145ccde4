"""How far are the gradients and the step of each adapted layer from those of full fine-tuning, in any training loop?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from lorapro_hf.diagnostics.figures import (
    Factors,
    Moved,
    bring_to_scale_,
    distance,
    intended_step,
    relative_difference,
)
from lorapro_hf.diagnostics.intended import adam_direction
from lorapro_hf.diagnostics.recording import NotMeasured, Recording, choose
from lorapro_hf.gradients import Access, access_to
from lorapro_hf.optimizer import LoRAProAdamW, unwrap_optimizer
from lorapro_hf.pairs import LoRAPair, survey_lora_pairs, unwrapped_name
from lorapro_hf.projection import compute_dtype
from lorapro_hf.sequential import Rates
from lorapro_hf.shares import everyone
from lorapro_hf.stacks import exact_arithmetic
from lorapro_hf.steps import rates_of

MAX_BYTES = 2**30


@dataclass
class LayerGap:
    """What one step showed of one layer; what is `None` has no meaning there.

    Attributes:
        layer: its name.
        adapter: the adapter's.
        grad_norm: `‖g‖`, the norm of the gradient of the adapted weight, on the scale of the factors' gradients.
        residual: how far the factors' gradients are from being those of g, see `bring_to_scale_`.
        lora_gap: `‖g − q‖ / ‖g‖` for the direction `q = s (B g_A + g_B A)` of plain LoRA's own gradients.
        lora_scaled_gap: the same for the multiple of q that is closest to g.
        lora_cosine: between g and q.
        lora_pro_gap: `‖g − g̃‖ / ‖g‖` for LoRA-Pro's equivalent gradient g̃.
        lora_pro_cosine: between g and g̃.
        step_error: `‖realised − intended‖ / ‖intended‖` of the step of the weight.
        step_length: `‖realised‖ / ‖γ u‖` where the optimizer has a direction u of the weight.
        step_share: what the trust region left of the step (of A's part in a sequential one) where it has such a u.
    """

    layer: str
    adapter: str
    grad_norm: float
    residual: float
    lora_gap: float
    lora_scaled_gap: float
    lora_cosine: float
    lora_pro_gap: float
    lora_pro_cosine: float
    step_error: float | None = None
    step_length: float | None = None
    step_share: float | None = None


@dataclass
class _Before:
    """What is kept of a layer while the optimizer steps."""

    pair: LoRAPair
    gap: LayerGap
    factors: tuple[Tensor, Tensor]
    rates: Rates
    u: Tensor | None
    steps: float


class GradientGapMeter:
    """Measures chosen layers in the steps that are asked for; all other steps are left alone.

    ```python
    meter = GradientGapMeter(model, layers=["q_proj"])
    for step, batches in enumerate(data):
        if step % 50 == 0:
            meter.start()
        for batch in batches:
            model(**batch).loss.backward()
        meter.before_step(optimizer)
        optimizer.step()
        for gap in meter.after_step(optimizer):
            print(gap.layer, gap.lora_scaled_gap, gap.lora_pro_gap)
        optimizer.zero_grad()
    ```

    In a distributed run every rank calls every method.

    Args:
        model: with LoRA layers, as it is trained, after wrapping.
        layers: names of layers, last parts of names, or patterns with `*`; by default all.
        max_bytes: what the gradients of the layers measured at a time may take, 4 bytes an element of their weights. If
            those of all do not fit, the layers take turns. Beside them one matrix of the size of a layer's weight is
            needed for a moment, or three where the optimizer has a direction of the weight.

    Attributes:
        turns: the names of the layers measured at a time.
        left_out: the layers that are not measured, and why.
        unseen: those of the last step whose factors have gradients although no backward pass has been seen in them, or
            none with the input that the layer had.

    Raises:
        ValueError: no layer can be measured, a name in `layers` is no layer's, or `max_bytes` is not positive.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None, max_bytes: int = MAX_BYTES) -> None:
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(f"layers={layers!r} must be a list of names or patterns, or None for all layers.")
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes!r} must be positive; it is for the gradients of the chosen layers.")
        pairs, refusals = survey_lora_pairs(model)
        if not pairs:
            raise refusals[0].error
        chosen = choose(pairs, layers, max_bytes)
        self._turns = chosen.turns
        self.turns = [[unwrapped_name(pair.name) for pair in turn] for turn in chosen.turns]
        self.left_out = [NotMeasured(unwrapped_name(r.name), str(r.error)) for r in refusals if r.name]
        self.left_out += chosen.left_out
        self.unseen: list[str] = []
        self._next = 0
        self._recordings: list[Recording] = []
        self._before: list[_Before] = []

    def start(self, turn: int | None = None) -> None:
        """Record the backward passes from now on.

        Args:
            turn: which layers; taken modulo the number of turns. By default those that come next.
        """
        self.stop()
        turn = self._next if turn is None else turn
        self._next = turn + 1
        self._recordings = [Recording(pair) for pair in self._turns[turn % len(self._turns)]]

    def stop(self) -> None:
        """Forget what has been recorded and leave all layers as they were."""
        for recording in self._recordings:
            recording.stop()
        self._recordings, self._before = [], []

    @torch.no_grad()
    def before_step(self, optimizer: Any) -> None:
        """Compare gradients; after the last backward pass of a step, before anybody rewrites the factors' gradients.

        Gradients that a scaler of yours has scaled have to be unscaled before, as for clipping; accelerate's is known.

        Raises:
            RuntimeError: the factors are sharded in a way that is not supported.
        """
        scale = _loss_scale(optimizer)
        optimizer = unwrap_optimizer(optimizer)
        recordings, self._recordings, self._before = self._recordings, [], []
        self.unseen = []
        if not recordings:
            return
        for recording in recordings:
            recording.stop()
        access = access_to([recording.pair for recording in recordings], everyone())
        where: Any = [recordings[0].gradient]
        with exact_arithmetic(where):
            for recording in recordings:
                before = None if recording.lost else _compare(recording, access, optimizer, scale)
                if before is not None:
                    self._before.append(before)
                elif (recording.lost or recording.passes == 0) and recording.pair.A.grad is not None:
                    self.unseen.append(unwrapped_name(recording.pair.name))

    @torch.no_grad()
    def after_step(self, optimizer: Any) -> list[LayerGap]:
        """Compare the step with what was meant, and tell all that was measured; an empty list where nothing was."""
        optimizer = unwrap_optimizer(optimizer)
        measured, self._before = self._before, []
        if not measured:
            return []
        access = access_to([before.pair for before in measured], everyone())
        where: Any = [before.pair.A for before in measured]
        with exact_arithmetic(where):
            steps = [_step_figures(before, access, optimizer) for before in measured]
        # the direction is known to the rank that keeps the moments
        rows = [[*(figure or 0.0 for figure in each), float(each[0] is not None)] for each in steps]
        known = torch.tensor(rows, dtype=torch.float64)
        if (group := everyone()) is not None:
            known = known.to(measured[0].pair.A.device)
            dist.all_reduce(known, group=group)
        for before, (error, length, share, count) in zip(measured, known.tolist(), strict=True):
            if count:
                before.gap.step_error = error / count
                if before.u is not None:
                    before.gap.step_length, before.gap.step_share = length / count, share / count
        return [before.gap for before in measured]


def _compare(recording: Recording, access: Access, optimizer: Any, scale: float) -> _Before | None:
    """The figures of one layer's gradients; `None` where no backward pass has come by or one was not finite."""
    pair, g = recording.pair, recording.gradient
    if (group := everyone()) is not None:
        dist.all_reduce(g, group=group)  # the sum: its scale is found below
    parameters = [pair.A, pair.B]
    (A, B), gradients = access.values(parameters), access.gradients(parameters)
    if gradients[0] is None or gradients[1] is None:
        return None
    A, B, grad_A, grad_B = (x.to(g) for x in (A, B, gradients[0], gradients[1]))
    factors = Factors(A, B, grad_A / scale, grad_B / scale, pair.scaling)
    residual = bring_to_scale_(g, factors)
    if residual is None:
        return None
    config = optimizer.config if isinstance(optimizer, LoRAProAdamW) else None
    adjusted = factors.adjusted_gradient(config.rtol if config else None)
    plain, pro = distance(g, factors.own_gradient()), distance(g, adjusted)
    gap = LayerGap(
        layer=unwrapped_name(pair.name),
        adapter=pair.adapter_name,
        grad_norm=float(torch.linalg.vector_norm(g)),
        residual=residual,
        lora_gap=plain.gap,
        lora_scaled_gap=plain.scaled_gap,
        lora_cosine=plain.cosine,
        lora_pro_gap=pro.gap,
        lora_pro_cosine=pro.cosine,
    )
    groups = _groups(pair, optimizer)
    u = None
    if config is not None and config.mode != "efficient":
        torch.mm(*adjusted, out=g)  # the buffer has served its purpose
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        u = g.copy_(adam_direction(g, A, B, states[0], states[1], groups[0], config))
    return _Before(pair, gap, (A.clone(), B.clone()), _rates(groups, optimizer), u, _steps(pair, optimizer) or 0.0)


def _step_figures(before: _Before, access: Access, optimizer: Any) -> tuple[float | None, float | None, float | None]:
    """The error, relative length and share of one layer's step; `None` where another rank knows it."""
    pair, (A, B) = before.pair, before.factors
    new = access.values([pair.A, pair.B])
    steps = _steps(pair, optimizer)
    left_out = all(map(torch.equal, before.factors, (x.to(A) for x in new))) if steps is None else steps == before.steps
    if left_out:  # something was not finite
        return None, None, None
    moved = Moved.between(before.factors, (new[0], new[1]), pair.scaling, before.rates)
    if before.u is None:
        if isinstance(optimizer, LoRAProAdamW) and optimizer.config.is_sequential:
            return None, None, None  # what AdamW asked of A can no longer be told
        return relative_difference(moved.realised(), moved.first_order()), None, None
    if "exp_avg" not in optimizer.state.get(pair.A, {}):
        return None, None, None
    new_B = new[1].to(compute_dtype(A, B))
    intended, share = intended_step(before.u, A, B, new_B, pair.scaling, before.rates, optimizer.config)
    realised = moved.realised()
    asked = max(float(before.rates.lr_A), float(before.rates.lr_B)) * float(before.u.norm())
    return relative_difference(realised, intended), realised.norm() / asked if asked else None, share


def _steps(pair: LoRAPair, optimizer: Any) -> float | None:
    """How many steps the optimizer has taken with a pair; `None` where it does not say."""
    count = optimizer.state.get(pair.A, {}).get("step")
    return None if count is None else float(count)


def _loss_scale(optimizer: Any) -> float:
    """What the gradients are still multiplied by, which accelerate may undo as late as in the step."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    stage = scaler._per_optimizer_states[id(optimizer.optimizer)]["stage"]
    return 1.0 if stage is OptState.UNSCALED else float(scaler.get_scale())


def _groups(pair: LoRAPair, optimizer: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The param groups of both factors; empty where the optimizer does not show them."""
    found: list[Mapping[str, Any]] = [{}, {}]
    for group in getattr(optimizer, "param_groups", []):
        for position, factor in enumerate((pair.A, pair.B)):
            if any(parameter is factor for parameter in group["params"]):
                found[position] = group
    return found[0], found[1]


def _rates(groups: tuple[Mapping[str, Any], Mapping[str, Any]], optimizer: Any) -> Rates:
    """Learning rates, and what decoupled decay leaves of the factors; other decay counts as part of the step."""
    if isinstance(optimizer, LoRAProAdamW) and optimizer.config.mode != "efficient":
        return rates_of((dict(groups[0]), dict(groups[1])), optimizer.config)
    decoupled = isinstance(optimizer, LoRAProAdamW | torch.optim.AdamW)
    lr_A, lr_B = (group.get("lr", 0.0) for group in groups)
    keep_A, keep_B = (
        1 - group.get("lr", 0.0) * group.get("weight_decay", 0.0) if decoupled else 1.0 for group in groups
    )
    return Rates(lr_A, lr_B, keep_A, keep_B)
