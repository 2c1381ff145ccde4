"""How far are each layer's gradients and step from those of full fine-tuning, in any training loop?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorapro_hf.diagnostics.figures import (
    Factors,
    Fit,
    distance,
    exact_dtype,
    intended_step,
    relative_difference,
    shared_scale,
    steps_between,
)
from lorapro_hf.diagnostics.layers import NotMeasured, choose, sees_another_gradient
from lorapro_hf.diagnostics.optimizers import decayed_rates, groups_of, loss_scale, steps_of
from lorapro_hf.diagnostics.records import LayerGap
from lorapro_hf.diagnostics.settings import GAP_MAX_BYTES, check_gap_layers, check_gap_max_bytes
from lorapro_hf.distributed.access import Access, access_to
from lorapro_hf.distributed.ownership import everyone
from lorapro_hf.factors.pairs import LoRAPair, survey_lora_pairs, unwrapped_name
from lorapro_hf.factors.recording import Recording, holders_of_factors, row_blocks
from lorapro_hf.factors.stacks import exact_arithmetic
from lorapro_hf.functional.bases import compute_dtype
from lorapro_hf.functional.step_options import Rates
from lorapro_hf.optim.lora_pro import LoRAProAdamW, unwrap_optimizer


class _Seen(NamedTuple):
    """A layer's recorded gradient g, divided by its largest element, and how its factors' gradients fit g."""

    recording: Recording
    factors: Factors
    top: float  # the largest element
    scale: float  # to the divided g
    residual: float


@dataclass
class _Before:
    """The state of a layer before the optimizer steps."""

    pair: LoRAPair
    gap: LayerGap
    factors: tuple[Tensor, Tensor]
    rates: Rates
    u: Tensor | None
    steps: float


class GradientGapMeter:
    """Measures chosen layers in the steps between `start` and `after_step`; other steps cost nothing.

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
        max_bytes: the memory for the gradients of the layers measured at a time, 4 bytes for each element of their
            weights (8 for float64 factors). If the gradients of all layers do not fit, the layers take turns; each turn
            is a sample of all kinds and depths. A measured step also copies the factors and keeps each measured layer's
            input until its backward pass.

    Attributes:
        turns: the names of the layers measured at a time.
        left_out: the layers that are not measured, and why.
        unseen: the layers of the last step whose factors have gradients, but in which no backward pass was seen, or
            none with the input that the layer had.

    Raises:
        ValueError: no layer can be measured, a name in `layers` matches no layer, or a setting is of another type.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None, max_bytes: int = GAP_MAX_BYTES) -> None:
        check_gap_layers(layers)
        check_gap_max_bytes(max_bytes)
        pairs, refusals = survey_lora_pairs(model)
        if not pairs:
            raise refusals[0].error
        self._turns, left_out = choose(pairs, layers, max_bytes, holders_of_factors(model))
        self.turns = [[unwrapped_name(pair.name) for pair in turn] for turn in self._turns]
        refused = [NotMeasured(unwrapped_name(r.name), str(r.error)) for r in refusals if r.name]
        self.left_out = [*refused, *left_out]
        self.unseen: list[str] = []
        self._next = 0
        self._recordings: list[Recording] = []
        self._before: list[_Before] = []

    def start(self, turn: int | None = None) -> None:
        """Record the backward passes from now on, of the next turn or of a given one modulo the number of turns."""
        self.stop()
        turn = self._next if turn is None else turn
        self._next = turn + 1
        self._recordings = [Recording(pair).listen(pair) for pair in self._turns[turn % len(self._turns)]]

    def stop(self) -> None:
        """Drop all recordings and leave the layers as they were."""
        for recording in self._recordings:
            recording.stop()
        self._recordings, self._before = [], []

    @torch.no_grad()
    def before_step(self, optimizer: Any) -> None:
        """Compare gradients: after a step's last backward pass, before the factors' gradients are rewritten.

        Unscale gradients before, as for clipping, if you use a gradient scaler; accelerate's is known.

        Raises:
            RuntimeError: the factors are sharded in a way that is not supported.
        """
        scaled_by = loss_scale(optimizer)
        optimizer = unwrap_optimizer(optimizer)
        recordings = self._recordings
        self.stop()
        self.unseen = []
        if not recordings:
            return
        access = access_to([recording.pair for recording in recordings], everyone())
        where: Any = [recordings[0].gradient]
        seen = []
        with exact_arithmetic(where):
            for recording, is_lost in zip(recordings, _lost(recordings), strict=True):
                each = None if is_lost else _seen(recording, access, scaled_by)
                if each is not None:
                    seen.append(each)
                elif (is_lost or recording.passes == 0) and recording.pair.A.grad is not None:
                    self.unseen.append(unwrapped_name(recording.pair.name))
            if seen:
                shared = shared_scale([each.scale / each.top for each in seen], [each.residual for each in seen])
                self._before = [_compare(each, shared, optimizer) for each in seen]

    @torch.no_grad()
    def after_step(self, optimizer: Any) -> list[LayerGap]:
        """Compare the step with the intended one, and return all figures; an empty list in a step without `start`."""
        optimizer = unwrap_optimizer(optimizer)
        measured, self._before = self._before, []
        if not measured:
            return []
        access = access_to([before.pair for before in measured], everyone())
        where: Any = [before.pair.A for before in measured]
        with exact_arithmetic(where):
            steps = [_step_figures(before, access, optimizer) for before in measured]
        # only the rank that keeps a pair's moments knows its direction
        known = torch.tensor(
            [[*(figure or 0.0 for figure in each), float(each[0] is not None)] for each in steps], dtype=torch.float64
        )
        if (group := everyone()) is not None:
            known = known.to(measured[0].pair.A.device)
            dist.all_reduce(known, group=group)
        for before, (error, length, share, count) in zip(measured, known.tolist(), strict=True):
            if count:
                before.gap.step_error = error / count
                if before.u is not None:
                    before.gap.step_length, before.gap.step_share = length / count, share / count
        return [before.gap for before in measured]


def _lost(recordings: Sequence[Recording]) -> list[bool]:
    """Which layers have missed a backward pass on any rank: all ranks have to leave out the same ones."""
    lost = torch.tensor([float(recording.lost) for recording in recordings], device=recordings[0].gradient.device)
    if (group := everyone()) is not None:
        dist.all_reduce(lost, group=group)
    return [count > 0 for count in lost.tolist()]


def _seen(recording: Recording, access: Access, scaled_by: float) -> _Seen | None:
    """One layer's gradient beside its factors'; `None` if no backward pass was seen or a gradient is not finite."""
    pair, g = recording.pair, recording.gradient
    if (group := everyone()) is not None:
        dist.all_reduce(g, group=group)  # the sum; `Fit` finds its scale
    parameters = [pair.A, pair.B]
    (A, B), gradients = access.values(parameters), access.gradients(parameters)
    top = float(torch.linalg.vector_norm(g, ord=math.inf))
    if gradients[0] is None or gradients[1] is None or not (math.isfinite(top) and top > 0):
        return None
    g.div_(top)  # squares of a scaled loss's gradients would not fit into float32
    A, B, grad_A, grad_B = (x.to(g) for x in (A, B, gradients[0], gradients[1]))
    factors = Factors(A, B, grad_A / scaled_by, grad_B / scaled_by, pair.scaling)
    fit = Fit.of(g, factors)
    scale = fit.scale()
    return None if scale is None else _Seen(recording, factors, top, scale, fit.residual(scale))


def _compare(seen: _Seen, shared: float, optimizer: Any) -> _Before:
    """The figures of one layer's gradients; its buffer is overwritten with Adam's direction.

    Where the factors saw another gradient than the weight, the figures are those of g: with the scale of all layers,
    and with the gradients that g gives the factors instead of their own.
    """
    (recording, factors, top, scale, residual), pair = seen, seen.recording.pair
    g, (A, B) = recording.gradient, factors[:2]
    exact = exact_dtype(g)
    if sees_another_gradient(pair):
        fit, scale = Fit.of(g, factors), shared * top
        unit, residual = factors.with_gradients(*fit.expected), fit.residual(scale)
    else:
        unit = factors.with_gradients(factors.grad_A.to(exact) / scale, factors.grad_B.to(exact) / scale)
    rtol = optimizer.config.rtol if isinstance(optimizer, LoRAProAdamW) else None
    own_gap, own_scaled_gap, own_cosine = distance(g, unit.own_gradient())
    pro_gap, _, pro_cosine = distance(g, unit.equivalent_gradient(rtol))
    gap = LayerGap(
        layer=unwrapped_name(pair.name),
        adapter=pair.adapter_name,
        grad_norm=abs(scale) * float(torch.linalg.vector_norm(g)),
        residual=residual,
        lora_gap=own_gap,
        lora_scaled_gap=own_scaled_gap,
        lora_cosine=own_cosine,
        lora_pro_gap=pro_gap,
        lora_pro_cosine=pro_cosine,
    )
    groups = groups_of(pair, optimizer)
    u = None
    if isinstance(optimizer, LoRAProAdamW):
        states = optimizer.state.get(pair.A, {}), optimizer.state.get(pair.B, {})
        gradient = factors.equivalent_gradient(rtol)  # the one that the optimizer has
        direction = optimizer.rule.intended_direction(gradient.rows, A, B, states, groups[0])
        if direction is not None:
            u = g
            for rows in row_blocks(u):
                u[rows] = direction(rows)
    rates, steps = decayed_rates(groups, optimizer), steps_of(pair, optimizer) or 0.0
    return _Before(pair, gap, (A.clone(), B.clone()), rates, u, steps)


def _step_figures(before: _Before, access: Access, optimizer: Any) -> tuple[float | None, float | None, float | None]:
    """The error, relative length and kept fraction of one layer's step; `None` where another rank knows them."""
    pair, (A, B) = before.pair, before.factors
    new_A, new_B = access.values([pair.A, pair.B])
    steps = steps_of(pair, optimizer)
    was_left_out = (
        steps == before.steps
        if steps is not None
        else all(map(torch.equal, before.factors, (new_A.to(A), new_B.to(A))))
    )
    if was_left_out:  # something was not finite
        return None, None, None
    realised, first_order = steps_between(before.factors, (new_A, new_B), pair.scaling, before.rates)
    if before.u is None:
        if isinstance(optimizer, LoRAProAdamW) and optimizer.rule.is_sequential:
            return None, None, None  # the step that AdamW asked of A is not known afterwards
        return relative_difference(realised, first_order), None, None
    if "exp_avg" not in optimizer.state.get(pair.A, {}):
        return None, None, None
    new_B = new_B.to(compute_dtype(A, B))
    longest = optimizer.longest_step_of(pair)
    intended, share = intended_step(before.u, A, B, new_B, pair.scaling, before.rates, optimizer.rule, longest)
    asked = max(float(before.rates.lr_A), float(before.rates.lr_B)) * float(before.u.norm())
    return relative_difference(realised, intended), realised.norm() / asked if asked else None, share
