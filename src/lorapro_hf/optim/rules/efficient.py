"""Mode efficient: AdamW on the factors, whose A moves the weight from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Gradient, NativeGradient, Rows, Stack, StackGradient
from lorapro_hf.functional.bases import RowBasis, compute_dtype, row_basis
from lorapro_hf.functional.factor_steps import REACH, change_through, lengthened, select
from lorapro_hf.functional.step_limit import kept_fraction
from lorapro_hf.functional.step_options import Group, Rates, StepOptions
from lorapro_hf.kernels.dense import fused_adamw
from lorapro_hf.optim.rules.base import UpdateRule, moment_of_product, stepped_factors
from lorapro_hf.optim.rules.native import native_options, step_natively
from lorapro_hf.optim.rules.stack_state import StackState, StateSpec


class Efficient(UpdateRule):
    """AdamW on the factors' own gradients, with a longer change of A while B is small.

    With `efficient_projected` it is the paper's: AdamW on the projected gradients, whose sizes fall by orders of
    magnitude while B grows; the second moment remembers the largest, and A hardly moves. `update="sequential"` has the
    change of A act through the new B.
    """

    name = "efficient"
    default_update = "linear"
    default_trust_region = None
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

    def check(self) -> None:
        """Refuse `x_mode` too, unless the gradients are projected."""
        super().check()
        if self.config.x_mode != "sylvester" and not self.config.efficient_projected:
            remedy = "Leave it out, or set efficient_projected=True."
            self._refuse("x_mode", "takes the gradients of the factors as they are", remedy)

    def weight_moment(self, stack: Stack, state: StackState) -> tuple[Tensor, Tensor]:
        """The movement of B A along the moments of the factors."""
        return moment_of_product(stack.read(), self.factor_moment(stack, state), stack.scaling())

    def factor_moment(self, stack: Stack, state: StackState) -> Rows:
        """The moments themselves."""
        return stack.rows(state["A", "exp_avg"], state["B", "exp_avg"])

    def check_groups(self, name: str, of_A: Group, of_B: Group) -> None:
        """Nothing: each factor has moments of its own."""

    @property
    def in_force(self) -> dict[str, Any]:
        """Whether the gradients are projected, too."""
        return {**super().in_force, "efficient_projected": bool(self.config.efficient_projected)}

    @property
    def described_update(self) -> str:
        """The update and, for projected gradients, the choice of X, which matters to both updates."""
        return f"{self.update} ({self.config.x_mode})" if self.config.efficient_projected else self.update

    def rates(self, groups: tuple[Group, Group]) -> Rates:
        """Learning rates and AdamW's decoupled decay of each factor."""
        keep_A, keep_B = (1 - group["lr"] * group["weight_decay"] for group in groups)
        return Rates(groups[0]["lr"], groups[1]["lr"], keep_A, keep_B)

    def more_norms(self, read: Sequence[Gradient], norm: Tensor) -> list[Tensor]:
        """Bounds on the gradients that AdamW sees; infinite where they may overflow."""
        if self.config.efficient_projected:
            stretches = [(each.largest_inverses() / each.scaling.abs()).amax() for each in read]
        else:
            stretches = [(each.largest_singular() * each.scaling.abs()).amax() for each in read]
        return [stretch * norm.to(stretch) for stretch in stretches]

    def native_step(self, read: NativeGradient, state: StackState, options: StepOptions) -> None:
        """AdamW in place."""
        reach = 0.0 if self.config.efficient_projected else REACH
        step_natively(
            self.name, read, state, options, *(native_options(options, group, reach=reach) for group in options.groups)
        )

    def step(self, read: StackGradient, state: StackState, options: StepOptions) -> Rows:
        """AdamW in place, in the dtype of the moments and the layout of the parameters."""
        stack, masters, is_projected = read.stack, state.masters, self.config.efficient_projected
        basis_B = None if is_projected else stepped_factors(read, state, options.rtol)[1].B
        h = read.projected_gradients_(options.x_mode) if is_projected else stack.read_gradients(stack.gradients())
        own = stack.layers_A(read.factors.A), stack.layers_B(read.factors.B)
        after = [x.contiguous() if master is None else master for x, master in zip(own, masters, strict=True)]
        changes_again, is_limited = options.sequential or not is_projected, options.longest is not None
        before = stack.rows(*(values.clone() for values in after)) if changes_again or is_limited else None
        for position, gradients in enumerate((stack.layers_A(h.A), stack.layers_B(h.B))):
            self._step_factor_("AB"[position], after[position], gradients.contiguous(), read, state, options)
        if before is not None and changes_again:
            new_A = _restepped_A(before, stack.rows(*after), basis_B, options)
            after[0].copy_(stack.layers_A(new_A))
        if before is not None and is_limited:
            limited = _within(before, stack.rows(*after), options)
            after[0].copy_(stack.layers_A(limited.A))
            after[1].copy_(stack.layers_B(limited.B))
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


def _restepped_A(before: Rows, after: Rows, basis_B: RowBasis | None, options: StepOptions) -> Tensor:
    """A with AdamW's change of it lengthened, if B has a basis, and acting through the new B in a sequential step."""
    rates, dtype_B = options.rates, options.factor_dtypes[1]
    kept = rates.keep_A * before.A
    change = after.A - kept
    if basis_B is not None:
        change = lengthened(change, basis_B, rates.lr_A)
    if options.sequential:
        Bt = after.B if dtype_B is None else after.B.to(dtype_B).to(after.B.dtype)
        change = change_through(change, rates.keep_B * before.B, row_basis(Bt, options.rtol))
    return select(options.active, kept.add_(change), before.A)


def _within(before: Rows, after: Rows, options: StepOptions) -> Rows:
    """The factors after a step that is shortened to `options.longest`."""
    rates = options.rates
    assert options.longest is not None
    decayed = Rows(rates.keep_A * before.A, rates.keep_B * before.B)
    step_A, step_Bt = after.A - decayed.A, after.B - decayed.B
    kept = kept_fraction(before.A, before.B, step_A, step_Bt, options.longest)
    is_shortened = kept[:, 0, 0] < 1
    if options.active is not None:  # others have not decayed
        is_shortened &= options.active
    return Rows(
        select(is_shortened, decayed.A.addcmul_(step_A, kept), after.A),
        select(is_shortened, decayed.B.addcmul_(step_Bt, kept), after.B),
    )
