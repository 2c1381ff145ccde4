"""Which settings do all functions of a step share?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FactorDtypes = tuple[torch.dtype | None, torch.dtype | None]
Group = Mapping[str, Any]


class Rates(NamedTuple):
    """How far a step goes: numbers, 0-dim tensors, or one per pair in a tensor `(K,)`."""

    lr_A: float | Tensor
    lr_B: float | Tensor
    keep_A: float | Tensor = 1.0  # the fraction of A that decoupled decay leaves
    keep_B: float | Tensor = 1.0


@dataclass(frozen=True)
class StepOptions:
    """The settings of one step of K pairs.

    Args:
        rates: Learning rates and decay; a step moves the decayed factors.
        betas: Decay rates of the moments.
        eps: Added to the denominator of Adam's direction.
        sequential: Move B first and then A against the new B, instead of both at once.
        x_mode: As in `project_lora_gradients`.
        rtol: As in `project_lora_gradients`.
        active: Bool `(K,)`. Pairs where it is False, and their state, stay as they are to the bit. `None`: all are
            active.
        factor_dtypes: The dtypes in which A and B are stored. New factors are rounded to them but keep the dtype of
            the inputs, so that the state fits the stored factors. `None`: no rounding.
        groups: The param groups of A and of B, for rules that step each factor by itself.
        found_inf: 0-dim float32, 1 where the step must change nothing; `active` is False everywhere then.
        shared_norm: The norm that `UpdateRule.shared_norm` asked for, over the pairs of all ranks.
        longest: `(K,)`. The largest norm that a step of `B A` may have, without decay and the scaling; see
            `lorapro_hf.functional.step_limit`. `None`: no limit.
    """

    rates: Rates
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    sequential: bool = False
    x_mode: str = "sylvester"
    rtol: float | None = None
    active: Tensor | None = None
    factor_dtypes: FactorDtypes = (None, None)
    groups: tuple[Group, Group] = ({}, {})
    found_inf: Tensor | None = None
    shared_norm: Tensor | None = None
    longest: Tensor | None = None
