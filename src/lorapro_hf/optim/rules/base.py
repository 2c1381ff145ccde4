"""What must an update rule say and do? One rule is one way of stepping a stack of pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from lorapro_hf.config import TRUST_REGION, LoRAProConfig
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Rows, StackGradient
from lorapro_hf.functional.bases import Bases, compute_dtype, row_bases
from lorapro_hf.functional.step_options import Group, Rates, StepOptions
from lorapro_hf.optim.state import MASTER, StackState, StateSpec

# A step batches factors and gradients, shape by shape, and works on about so many copies of that size.
_WORKING_COPIES = 12
_MASTER_COPIES = 4  # more with master copies of the factors, which have bases of their own

RowsOf = Callable[[slice], Tensor]  # gives some rows of a matrix `(m, n)`
PairState = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]  # the optimizer's state of A and of B


class UpdateRule(ABC):
    """One way of stepping pairs: their state, and the factors after a step.

    A subclass implements `state_spec` and `step`, sets `name`, and overrides the facts below that differ. With a line
    in `lorapro_hf.optim.rules.RULES` and its name in `lorapro_hf.config.MODES` it is a mode of `LoRAProConfig`;
    memory, checkpoints, sharding, diagnostics and the commands ask the rule for everything else.

    Args:
        config: the settings.

    Raises:
        ValueError: a setting has no meaning for this rule.
    """

    name: ClassVar[str]
    """The mode that selects the rule."""
    keeps_dense_moments: ClassVar[bool] = False
    """Whether its state is of the size of the adapted weights."""
    moments_dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    """The values of `moments_dtype` that it knows."""
    has_trust_region: ClassVar[bool] = True
    """Whether `trust_region` limits its steps."""
    takes_lora_rates: ClassVar[bool] = False
    """Whether learning rates of LoRA suit it, instead of those of full fine-tuning and upwards."""
    projects_gradients: ClassVar[bool] = False
    """Whether its linear step is AdamW along the projected gradients, so that a callback can serve any optimizer."""

    def __init__(self, config: LoRAProConfig) -> None:
        self.config = config
        self.check()

    @abstractmethod
    def state_spec(self, pair: LoRAPair) -> list[StateSpec]:
        """The tensors to keep of a pair, beside the step counter and the master copies."""

    @abstractmethod
    def step(self, read: StackGradient, state: StackState, options: StepOptions) -> Rows:
        """The new factors of a stack; updates `state` in place.

        Called once per step and stack with a gradient, after the step has been counted in `state.steps`. Nothing here
        may wait for the device. Where `options.active` is False factors and state must stay as they are to the bit;
        `linear_step`, `spend_direction` and `select` see to that.
        """

    def check(self) -> None:
        """Raise a `ValueError` if a setting has no meaning for this rule."""
        config = self.config
        if config.moments_dtype not in self.moments_dtypes:
            self._refuse("moments_dtype", "keeps its state in one dtype", "Leave it out, or use mode 'full'.")
        if config.backend != "auto" and not self.keeps_dense_moments:
            self._refuse("backend", "has no such kernel", "Leave it at 'auto', or use mode 'full'.")
        if config.trust_region and not self.has_trust_region:
            self._refuse("trust_region", "has no trust region", "Leave it out, or use another mode.")

    def _refuse(self, setting: str, reason: str, remedy: str) -> NoReturn:
        value = getattr(self.config, setting)
        raise ValueError(f"mode {self.name!r} {reason}, so {setting}={value!r} has no meaning. {remedy}")

    def check_device(self, device: torch.device) -> None:  # noqa: B027 (most rules need nothing)
        """Raise if the rule cannot step factors on a device.

        Raises:
            ImportError: a package is missing.
            RuntimeError: the backend of the settings cannot serve the device.
        """

    def check_group(self, group: Group) -> None:
        """Raise a `ValueError` if hyperparameters that AdamW accepts do not suit the rule."""
        if group["eps"] < torch.finfo(torch.float32).tiny:
            raise ValueError(
                f"eps={group['eps']!r} is 0 in float32: in mode {self.name!r} elements that have had no gradient yet "
                "would become NaN. Use 1e-8, or mode 'factored'."
            )

    def check_groups(self, name: str, of_A: Group, of_B: Group) -> None:
        """Raise a `ValueError` if the param groups of both factors of the pair `name` contradict each other."""
        if (*of_A["betas"], of_A["eps"]) != (*of_B["betas"], of_B["eps"]):
            raise ValueError(
                f"{name}: lora_A and lora_B have different betas or eps, but mode {self.name!r} keeps one pair of "
                "moments for both. Give both groups the same, or use mode 'efficient'."
            )

    @property
    def trust_region(self) -> float | None:
        """The trust region in force: a positive number, or `None` for no limit."""
        if not self.has_trust_region:
            return None
        return TRUST_REGION if self.config.trust_region is None else self.config.trust_region or None

    @property
    def described_update(self) -> str:
        """The update, and the choice of X where it matters, for people to read."""
        return "sequential" if self.config.is_sequential else f"linear ({self.config.x_mode})"

    @property
    def description(self) -> str:
        """Mode, update and trust region on one line."""
        limit = f", trust_region={self.trust_region or 0:g}" if self.has_trust_region else ""
        return f"mode={self.name}, update={self.described_update}{limit}"

    def specs(self, pair: LoRAPair) -> list[StateSpec]:
        """`state_spec`, and the master copies of the factors where the settings ask for them."""
        specs, exact = self.state_spec(pair), compute_dtype(pair.A, pair.B)
        if self.config.master_factors and pair.A.dtype != exact:
            specs.append(StateSpec(MASTER, "A", tuple(pair.shape_A), exact, "parameter"))
        if self.config.master_factors and pair.B.dtype != exact:
            specs.append(StateSpec(MASTER, "B", tuple(pair.shape_B), exact, "parameter"))
        return specs

    def scratch_bytes(self, pairs: Sequence[LoRAPair], device: torch.device) -> int:
        """Bytes that a step of pairs may need on a device beside the state: an allowance, not a count."""
        copies = _WORKING_COPIES + (_MASTER_COPIES if self.config.master_factors else 0)
        return sum(
            copies * (pair.shape_A.numel() + pair.shape_B.numel()) * compute_dtype(pair.A, pair.B).itemsize
            for pair in pairs
        )

    def largest_norm(self, dtype: torch.dtype) -> float:
        """The norm of gradients in a dtype beyond which second moments overflow and the step is left out."""
        return torch.finfo(dtype).max ** 0.5

    def more_norms(self, read: Sequence[StackGradient], norm: Tensor) -> list[Tensor]:
        """Further 0-dim norms to hold against `largest_norm`.

        Args:
            read: the stacks of this rank.
            norm: of their equivalent gradients.
        """
        return []

    def shared_norm(self, read: Sequence[StackGradient]) -> Tensor | None:
        """A 0-dim norm over the stacks of this rank, if `step` needs that over all ranks as `options.shared_norm`."""
        return None

    def rates(self, groups: tuple[Group, Group]) -> Rates:
        """Learning rates, and the fractions of A and B that decay leaves, so that B A decays by `1 − lr · λ`."""
        keep = []
        for group in groups:
            left = 1 - group["lr"] * group["weight_decay"]
            keep.append(left.clamp_min(0).sqrt() if isinstance(left, Tensor) else max(0.0, left) ** 0.5)
        return Rates(groups[0]["lr"], groups[1]["lr"], keep[0], keep[1], self.trust_region)

    def intended_direction(
        self, gradient: RowsOf, A: Tensor, B: Tensor, state: PairState, group: Group
    ) -> RowsOf | None:
        """The direction of the weight along which the next step is meant to go, for diagnostics.

        It must not share code with `step`, so that it shows the errors of its kernels.

        Args:
            gradient: rows of the equivalent gradient.
            A: `(r, n)`.
            B: `(m, r)`.
            state: before the step; empty before the first.
            group: betas and eps.

        Returns:
            Rows of the direction `(m, n)`, or `None` for a rule that has no direction of the weight.
        """
        return None

    def take_step(
        self,
        read: StackGradient,
        state: StackState,
        groups: tuple[Group, Group],
        found_inf: Tensor,
        shared_norm: Tensor,
    ) -> None:
        """Step a stack: count the step, compute the new factors and store them.

        Args:
            read: the stack and its gradients.
            state: of the stack.
            groups: the param groups of A and of B.
            found_inf: 0-dim float32 on the stack's device; where it is 1 nothing changes.
            shared_norm: that of `shared_norm` over all ranks, 0 if the rule has none.
        """
        config = self.config
        active = read.stack.per_entry(state.count_step(read.pair_ids, found_inf))
        state.refresh_masters()
        options = StepOptions(
            self.rates(groups),
            groups[0]["betas"],
            groups[0]["eps"],
            sequential=config.is_sequential,
            x_mode=config.x_mode,
            rtol=config.rtol,
            active=active,
            factor_dtypes=state.factor_dtypes,
            groups=groups,
            found_inf=found_inf,
            shared_norm=shared_norm,
        )
        read.stack.write(self.step(read, state, options), read.pair_ids, state.masters)


def stepped_factors(read: StackGradient, state: StackState, rtol: float | None) -> tuple[Rows, Bases]:
    """The factors that a step moves, and their bases.

    Master copies differ from the factors at which the gradient was taken. They have bases of their own, as the small
    directions of a factor differ by more than its roundings.
    """
    factors = state.factors(read.factors)
    if factors is read.factors:
        return factors, read.bases
    return factors, Bases(*row_bases(list(factors), rtol))
