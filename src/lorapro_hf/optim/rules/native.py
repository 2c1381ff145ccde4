"""What do the compiled kernels of the CPU need for a step, beside the pairs?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorapro_hf.factors.stacks import NativeGradient
from lorapro_hf.functional.step_options import Group, StepOptions
from lorapro_hf.optim.rules.stack_state import StackState

_X_MODES = ("zero", "symmetric", "sylvester")  # in the order of the kernels
_MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq", "escape": "escape"}


def step_natively(
    name: str, read: NativeGradient, state: StackState, options: StepOptions, *of_kernel: dict[str, Any]
) -> None:
    """Step the active pairs and their state in place.

    Args:
        name: of the kernel.
        read: the pairs.
        state: theirs, with this step counted; `exp_avg`, `exp_avg_sq` and `escape` are those of the kernel.
        options: of the step.
        *of_kernel: from `native_options`; one, or those of A and those of B.
    """
    tensors = {f"{short}_{side}": state.tensors.get((side, long)) for short, long in _MOMENTS.items() for side in "AB"}
    step_kernel(name, read, {**tensors, "steps": state.steps}, options, *of_kernel)


def step_kernel(
    name: str,
    read: NativeGradient,
    tensors: Mapping[str, Tensor | None],
    options: StepOptions,
    *of_kernel: dict[str, Any],
) -> None:
    """Call a kernel for the active pairs with tensors by the names of its state."""
    active = None if options.active is None else options.active.contiguous()
    read.native.step(name, {**tensors, "active": active, "longest": options.longest}, of_kernel)


def native_options(options: StepOptions, group: Group | None = None, **more: Any) -> dict[str, Any]:
    """The options of a step by their names in the kernels, with the betas and eps of a group if given."""
    rates = options.rates
    beta1, beta2 = options.betas if group is None else group["betas"]
    return {
        **{name: float(getattr(rates, name)) for name in ("lr_A", "lr_B", "keep_A", "keep_B")},
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(options.eps if group is None else group["eps"]),
        "sequential": options.sequential,
        "x_mode": _X_MODES.index(options.x_mode),
        **more,
    }
