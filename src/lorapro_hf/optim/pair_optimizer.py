"""What does an optimizer of factor pairs hold, who of the ranks steps what, and how is its state saved and loaded?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import Access, access_to, local
from lorapro_hf.distributed.ownership import Shares, everyone
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Stack, stacks_of
from lorapro_hf.optim.checkpoint import check_state_dict
from lorapro_hf.optim.consolidation import (
    States,
    await_all,
    collect_states,
    own_state,
    read_own_state,
    shard_states,
    whole,
)
from lorapro_hf.optim.finite import of_states, require_finite
from lorapro_hf.optim.finite_checks import FiniteChecks
from lorapro_hf.optim.first_steps import FirstSteps
from lorapro_hf.optim.groups import check_hyperparameters, name_parameters
from lorapro_hf.optim.memory import state_bytes_by_device
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.base import UpdateRule
from lorapro_hf.optim.state import StackState


class PairOptimizer(FiniteChecks):
    """The pairs, param groups and state of an optimizer; how it steps is its subclass's affair.

    Args:
        params: as for any optimizer; they must hold all factors of `pairs`.
        pairs: from `find_lora_pairs(model)`.
        defaults: lr, betas, eps and weight_decay of groups that have none of their own.
        config: mode and dtype of the moments, and whether ranks share them out.

    Attributes:
        access: how an engine's factors are read and written; `None` to find out.
        engine_step: what `step()` does instead, where an engine decides what is stepped when.
        saved_collectively: whoever saves the state calls `consolidate_state_dict` on all ranks.

    Raises:
        ValueError: no pairs, factors missing from `params`, or hyperparameters out of range.
    """

    def __init__(
        self, params: Iterable[Any], pairs: Sequence[LoRAPair], defaults: dict[str, Any], config: LoRAProConfig
    ) -> None:
        if not pairs:
            raise ValueError("no LoRA pairs to optimize; pass find_lora_pairs(model), or use torch.optim.AdamW.")
        check_hyperparameters(defaults)
        self.config = config
        self.pairs = list(pairs)
        self.access: Access | None = None
        self.engine_step: Callable[[], None] | None = None
        self.saved_collectively = False
        self._shares: Shares | None = None
        self._stacks: list[Stack] = []
        self._moments: dict[Stack, StackState] = {}
        self._signature: list[Any] = []
        self._positions: dict[int, tuple[int, int]] = {}
        self._of_pairs: set[int] = set()
        self._skipped: Tensor | None = None
        self._consolidated: States | None = None
        self.first_steps = FirstSteps(self.pairs)
        self._starts_finite, self._seen = False, (0, 0)
        super().__init__(params, {**defaults, "betas": tuple(defaults["betas"])})
        self.param_groups[0].setdefault("skipped_steps", 0)
        self._positions = self._groups_of_pairs()

    @property
    def rule(self) -> UpdateRule:
        """The update rule of the mode."""
        return rule_of(self.config)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of ordinary parameters or of factors, as in `torch.optim.Optimizer`.

        If some parameters of the optimizer have names, those without get one: a factor its name in the model, any other
        its place, such as `"param_group_4.0"` for the first of the fifth group.
        """
        merged = {**self.defaults, **param_group}
        check_hyperparameters(merged)
        self.rule.check_group(merged)
        name_parameters(param_group, self.param_groups, self.pairs)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # What a checkpoint must agree in: kept in the group because that is what state_dict saves.
        group["lora_pro_mode"] = self.config.mode
        group["moments_dtype"] = self.config.moments_dtype
        group["master_factors"] = self.config.master_factors
        group["param_shapes"] = [list(parameter.shape) for parameter in group["params"]]

    def estimated_state_bytes(self) -> int:
        """Bytes of optimizer state on this rank once every parameter has been stepped, the pairs' and the others'."""
        own = self._current_shares().own
        ordinary = [local(p) for _, parameters in self._ordinary() for p in parameters if p.requires_grad]
        return sum(state_bytes_by_device(own, self.config, ordinary).values())

    def _current_shares(self) -> Shares:
        """Who steps which pairs, in which stacks; found out anew when parameters or groups have been replaced."""
        factors = [factor for pair in self.pairs for factor in (pair.A, pair.B, *pair.tied_parameters)]
        shared = self.config.shard_states
        signature = [
            list(map(id, factors)),
            [factor.dtype for factor in factors],
            [factor.device for factor in factors],
            [list(map(id, group["params"])) for group in self.param_groups] if self.engine_step is None else [],
            (self.access, self.saved_collectively if shared is None else shared),
        ]
        if self._shares is None or signature != self._signature:
            if self.engine_step is None:
                self._positions = self._groups_of_pairs()
            access = self.access or access_to(self.pairs, everyone())
            whole = shared is False or (shared is None and access.in_place and not self.saved_collectively)
            self._shares = Shares(self.pairs, access, shared=not whole)
            self._stacks = stacks_of(
                self._shares.own, lambda pair: self._positions[id(pair)], factors=self._shares.factors
            )
            self._moments, self._signature = {}, signature
            self._of_pairs = set(map(id, factors))
        for stack in self._stacks:
            self._check_groups(stack.pairs[0].name, *stack.groups)
        return self._shares

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Have all ranks leave out a step that raises on one of them; the others would wait for it, or step alone."""
        try:
            yield
        except Exception as error:
            if self._shares is not None:
                self._shares.fail(error)
            raise

    def _moments_of(self, stack: Stack) -> StackState:
        """The state of a stack, taken from `self.state` after that has been loaded or moved."""
        moments = self._moments.get(stack)
        if moments is None or not moments.is_shown_by(self.state):
            moments = self._moments[stack] = StackState(stack, self.rule.specs(stack.pairs[0]))
            moments.adopt(self.state)
        return moments

    def _groups_of_pairs(self) -> dict[int, tuple[int, int]]:
        """The positions of the groups of A and B by the id of a pair, after checking that all factors are there."""
        positions = {id(p): position for position, group in enumerate(self.param_groups) for p in group["params"]}
        found = {}
        for pair in self.pairs:
            A, B = pair.A, pair.B
            if any(id(factor) not in positions for factor in (A, B, *pair.tied_parameters)):
                raise ValueError(
                    f"{pair.name}: its factors are not in the optimizer's param_groups. Build the optimizer from the "
                    "model it trains, after moving or wrapping it or loading an adapter into it: "
                    "create_lorapro_optimizer(model, lr=...). A plain Trainer has PEFT make new factors of those in "
                    "bfloat16 and float16 when it resumes: use LoRAProTrainer. Under DeepSpeed, call "
                    "attach_deepspeed(engine, optimizer) before the first step."
                )
            found[id(pair)] = positions[id(A)], positions[id(B)]
            self._check_groups(pair.name, *found[id(pair)])
        return found

    def require_pairs(self, pairs: Sequence[LoRAPair]) -> None:
        """Raise if the pairs that a model trains, as `find_lora_pairs` finds them, are not those of this optimizer.

        Raises:
            ValueError: pairs have come or gone since the optimizer was built, or their factors are new parameters.
        """
        held = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        trained = {(id(pair.layer), pair.adapter_name) for pair in pairs}
        come = [pair for pair in pairs if id(pair.A) not in held or id(pair.B) not in held]
        gone = [pair for pair in self.pairs if (id(pair.layer), pair.adapter_name) not in trained]
        found = [
            f"{len(some)} {what}, to begin with {some[0].name} of adapter {some[0].adapter_name!r}"
            for some, what in (
                (come, "of the model are not in the optimizer"),
                (gone, "of the optimizer are not trained"),
            )
            if some
        ]
        if found:
            raise ValueError(
                f"the model's LoRA pairs are not those that the optimizer was built for: {'; '.join(found)}. Adapters "
                "were added, activated, deactivated, deleted or replaced since, or it is the optimizer of another "
                "model. Set trainer.optimizer = None, so that one is built for the model as it is now, or make a new "
                "trainer."
            )

    def _check_groups(self, name: str, position_A: int, position_B: int) -> None:
        """Raise if the two groups of a pair contradict each other."""
        if position_A != position_B:
            self.rule.check_groups(name, self.param_groups[position_A], self.param_groups[position_B])

    def _ordinary(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The parameters of no pair, group by group, once the pairs' are known from `_current_shares`."""
        return [(group, [p for p in group["params"] if id(p) not in self._of_pairs]) for group in self.param_groups]

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all pairs on one rank, where it is shared out; call it on all ranks before saving.

        `state_dict()` on that rank is then whole, without any other rank's help, until the next step.

        Args:
            to: the rank, in the group of those that share the state.

        Raises:
            RuntimeError: another rank has ended, or does not take part within the limit of the process group.
            ValueError: a parameter or its state holds NaN or Inf.
        """
        shares = self._current_shares()
        if shares.group is not None and shares.access.in_place:
            await_all(shares.attendance, saves=True)
            self._consolidated = collect_states(shares, self.state, self.config, to)
            self.require_finite_save()

    def state_dict(self) -> dict[str, Any]:
        """As in `torch.optim.Optimizer`: tensors by parameter, and the groups.

        Where ranks share the state out, this collects all of it on rank 0 and must be called on all ranks, unless
        `consolidate_state_dict` has been. The other ranks get the state of their own pairs, which only the same
        rank of as many can load, and the steps of all others. Together that is a whole state for
        `torch.distributed.checkpoint`, which any number of ranks can load. State of DTensors comes as DTensors; for
        this all ranks are needed, too.

        Raises:
            RuntimeError: another rank has ended, or does not take part within the limit of the process group.
            ValueError: a parameter or its state holds NaN or Inf.
        """
        self._settle_skipped()
        shares = self._current_shares() if self.engine_step is None else None
        saved = super().state_dict()
        if shares is None:
            return saved
        if shares.access.in_place and shares.group is None:
            self.require_finite_save()
            return saved
        states = self._consolidated
        if states is None:
            await_all(shares.attendance, self.saved_collectively)
            if shares.access.in_place:
                states = collect_states(shares, self.state, self.config, 0)
            else:
                states = shard_states(shares, self.state, self.config)
            self.require_finite_save()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            if id(parameter) in self._of_pairs:
                saved["state"].pop(key, None)
                if parameter in states:
                    saved["state"][key] = states[parameter]
        return saved

    def own_state(self) -> dict[str, Tensor]:
        """The state of the pairs that this rank steps, by their names; for engines that save it themselves."""
        return own_state(self._current_shares(), self.state, self.config)

    def load_own_state(self, read: Callable[[str], Tensor | None]) -> None:
        """Take the state of this rank's pairs from what ranks, as many as there were, have saved of their `own_state`.

        Args:
            read: gives the tensor of a name, `None` where there is none.

        Raises:
            ValueError: a pair has part of its state only, or of another shape, or one of any rank holds NaN or Inf.
                Nothing has been changed then.
        """
        shares = self._current_shares()
        states = read_own_state(shares, read, self.config)
        require_finite(of_states(shares.own, states), shares.access.group)
        self._moments, self._starts_finite = {}, False
        for pair in shares.own:  # what the checkpoint lacks had not begun when it was saved
            for parameter in (pair.A, pair.B):
                self.state.pop(parameter, None)
                if parameter in states:
                    self.state[parameter] = dict(states[parameter])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, keeping the moments of factors in float32 at least.

        The number of ranks may be another than when it was saved. With DTensors all ranks must call it.

        Raises:
            ValueError: the checkpoint is of another mode, rank or model, or of another optimizer, or holds NaN or Inf.
                Nothing has been changed then.
        """
        shares = self._current_shares()
        needed = shares.own if shares.access.in_place else self.pairs  # what is sharded takes all ranks to put together
        check_state_dict(state_dict, self.param_groups, self.pairs, self.config, needed)
        for index, group in enumerate(state_dict["param_groups"]):
            check_hyperparameters({**self.defaults, **group}, f" in param group {index} of the checkpoint")
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        loaded = [parameter for group in self.param_groups for parameter in group["params"]]
        pair_of = {id(factor): pair for pair in self.pairs for factor in (pair.A, pair.B)}
        of_factors = {key for key, parameter in zip(saved, loaded, strict=True) if id(parameter) in pair_of}
        # torch would cast moments to the dtype of the factors, which rounds those of bf16 factors and blows 8-bit codes
        # up to four times their size: it gets the others only.
        others = {key: value for key, value in state_dict["state"].items() if key not in of_factors}
        super().load_state_dict({**state_dict, "state": others})
        self._skipped, self._shares, self._consolidated, self._starts_finite = None, None, None, False
        self._begin_training()
        own_pairs = set(map(id, self._current_shares().own))
        for key, parameter in zip(saved, loaded, strict=True):
            if key in of_factors:
                pair = pair_of[id(parameter)]
                state = {name: whole(value) for name, value in state_dict["state"].get(key, {}).items()}
                if state and id(pair) in own_pairs:  # an entry without content would outlive an exchange of parameters
                    self.state[parameter] = self._state_as_kept(pair, parameter, state)
            elif "step" in self.state.get(parameter, {}):
                step = torch.as_tensor(self.state[parameter]["step"], dtype=torch.float32, device=parameter.device)
                self.state[parameter]["step"] = step.clone()

    def _state_as_kept(self, pair: LoRAPair, parameter: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
        specs = [spec for spec in self.rule.specs(pair) if parameter is (pair.A if spec.side == "A" else pair.B)]
        kept = {
            spec.name: torch.as_tensor(state[spec.name]).to(parameter.device, spec.dtype, copy=True)
            for spec in specs
            if spec.name in state
        }
        if "step" in state:
            kept["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device).clone()
        return kept

    def __repr__(self) -> str:
        groups = self.param_groups
        lines = [f"{len(self.pairs)} pairs, {self.rule.description}"]
        lines += [
            f"group {position}: lr={float(group['lr']):g}, weight_decay={group['weight_decay']:g}, "
            f"parameters={len(group['params'])}"
            for position, group in enumerate(groups)
        ]
        return "\n".join([f"{type(self).__name__} (", *(f"    {line}" for line in lines), ")"])

    def __getstate__(self) -> dict[str, Any]:
        self._settle_skipped()
        of_this_run: dict[str, Any] = {"_shares": None, "_stacks": [], "_moments": {}, "_signature": []}
        of_this_run |= {"_positions": {}, "_of_pairs": set(), "_consolidated": None, "access": None}
        of_this_run |= {"_skipped": None, "engine_step": None, "saved_collectively": False}
        of_this_run["first_steps"] = FirstSteps(self.pairs, self.skipped_steps)
        of_this_run |= {"_starts_finite": False, "_seen": (self.skipped_steps, 0)}
        return {**super().__getstate__(), "pairs": self.pairs, "config": self.config, **of_this_run}
