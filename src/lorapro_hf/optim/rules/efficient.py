"""Mode efficient: AdamW on the factors, along their projected gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Gradient, NativeGradient, Rows, Stack, StackGradient
from lorapro_hf.functional.bases import compute_dtype, row_basis
from lorapro_hf.functional.factor_steps import change_through, select
from lorapro_hf.functional.step_options import Group, Rates, StepOptions
from lorapro_hf.kernels.dense import fused_adamw
from lorapro_hf.optim.rules.base import StackState, StateSpec, UpdateRule, moment_of_product
from lorapro_hf.optim.rules.native import native_options, step_natively


class Efficient(UpdateRule):
    """AdamW with moments of the factors; `update="sequential"` has its change of A act through the new B."""

    name = "efficient"
    default_update = "linear"
    has_trust_region = False
    takes_lora_rates = True
    projects_gradients = True
    keeps_state_of_slots = True
    steps_natively = True

    def state_spec(self, pair: LoRAPair) -> list[StateSpec]:
        """Both moments of each factor."""
        dtype = compute_dtype(pair.A, pair.B)
        return [
            StateSpec(name, side, tuple(shape), dtype, "parameter")
            for side, shape in (("A", pair.shape_A), ("B", pair.shape_B))
            for name in ("exp_avg", "exp_avg_sq")
        ]

    def weight_moment(self, stack: Stack, state: StackState) -> tuple[Tensor, Tensor]:
        """The movement of B A along the moments of the factors."""
        return moment_of_product(stack.read(), self.factor_moment(stack, state), stack.scaling())

    def factor_moment(self, stack: Stack, state: StackState) -> Rows:
        """The moments of the projected gradients."""
        return stack.rows(state["A", "exp_avg"], state["B", "exp_avg"])

    def check_groups(self, name: str, of_A: Group, of_B: Group) -> None:
        """Nothing: each factor has moments of its own."""

    @property
    def described_update(self) -> str:
        """The update and the choice of X, which matters to both."""
        return f"{self.update} ({self.config.x_mode})"

    def rates(self, groups: tuple[Group, Group]) -> Rates:
        """Learning rates and AdamW's decoupled decay of each factor."""
        keep_A, keep_B = (1 - group["lr"] * group["weight_decay"] for group in groups)
        return Rates(groups[0]["lr"], groups[1]["lr"], keep_A, keep_B)

    def more_norms(self, read: Sequence[Gradient], norm: Tensor) -> list[Tensor]:
        """Bounds on the projected gradients; infinite where they may overflow."""
        stretches = [(each.largest_inverses() / each.scaling.abs()).amax() for each in read]
        return [stretch * norm.to(stretch) for stretch in stretches]

    def native_step(self, read: NativeGradient, state: StackState, options: StepOptions) -> None:
        """AdamW in place along the projected gradients."""
        step_natively(self.name, read, state, options, *(native_options(options, group) for group in options.groups))

    def step(self, read: StackGradient, state: StackState, options: StepOptions) -> Rows:
        """AdamW in place, in the dtype of the moments and the layout of the parameters."""
        stack, masters = read.stack, state.masters
        h = read.projected_gradients_(options.x_mode)
        own = stack.layers_A(read.factors.A), stack.layers_B(read.factors.B)
        after = [x.contiguous() if master is None else master for x, master in zip(own, masters, strict=True)]
        before = stack.rows(*(values.clone() for values in after)) if options.sequential else None
        for position, gradients in enumerate((stack.layers_A(h.A), stack.layers_B(h.B))):
            self._step_factor_("AB"[position], after[position], gradients.contiguous(), read, state, options)
        if before is not None:
            change_A = _through_new_B(before, stack.rows(*after), options)
            after[0].copy_(stack.layers_A(change_A))
        return stack.rows(*after)

    def _step_factor_(
        self, side: str, values: Tensor, gradients: Tensor, read: StackGradient, state: StackState, options: StepOptions
    ) -> None:
        tensors = (values, gradients, state[side, "exp_avg"], state[side, "exp_avg_sq"])
        if state.uniform and read.pair_ids is None:
            lists = [[tensor] for tensor in tensors]
            steps = [state.steps[0]]
        else:
            pair_ids = range(len(values)) if read.pair_ids is None else read.pair_ids
            lists = [[tensor[index] for index in pair_ids] for tensor in tensors]
            steps = [state.steps[index] for index in pair_ids]
        assert options.found_inf is not None
        fused_adamw(lists[0], lists[1], lists[2], lists[3], steps, options.groups["AB".index(side)], options.found_inf)


def _through_new_B(before: Rows, after: Rows, options: StepOptions) -> Tensor:
    """The new A whose change acts through AdamW's new B as AdamW's change of A was to act, as far as that B can."""
    rates, dtype_B = options.rates, options.factor_dtypes[1]
    Bt = after.B if dtype_B is None else after.B.to(dtype_B).to(after.B.dtype)
    kept = rates.keep_A * before.A
    change = change_through(after.A - kept, rates.keep_B * before.B, row_basis(Bt, options.rtol))
    return select(options.active, kept.add_(change), before.A)
