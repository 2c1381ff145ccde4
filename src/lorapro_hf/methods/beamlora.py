"""How does BeamLoRA weigh the r slots of each pair, and give unimportant ones to important ones?

The model stays plain LoRA: its B is always `B diag(g)` of the paper (arXiv 2502.13604), whose weights g follow from its
gradient. So each kind of layer, merging, evaluation and every save are those of plain LoRA.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from lorapro_hf.factors.pairs import LoRAPair, find_lora_pairs
from lorapro_hf.factors.stacks import Stack, stacked, stacks_of
from lorapro_hf.functional.bases import compute_dtype
from lorapro_hf.functional.rank_gates import (
    averaged,
    gate_gradients,
    gate_weights,
    kept_share,
    replacements,
)
from lorapro_hf.methods.base import LoRAMethod, found_inf, require_same_settings
from lorapro_hf.methods.slots import (
    Moments,
    Slots,
    exact_factors,
    moments_of_slots,
    relative_change,
    remembered,
    replace_slots,
    require_exact,
    require_slots,
)
from lorapro_hf.optim.lora_pro import LoRAProAdamW, step_adamw, unwrap_optimizer

_GATES = "beamlora_gates"  # an attribute of a layer: q by the names of its adapters

logger = logging.getLogger(__name__)


def fold_beamlora(model: nn.Module) -> None:
    """Drop the gates of a model that BeamLoRA has trained, and leave a plain LoRA adapter with the same outputs.

    The adapter holds `B diag(g)` at all times, so no factor changes, and saved adapters need no fold.

    Raises:
        ValueError: the model has no gates.
    """
    layers = [layer for layer in model.modules() if _GATES in vars(layer)]
    if not layers:
        raise ValueError("the model has no gates of BeamLoRA. Train it with callbacks=[BeamLoRACallback(every)] first.")
    for layer in layers:
        delattr(layer, _GATES)


def check_every(every: int, name: str = "every") -> None:
    """Raise a `ValueError` unless a period is an even number of steps."""
    if type(every) is not int or every < 2 or every % 2:
        raise ValueError(
            f"{name}={every!r} must be an even number of steps, 2 or more: copies are of the factors half a period ago."
        )


class BeamLoRACallback(LoRAMethod):
    """BeamLoRA: learns how important each of the r slots of a pair is, and gives the least important to the others.

    ```python
    trainer = LoRAProTrainer(model, args, train_dataset=data, callbacks=[BeamLoRACallback(every=500)])
    ```

    A slot is a column of B and the row of A that it is multiplied with. Its weight `g`, a part of `r softmax(q / τ)`,
    begins at 1. AdamW trains q with the learning rate of A and without weight decay. Every so many steps all weights
    are sorted, and slots beyond a share `p(t)` of their sum become copies of the most important slots of their pair, as
    these and their moments were half a period before; a slot and its copy share their weights. `p` grows from `keep` to
    1, after which no slot is replaced. At most half of the slots of a pair are. This changes the outputs, and a log
    line says by how much.

    B of the model is `B diag(g)` at all times: saved adapters, evaluation and merging are those of plain LoRA. An
    optimizer that is not LoRA-Pro's steps B without g, as published. The modes of LoRA-Pro step `B diag(g)`, since
    the best step of the weight does not depend on how it is split. AdamW and mode efficient copy their moments with a
    slot. Mode full keeps its moments, which are of the weight and not of a slot. Modes factored, spectral and rite
    carry theirs over to the new factors, as in each step.

    Args:
        every: the period in steps, an even number.
        keep: the share of the importance that is kept at first, in (0, 1].
        temperature: τ.
        until: the part of the training in which slots are replaced, in (0, 1].
        max_steps: the steps of a training in a loop of your own; a trainer knows them.

    Raises:
        ValueError: a number out of range. Before the first step: DoRA, a pair of rank 1, factors shared by layers or
            in half precision without master copies, an optimizer whose state cannot be copied by slots, or a training
            too short for any copy.
    """

    name: ClassVar[str] = "beamlora"
    conflicts: ClassVar[Mapping[str, str]] = {
        "lora_sb": "LoRA-SB fixes both factors, so that there is no slot to replace. Leave out one of them.",
        "mgpo": "MGPO would read moments of B without the weights of BeamLoRA. Leave out one of them.",
    }

    setting: str = "every"
    """The name of `every` in messages, which a trainer sets to that of its argument."""

    def __init__(
        self,
        every: int,
        keep: float = 0.95,
        temperature: float = 0.05,
        until: float = 2 / 3,
        *,
        max_steps: int | None = None,
    ) -> None:
        check_every(every)
        for name, value in (("keep", keep), ("until", until)):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value!r} must be above 0 and at most 1.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r} must be a positive number, such as 0.05.")
        self.every, self.keep, self.temperature, self.until = every, keep, temperature, until
        self.max_steps = max_steps
        self._steps = max_steps
        self._stacks: list[Stack] = []
        self._forget()

    def _forget(self) -> None:
        self._gates: dict[LoRAPair, Tensor] = {}
        self._adam: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._then: dict[str, dict[str, Tensor]] = {}  # factors without weights and moments, half a period ago
        self._due: list[tuple[Stack, list[LoRAPair], Tensor]] = []  # what a step moves, with its weights before

    # ---- the calls of a method ----

    def before_training(self, model: nn.Module, batches: Iterable[Any] | None) -> None:
        """Begin with weights of 1; those of a checkpoint come by `load_state_dict`."""
        pairs = find_lora_pairs(model)
        for pair in pairs:
            require_slots(pair)
        self._forget()
        self._stacks = stacks_of(pairs)
        for pair in pairs:
            q = torch.zeros_like(pair.matrix_A(pair.A.detach())[..., 0], dtype=compute_dtype(pair.A, pair.B))
            self._gates[pair] = vars(pair.layer).setdefault(_GATES, {})[pair.adapter_name] = q

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the number of steps from the trainer."""
        if self.max_steps not in (None, state.max_steps):
            raise ValueError(
                f"max_steps={self.max_steps}, but the trainer takes {state.max_steps} steps. Leave max_steps out."
            )
        self._steps = state.max_steps
        self._require_time()
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *more: Any, **kwargs: Any) -> None:
        """Refuse a `LoRAProCallback`, after which the gradients are no longer those of the loss."""
        if hasattr(state, "_lora_pro_callback"):
            raise ValueError(
                "LoRAProCallback rewrites the gradients from which BeamLoRA learns. Drop it, or use LoRAProTrainer "
                "with lora_pro_mode='efficient'."
            )
        super().on_step_begin(args, state, *more, **kwargs)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute the gradients of the gates, and take the weights out of B unless the optimizer is LoRA-Pro's."""
        optimizer = unwrap_optimizer(optimizer)
        self._require_time()
        if not self._adam:
            require_exact(self._gates, optimizer)
        scaler = getattr(optimizer, "grad_scale", None)  # of a GradScaler, which leaves the division to the optimizer
        self._due = []
        for stack in self._stacks:
            reached = {pair: both[1] for pair in stack.pairs if (both := pair.gradients()) is not None}
            if not reached:
                continue
            pairs, first = list(reached), stack.pairs[0]
            q = torch.stack([self._gates[pair] for pair in pairs])
            B = first.matrix_B(stacked([pair.B for pair in pairs], stack.dtype))
            gradient = first.matrix_B(stacked(reached.values(), stack.dtype))
            inner = (B * gradient).sum(-2)
            of_q = gate_gradients(inner if scaler is None else inner / scaler, q, self.temperature)
            for pair, of_pair in zip(pairs, of_q, strict=True):
                self._gates[pair].grad = of_pair
            weights = gate_weights(q, self.temperature)
            self._due.append((stack, pairs, weights))
            if not isinstance(optimizer, LoRAProAdamW):
                _store([p.B for p in pairs], first.factor_B(B / weights[..., None, :]))
                _store(list(reached.values()), first.factor_B(gradient * weights[..., None, :]))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Step the gates, put the weights into B, and replace slots when it is time."""
        optimizer = unwrap_optimizer(optimizer)
        if not self._adam:
            moments_of_slots(self._gates, optimizer)  # refuses an optimizer before anything has changed
        self._step_gates(optimizer)
        is_pro = isinstance(optimizer, LoRAProAdamW)
        with optimizer.rewriting() if isinstance(optimizer, LoRAProAdamW) else contextlib.nullcontext():
            for stack, pairs, before in self._due:
                weights = gate_weights(torch.stack([self._gates[pair] for pair in pairs]), self.temperature)
                factors = [exact_factors(pair, optimizer)[1] for pair in pairs]
                B = stack.pairs[0].matrix_B(torch.stack(factors))
                B = stack.pairs[0].factor_B(B * (weights / before if is_pro else weights)[..., None, :])
                _store(factors, B)
                _round(pairs, factors)
            if self._replaces_at(step):
                self._replace(optimizer, step)
        self._due = []
        if step % self.every == self.every // 2 and self._replaces_at(step + self.every // 2):
            self._remember(optimizer)

    def _step_gates(self, optimizer: torch.optim.Optimizer) -> None:
        groups = {id(p): position for position, group in enumerate(optimizer.param_groups) for p in group["params"]}
        of_group = defaultdict(list)
        for _, pairs, _ in self._due:
            for pair in pairs:
                of_group[groups[id(pair.A)]].append(self._gates[pair])
        left_out = found_inf(optimizer)
        for position, gates in of_group.items():
            defaults = {"betas": (0.9, 0.999), "eps": 1e-8, **optimizer.param_groups[position]}
            skips = torch.zeros((), device=gates[0].device) if left_out is None else left_out
            step_adamw(gates, self._adam, {**defaults, "weight_decay": 0.0}, skips)
        for gate in self._gates.values():
            gate.grad = None

    # ---- replacing slots ----

    def _replaces_at(self, step: int) -> bool:
        assert self._steps is not None
        is_time = step % self.every == 0 and self._steps - step >= self.every
        return is_time and kept_share(step, self.until * self._steps, self.keep) < 1

    def _require_time(self) -> None:
        """Raise a `ValueError` if the number of steps is not known, or leaves no time to replace a slot."""
        if self._steps is None:
            raise ValueError("BeamLoRA needs the number of steps: BeamLoRACallback(every, max_steps=...).")
        longest = min(self._steps // 2, math.ceil(self.until * self._steps) - 1)
        longest -= longest % 2
        if self.every > longest and self.keep < 1:
            remedy = f"set {self.setting} to {longest} or less" if longest > 0 else "train longer, or leave it out"
            raise ValueError(
                f"{self.setting}={self.every} leaves BeamLoRA no time to replace a slot in {self._steps} steps: "
                f"{remedy}."
            )

    def _remember(self, optimizer: torch.optim.Optimizer) -> None:
        moments = moments_of_slots(self._gates, optimizer, saved=True)
        self._then = {}
        for pair, q in self._gates.items():
            self._then[_key(pair)] = remembered(pair, gate_weights(q, self.temperature), moments)

    def _replace(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if not self._then:
            logger.warning(
                "BeamLoRA replaces no slot at step %d: half a period ago the training had not begun, or a GradScaler "
                "left the step out.",
                step,
            )
            return
        assert self._steps is not None
        share = kept_share(step, self.until * self._steps, self.keep)
        before = [stack.read() for stack in self._stacks]
        moments, count, total = moments_of_slots(self._gates, optimizer), 0, 0
        for pair, slots in self._chosen(share, step):
            count += sum(len(each) for each, _ in slots)
            total += self._gates[pair].numel()
            if any(each for each, _ in slots):
                self._replace_slots(pair, slots, exact_factors(pair, optimizer), moments)
        self._then = {}
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            logger.info(
                "BeamLoRA at step %d: %d of %d slots replaced (share kept: %.4f), which changed the updates of the "
                "weights by %.2g of their norm",
                step,
                count,
                total,
                share,
                relative_change(self._stacks, before),
            )

    def _chosen(self, share: float, step: int) -> list[tuple[LoRAPair, Slots]]:
        """The slots to replace in each pair, the same on all ranks."""
        weights = {pair: gate_weights(q, self.temperature).cpu() for pair, q in self._gates.items()}
        pooled = torch.cat([each.flatten().double() for each in weights.values()])
        if dist.is_available() and dist.is_initialized():  # other processors may round otherwise
            pooled = pooled.to(next(iter(self._gates.values())).device)
            dist.broadcast(pooled, 0)
        parts = pooled.cpu().split([each.numel() for each in weights.values()])
        matrices = [part.view(-1, each.shape[-1]) for part, each in zip(parts, weights.values(), strict=True)]
        slots = iter(replacements([row for rows in matrices for row in rows], share, seed=step))
        return [(pair, [next(slots) for _ in rows]) for pair, rows in zip(self._gates, matrices, strict=True)]

    def _replace_slots(self, pair: LoRAPair, slots: Slots, exact: tuple[Tensor, Tensor], moments: Moments) -> None:
        q, then = self._gates[pair], self._then[_key(pair)]
        before = gate_weights(q, self.temperature)
        for row, (replaced, sources) in zip(q.view(-1, q.shape[-1]), slots, strict=True):
            row.copy_(averaged(row, replaced, sources, self.temperature))
        self._adam.pop(q, None)
        weights = gate_weights(q, self.temperature)
        replace_slots(pair, slots, (before, weights), then, exact, moments)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """The gates with their moments, and the factors and moments half a period ago."""
        gates = {_key(pair): {"q": q, **self._adam.get(q, {})} for pair, q in self._gates.items()}
        return {"settings": self._settings(), "gates": gates, "then": self._then}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with saved gates; a `ValueError` names a setting or a pair that does not fit."""
        require_same_settings("BeamLoRA", self._settings(), state["settings"])
        shapes = {_key(pair): q.shape for pair, q in self._gates.items()}
        of_saved = {name: gate["q"].shape for name, gate in state["gates"].items()}
        for name in sorted(shapes.keys() | of_saved.keys()):
            if shapes.get(name) != of_saved.get(name):
                raise ValueError(
                    f"{name}: the checkpoint holds no gate of it, or of another rank. Resume with the model it was "
                    "written for."
                )
        self._adam.clear()
        for pair, q in self._gates.items():
            gate = {name: value.to(q.device, copy=True) for name, value in state["gates"][_key(pair)].items()}
            q.copy_(gate.pop("q"))
            if gate:
                self._adam[q] = gate
        devices = {_key(pair): pair.A.device for pair in self._gates}
        self._then = {
            name: {key: value.to(devices[name], copy=True) for key, value in kept.items()}
            for name, kept in state["then"].items()
        }

    def described(self) -> dict[str, str]:
        """The settings as one line."""
        settings = ", ".join(f"{name}={value:g}" for name, value in self._settings().items())
        return {"BeamLoRA": settings}

    def _settings(self) -> dict[str, float]:
        return {"every": self.every, "keep": self.keep, "temperature": self.temperature, "until": self.until}


def _store(tensors: list[Tensor], values: Tensor) -> None:
    torch._foreach_copy_(tensors, list(values))


def _round(pairs: Sequence[LoRAPair], factors: Sequence[Tensor]) -> None:
    """Store master copies of B rounded in the parameters."""
    for pair, exact in zip(pairs, factors, strict=True):
        if exact is not pair.B:
            pair.B.copy_(exact)


def _key(pair: LoRAPair) -> str:
    return f"{pair.name}.{pair.adapter_name}"
