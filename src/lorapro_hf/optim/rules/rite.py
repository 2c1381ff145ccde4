"""Mode rite: LoRA-RITE, Adam with matrix second moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Gradient, NativeGradient, Rows, StackGradient
from lorapro_hf.functional.bases import Bases, compute_dtype
from lorapro_hf.functional.rite import RiteGuards, RiteState, carry_rite_moments, rite_step, unmagnified_norms
from lorapro_hf.functional.step_options import StepOptions
from lorapro_hf.optim.rules.base import matrix_shapes
from lorapro_hf.optim.rules.native import native_options, step_natively
from lorapro_hf.optim.rules.stack_state import StackState, StateSpec
from lorapro_hf.optim.rules.tangent import TangentMoment, stepped_coordinates


class Rite(TangentMoment):
    """Each factor steps along its gradient without the magnitude of the other, preconditioned by r x r moments."""

    name = "rite"
    default_update = "linear"
    default_trust_region = None
    takes_lora_rates = True
    takes_clipped_gradients = False
    steps_natively = True

    def check(self) -> None:
        """Refuse `update` and `x_mode` too: the direction of each factor is the rule's own."""
        super().check()
        for setting, value, known in (("update", self.update, "linear"), ("x_mode", self.config.x_mode, "sylvester")):
            if value != known:
                self._refuse(setting, "has one way to move both factors", "Leave it out, or use another mode.")

    @property
    def described_update(self) -> str:
        """The guards that hold back large gradients."""
        config = self.config
        escape = ", escape" if config.rite_escape else ""
        return f"linear (clip={config.rite_clip:g}, skip={config.rite_skip:g}{escape})"

    def state_spec(self, pair: LoRAPair) -> list[StateSpec]:
        """First moments of the size of the factors, and second ones `(r, r)`, which are inverted and so exact."""
        (A, B), dtype = matrix_shapes(pair), compute_dtype(pair.A, pair.B)
        exact = torch.float32 if pair.A.device.type == "mps" else torch.float64
        specs = [StateSpec("exp_avg", "A", A, dtype), StateSpec("exp_avg", "B", B, dtype, "rows")]
        for side in "AB":
            specs.append(StateSpec("exp_avg_sq", side, (*A[:-1], A[-2]), exact))
            if self.config.rite_escape:
                specs.append(StateSpec("escape", side, (*A[:-2], 1), exact))
        return specs

    def shared_norm(self, read: Sequence[Gradient]) -> Tensor | None:
        """The norm of all gradients without the magnitude of the other factor, those left out that are skipped."""
        if not self.config.rite_clip or not read:
            return None
        skip = self.config.rite_skip
        norms = [unmagnified_norms(each.norms(), each.scaling, each.stack.matrix_shape, skip) for each in read]
        return torch.nn.utils.get_total_norm([norm for both in norms for norm in both])

    def step(self, read: StackGradient, state: StackState, options: StepOptions) -> Rows:
        """The step of `rite_step`."""
        config, moments = self.config, self._moments(state)
        factors, bases, coordinates = stepped_coordinates(read, state, options.rtol)
        guards = RiteGuards(config.rite_clip, config.rite_skip, options.shared_norm)
        return Rows(*rite_step(*factors, bases, coordinates, read.scaling, moments, guards, options))

    def follow(self, state: StackState, before: Bases, after: Bases) -> None:
        """Carry all moments to the new bases, as each step does."""
        carry_rite_moments(self._moments(state), before, after)

    def _moments(self, state: StackState) -> RiteState:
        has_escape = self.config.rite_escape
        return RiteState(
            state["A", "exp_avg"],
            state["B", "exp_avg"],
            state["A", "exp_avg_sq"],
            state["B", "exp_avg_sq"],
            state.stack.per_entry(state.steps),
            state["A", "escape"][:, 0] if has_escape else None,
            state["B", "escape"][:, 0] if has_escape else None,
        )

    def native_step(self, read: NativeGradient, state: StackState, options: StepOptions) -> None:
        """Step factors and state in place."""
        config, clipped = self.config, 1.0
        if config.rite_clip:
            assert options.shared_norm is not None
            clipped = min(1.0, config.rite_clip / float(options.shared_norm)) if options.shared_norm else 1.0
        step_natively(self.name, read, state, options, native_options(options, clipped=clipped, skip=config.rite_skip))
