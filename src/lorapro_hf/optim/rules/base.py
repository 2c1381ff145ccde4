"""How does an update rule step a stack of pairs, and what does it tell of itself? One rule is one way of stepping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from lorapro_hf.config import TRUST_REGION, UPDATE, LoRAProConfig
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Gradient, NativeGradient, Rows, Stack, StackGradient
from lorapro_hf.functional.bases import Bases, compute_dtype, row_bases
from lorapro_hf.functional.step_options import Group, Rates, StepOptions
from lorapro_hf.optim.rules.stack_state import MASTER, StackState, StateSpec

MEANING = {"trust_region_of": "weight"}  # kept beside each trust region: earlier ones limited something else
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

    Raises:
        ValueError: a setting has no meaning for this rule.
    """

    name: ClassVar[str]
    """The mode that selects the rule."""
    keeps_dense_moments: ClassVar[bool] = False
    """Whether its state is of the size of the adapted weights."""
    moments_dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    """The values of `moments_dtype` that it knows."""
    default_update: ClassVar[str] = UPDATE
    """The value of `update` where the settings leave it open."""
    default_trust_region: ClassVar[float | None] = TRUST_REGION
    """The value of `trust_region` where the settings leave it open; `None` is no limit."""
    has_trust_region: ClassVar[bool] = True
    """Whether `step` keeps to `options.longest`, which `trust_region` sets."""
    takes_lora_rates: ClassVar[bool] = False
    """Whether learning rates of LoRA suit it, instead of those of full fine-tuning and upwards."""
    takes_clipped_gradients: ClassVar[bool] = True
    """Whether the raw gradients of the factors may be clipped together, as by `max_grad_norm`."""
    steps_natively: ClassVar[bool] = False
    """Whether `native_step` steps pairs that the compiled kernels of the CPU serve, in the place of `step`."""
    projects_gradients: ClassVar[bool] = False
    """Whether its linear step is AdamW along the projected gradients, so that a callback can serve any optimizer."""
    keeps_state_of_slots: ClassVar[bool] = False
    """Whether its state has the shapes of the factors, and a part for each of the r slots: what copies a slot (a column
    of B and a row of A) copies its state, too."""

    def __init__(self, config: LoRAProConfig) -> None:
        self.config = config
        self.update = config.update or self.default_update
        self.is_sequential = self.update == "sequential"
        self.check()

    # ---- a rule must implement these ----

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

    # ---- a rule may override these ----

    def native_step(self, read: NativeGradient, state: StackState, options: StepOptions) -> None:
        """Step the factors and the state of a stack in place, in compiled kernels; otherwise as `step`."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise a `ValueError` if a setting has no meaning for this rule."""
        config = self.config
        if config.moments_dtype not in self.moments_dtypes:
            self._refuse("moments_dtype", "keeps its state in one dtype", "Leave it out, or use mode 'full'.")
        if config.backend != "auto" and not self.keeps_dense_moments:
            self._refuse("backend", "has no such kernel", "Leave it at 'auto', or use mode 'full'.")
        if config.trust_region and not self.has_trust_region:
            self._refuse("trust_region", "has no trust region", "Leave it out, or use another mode.")
        for setting in fields(config):
            mode = setting.metadata.get("mode", self.name)
            if mode != self.name and getattr(config, setting.name) != setting.default:
                self._refuse(setting.name, "does not know it", f"Leave it out, or use mode {mode!r}.")

    def _refuse(self, setting: str, reason: str, remedy: str) -> NoReturn:
        value = getattr(self.config, setting)
        raise ValueError(f"mode {self.name!r} {reason}, so {setting}={value!r} has no meaning. {remedy}")

    def check_device(self, device: torch.device) -> None:  # noqa: B027 (most rules need nothing)
        """Raise an `ImportError` or `RuntimeError` if the rule cannot step factors on a device."""

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
    def described_update(self) -> str:
        """The update, and the choice of X where it matters, for people to read."""
        return "sequential" if self.is_sequential else f"linear ({self.config.x_mode})"

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

    def more_norms(self, read: Sequence[Gradient], norm: Tensor) -> list[Tensor]:
        """Further 0-dim norms to compare with `largest_norm`, beside the `norm` of the equivalent gradients."""
        return []

    def shared_norm(self, read: Sequence[Gradient]) -> Tensor | None:
        """A 0-dim norm over the stacks of this rank, if `step` needs that over all ranks as `options.shared_norm`."""
        return None

    def follow(self, state: StackState, before: Bases, after: Bases) -> None:  # noqa: B027 (most rules need nothing)
        """Change the state after something else has written the factors, whose bases were `before` and are `after`.

        Nothing to do for moments of the weight or of single elements, whatever the factors are.
        """

    def rates(self, groups: tuple[Group, Group]) -> Rates:
        """Learning rates, and the fractions of A and B that decay leaves, so that B A decays by `1 − lr · λ`."""
        keep = []
        for group in groups:
            left = 1 - group["lr"] * group["weight_decay"]
            keep.append(left.clamp_min(0).sqrt() if isinstance(left, Tensor) else max(0.0, left) ** 0.5)
        return Rates(groups[0]["lr"], groups[1]["lr"], keep[0], keep[1])

    def intended_direction(
        self, gradient: RowsOf, A: Tensor, B: Tensor, state: PairState, group: Group
    ) -> RowsOf | None:
        """The direction of the weight `(m, n)` that the next step is meant to take, or `None` if the rule has none.

        Diagnostics compare the step with it, so it must not share code with `step`. `gradient` gives rows of the
        equivalent gradient of a pair A `(r, n)`, B `(m, r)`; `state` is that before the step, empty before the first.
        """
        return None

    def weight_moment(self, stack: Stack, state: StackState) -> tuple[Tensor, Tensor]:
        """The first moment as a movement `leftᵀ right` of the weights, `left` `(K, 2r, m)` and `right` `(K, 2r, n)`.

        Methods that act along the momentum ask for it between two steps.

        Raises:
            ValueError: the rule keeps no first moment.
        """
        raise ValueError(f"mode {self.name!r} keeps no first moment. Use mode 'efficient' or 'full'.")

    def factor_moment(self, stack: Stack, state: StackState) -> Rows:
        """The first moment of the factors' gradients, `s Bᵀ M` and `s M Aᵀ` for a moment M of the weights."""
        left, right = self.weight_moment(stack, state)
        factors, s = stack.read(), stack.scaling()[:, None, None]
        return Rows(s * ((factors.B @ left.mT) @ right), s * ((factors.A @ right.mT) @ left))

    # ---- the optimizer and the commands call these ----

    @property
    def trust_region(self) -> float | None:
        """The trust region in force: a positive number, or `None` for no limit."""
        if not self.has_trust_region:
            return None
        stated = self.config.trust_region
        return (self.default_trust_region if stated is None else stated) or None

    def longest_steps(self, edges: Tensor, scaling: Tensor) -> Tensor | None:
        """`StepOptions.longest`, given the bulk edges of the base weights and the scaling of each pair, `(K,)`."""
        return None if self.trust_region is None else self.trust_region * edges / scaling.abs()

    @property
    def in_force(self) -> dict[str, Any]:
        """The values of the settings that a user may leave open, as far as the rule has them."""
        return {"update": self.update, **({"trust_region": self.trust_region or 0.0} if self.has_trust_region else {})}

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

    def take_step(
        self,
        read: Gradient,
        state: StackState,
        groups: tuple[Group, Group],
        found_inf: Tensor,
        shared_norm: Tensor,
    ) -> None:
        """Step a stack: count the step, compute the new factors and store them; change nothing if `found_inf` is 1."""
        config = self.config
        active = read.stack.per_entry(state.count_step(read.pair_ids, found_inf))
        state.refresh_masters()
        options = StepOptions(
            self.rates(groups),
            groups[0]["betas"],
            groups[0]["eps"],
            sequential=self.is_sequential,
            x_mode=config.x_mode,
            rtol=config.rtol,
            active=active,
            factor_dtypes=state.factor_dtypes,
            groups=groups,
            found_inf=found_inf,
            shared_norm=shared_norm,
            longest=self.longest_steps(read.stack.edges, read.scaling),
        )
        if isinstance(read, NativeGradient):
            self.native_step(read, state, options)
        else:
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


def moment_of_product(factors: Rows, of_factors: Rows, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """How `s B A` moves along moments of its factors: `s (M_B A + B M_A)`, as `left` and `right` of `weight_moment`."""
    s = scaling[:, None, None]
    return torch.cat([s * of_factors.B, s * factors.B], dim=-2), torch.cat([factors.A, of_factors.A], dim=-2)


def matrix_shapes(pair: LoRAPair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes `(..., r, n)` of A and `(..., m, r)` of B as matrices."""
    A, B = torch.empty(pair.shape_A, device="meta"), torch.empty(pair.shape_B, device="meta")
    return tuple(pair.matrix_A(A).shape), tuple(pair.matrix_B(B).shape)


def dense_shape(pair: LoRAPair) -> tuple[int, ...]:
    """The shape `(..., m, n)` of the weight of a pair."""
    A, B = matrix_shapes(pair)
    return (*B[:-1], A[-1])
