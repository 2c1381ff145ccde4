"""Which pairs and param groups does an optimizer hold, which rank steps which pair, and where are its moments?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import Access, access_to, local
from lorapro_hf.distributed.base_weights import bulk_edges
from lorapro_hf.distributed.ownership import PairOwnership, everyone, share_pairs
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.stacks import Stack, stacks_of
from lorapro_hf.optim.groups import check_hyperparameters, group_positions, name_parameters
from lorapro_hf.optim.memory import state_bytes_by_device
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.base import MEANING
from lorapro_hf.optim.rules.stack_state import StackState

Groups = list[dict[str, Any]]


class HeldPairs(torch.optim.Optimizer):
    """The pairs, param groups and moments of an optimizer.

    Args:
        params: as for any optimizer; they must hold all factors of `pairs`.
        pairs: from `find_lora_pairs(model)`.
        defaults: lr, betas, eps and weight_decay for groups that do not set them.
        config: the settings of LoRA-Pro.

    Attributes:
        rule: the update rule of the mode.
        access: how an engine reads and writes factors; `None` without an engine.
        saved_collectively: whether all ranks call `consolidate_state_dict` before the state is saved.

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
        self._forget_run()
        super().__init__(params, {**defaults, "betas": tuple(defaults["betas"])})
        self.param_groups[0].setdefault("skipped_steps", 0)
        self._find_groups()

    def _forget_run(self) -> None:
        """Reset all attributes that are neither pickled nor copied, as before the first step."""
        self.rule = rule_of(self.config)
        self.access: Access | None = None
        self.saved_collectively = False
        self._on_step: Callable[[], None] | None = None
        self._groups_in_step: Groups | None = None
        self._positions: dict[int, tuple[int, int]] = {}
        self._ownership: PairOwnership | None = None
        self._stacks: list[Stack] = []
        self._moments: dict[Stack, StackState] = {}
        self._edges: dict[LoRAPair, Tensor] = {}
        self._signature: list[Any] = []
        self._of_pairs: set[int] = set()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of factors or of other parameters, as in `torch.optim.Optimizer`.

        If some parameters of the optimizer have names, the others get one: a factor its name in the model, any other
        parameter its place, such as `"param_group_4.0"` for the first of the fifth group.
        """
        merged = {**self.defaults, **param_group}
        check_hyperparameters(merged)
        self.rule.check_group(merged)
        name_parameters(param_group, self.param_groups, self.pairs)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Checkpoints save these, and must agree in them.
        group["lora_pro_mode"] = self.config.mode
        group["moments_dtype"] = self.config.moments_dtype
        group["master_factors"] = self.config.master_factors
        if self.config.rite_escape:  # it adds to the state
            group["rite_escape"] = True
        group.update(MEANING)
        group.update(self.rule.in_force)  # these may differ, but not because a default did
        group["param_shapes"] = [list(parameter.shape) for parameter in group["params"]]

    def estimated_state_bytes(self) -> int:
        """Bytes of optimizer state on this rank once all parameters have been stepped."""
        pairs = self._current_ownership().owned
        others = [local(p) for _, parameters in self._others() for p in parameters if p.requires_grad]
        return sum(state_bytes_by_device(pairs, self.config, others).values())

    @property
    def has_engine(self) -> bool:
        """Whether an engine decides when parameters are stepped, see `attach_engine`."""
        return self._on_step is not None

    def group_positions(self, pair: LoRAPair) -> tuple[int, int]:
        """The positions of the param groups that A and B of a pair belong to."""
        if not self._positions:  # after copying or unpickling
            self._find_groups()
        return self._positions[id(pair)]

    def _current_ownership(self) -> PairOwnership:
        """The present ownership; it and the stacks are built anew when parameters or groups have been replaced."""
        factors = [factor for pair in self.pairs for factor in (pair.A, pair.B, *pair.tied_parameters)]
        shared = self.config.shard_states
        signature = [
            list(map(id, factors)),
            [factor.dtype for factor in factors],
            [factor.device for factor in factors],
            [] if self.has_engine else [list(map(id, group["params"])) for group in self.param_groups],
            (self.access, self.saved_collectively if shared is None else shared),
        ]
        if self._ownership is None or signature != self._signature:
            if not self.has_engine:
                self._find_groups()
            access = self.access or access_to(self.pairs, everyone())
            self._ownership = share_pairs(self.pairs, access, shared, self.saved_collectively)
            self._stacks = stacks_of(self._ownership.owned, self.group_positions, factors=self._ownership.factors)
            self._moments, self._signature = {}, signature
            self._of_pairs = set(map(id, factors))
        for stack in self._stacks:
            self._check_groups(stack.pairs[0].name, *stack.groups)
        return self._ownership

    def _give_edges(self) -> None:
        """Tell all stacks how large the base weights are; collective where these are sharded."""
        if self.rule.trust_region is None:
            return
        if not self._edges:
            self._edges = dict(zip(self.pairs, bulk_edges(self.pairs), strict=True))
        for stack in self._stacks:
            if not stack.edges.numel():
                edges = torch.cat([self._edges[pair] for pair in stack.pairs])
                stack.edges = edges.to(stack.device, torch.float32 if stack.device.type == "mps" else torch.float64)

    def longest_step_of(self, pair: LoRAPair) -> Tensor | None:
        """`StepOptions.longest` of a pair, `(batch,)` on the CPU, after a step; `None` without a trust region."""
        if self.rule.trust_region is None:
            return None
        edges = next(edges for own, edges in self._edges.items() if own.A is pair.A)
        return self.rule.longest_steps(edges, torch.tensor(pair.scaling))

    def _moments_of(self, stack: Stack) -> StackState:
        """The moments of a stack, read again from `state` after that was loaded or moved."""
        moments = self._moments.get(stack)
        if moments is None or not moments.is_shown_by(self.state):
            moments = self._moments[stack] = StackState(stack, self.rule.specs(stack.pairs[0]))
            moments.adopt(self.state)
        return moments

    def held_states(self) -> list[tuple[Stack, StackState]]:
        """The pairs that this rank steps, in stacks, each with its state; those that have been stepped or loaded."""
        self._current_ownership()
        begun = [stack for stack in self._stacks if any(self.state.get(pair.A) for pair in stack.pairs)]
        return [(stack, self._moments_of(stack)) for stack in begun]

    def total_over_owners(self, values: Tensor) -> Tensor:
        """Sum values in place over the ranks that share the pairs; all of them call it."""
        return self._current_ownership().total(values)

    @property
    def _whole_groups(self) -> Groups:
        """All param groups, also while an engine has cut them down in its step."""
        return self.param_groups if self._groups_in_step is None else self._groups_in_step

    def _others(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The groups with their parameters that belong to no pair; call `_current_ownership` first."""
        return [(group, [p for p in group["params"] if id(p) not in self._of_pairs]) for group in self.param_groups]

    def _find_groups(self) -> None:
        self._positions = group_positions(self.pairs, self.param_groups)
        for pair in self.pairs:
            self._check_groups(pair.name, *self.group_positions(pair))

    def _check_groups(self, name: str, position_A: int, position_B: int) -> None:
        """Raise if the two groups of a pair contradict each other."""
        if position_A != position_B:
            self.rule.check_groups(name, self._whole_groups[position_A], self._whole_groups[position_B])

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
        return {**super().__getstate__(), "pairs": self.pairs, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "pairs" in state:  # torch calls this with the groups and state of a checkpoint, too
            self._forget_run()
